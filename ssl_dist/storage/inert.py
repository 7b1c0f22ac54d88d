"""Objects in files of others that are no tensors or plain values (argparse.Namespace, pathlib.Path, parts of omegaconf,
numpy and Lightning): each becomes a stub that holds what the file says of it and does nothing. No class of a file is
imported, so none of its code runs.

`torch.load(weights_only=True)` builds objects of its own short list of classes and of those that it is given beside.
It is given the stubs, under the names that the file has for the real classes; what it allows by itself it takes first.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

# The classes and functions that torch builds without being told: its own, and these.
_PLAIN = {
    "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.complex",
    "builtins.bytearray",
}  # fmt: skip


class Inert:
    """An object whose class is not loaded. state: what pickle would have given its __setstate__."""

    state: Any = None

    def __new__(cls, *_: object) -> "Inert":
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


def _new_dictionary(_: type, *__: object) -> OrderedDict[Any, Any]:
    return OrderedDict()


def _new_list(_: type, *__: object) -> list[Any]:
    return []


# torch's unpickler adds items to these types only, not to classes made from them.
_MAKERS: Mapping[str, Callable[..., Any]] = {"items": _new_dictionary, "elements": _new_list}


def is_torchs(name: str) -> bool:
    """Whether torch may build what a file calls by this name itself, so that it is no stub."""
    module, _, last = name.rpartition(".")
    is_rebuilding = module in ("torch._utils", "torch._tensor", "torch.nn.parameter", "torch.serialization")
    is_typed = module.startswith("torch.") and last.endswith(("Storage", "Tensor"))
    return name in _PLAIN or module == "torch" or is_rebuilding or is_typed


def stubs(names: Mapping[str, str]) -> list[Any]:
    """A class for each name, which torch is to take for the one of that name. names: of the file's classes, with what
    the file does to their objects: "items" (a dictionary's), "elements" (a list's), or nothing of the two."""
    made = []
    for name, filled in names.items():
        module, _, last = name.rpartition(".")
        body: dict[str, Any] = {"__module__": module, "__qualname__": last}
        if filled:
            body["__new__"] = _MAKERS[filled]
        made.append(type(last, (Inert,), body))
    return made
