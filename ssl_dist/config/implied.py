"""What an override of one key means for the key beside it, which the file gives for another value of the first.

A length in steps takes the place of one in epochs, and the other way round. The short side that images are resized to
before the centre crop keeps its proportion to the crop.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

_OTHER_LENGTH = {"steps": "epochs", "epochs": "steps"}


class Neighbours(NamedTuple):
    """Sizes that a tree has before it is overridden; None: not given, or no number. A tree is not yet validated."""

    image_size: int | None
    eval_resize: int | None

    @staticmethod
    def of(tree: dict) -> "Neighbours":
        return Neighbours(_image_size(tree), _number(_section(tree, "data").get("eval_resize")))

    def follow(self, tree: dict, keys: Collection[str]) -> list[str]:
        """Change in `tree`, whose `keys` were overridden, the keys beside them that were not; returns a line for each
        that the file gives."""
        return self._length(tree, keys) + self._resize(tree, keys)

    def _length(self, tree: dict, keys: Collection[str]) -> list[str]:
        options, lines = _section(tree, "optim"), []
        for key, other in _OTHER_LENGTH.items():
            value, replaced = options.get(key), options.get(other)
            if f"optim.{key}" not in keys or f"optim.{other}" in keys or value is None:
                continue
            options[other] = None
            if replaced is not None:
                lines.append(f"optim.{key}={value} takes the place of optim.{other}: {replaced}")
        return lines

    def _resize(self, tree: dict, keys: Collection[str]) -> list[str]:
        size, data = _image_size(tree), _section(tree, "data")
        if (
            self.image_size in (None, size)
            or self.eval_resize is None
            or size is None
            or {"data", "data.eval_resize"} & {*keys}
        ):
            return []
        data["eval_resize"] = round(self.eval_resize * size / self.image_size)
        return [
            f"data.eval_resize: {data['eval_resize']} for images of {size} px, in proportion to {self.eval_resize} for "
            f"{self.image_size}"
        ]


def _section(tree: dict, name: str) -> dict[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def _image_size(tree: dict) -> int | None:
    """data.image_size, or what stands for it: the largest size of a group of views."""
    given = _number(_section(tree, "data").get("image_size"))
    groups = _section(tree, "views").get("groups")
    sizes = (
        [_number(group.get("size")) for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    )
    return given or max((size for size in sizes if size), default=None)


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else None
