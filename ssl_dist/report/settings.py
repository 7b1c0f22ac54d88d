"""The config of runs on a page: what it sets, what it leaves as it is, what differs; how a run was started."""

from collections.abc import Sequence

from ssl_dist import config
from ssl_dist.config import Config
from ssl_dist.report.markup import Html, count, element, joined, table
from ssl_dist.report.run import Run
from ssl_dist.run import folder as run_folder

_REQUIRED = ("run_dir", "data.name", "data.root", "method.name")  # what has no default, or decides on the others


def keys(run: Run) -> Html:
    """The keys that the config sets, with their defaults; folded away those that it leaves as they are."""
    own, usual = _spelt_out(run.config), _defaults(run.config)
    changed = [key for key in own if key not in usual or usual[key] != own[key]]
    rows = [[_key(key), shown(own[key]), shown(usual[key]) if key in usual else "–"] for key in changed]
    others = [[_key(key), shown(value)] for key, value in own.items() if key not in changed]
    return joined(
        _folded(f"{count(rows, 'key')} set", table(["key", "value", "default"], rows), is_open=True),
        _folded(f"{count(others, 'key')} at the default", table(["key", "value"], others)),
    )


def differences(runs: Sequence[Run], heads: list[Html]) -> Html:
    """The keys whose values differ, a column a run, and how many are the same."""
    trees = [_spelt_out(run.config) for run in runs]
    rows, same = [], 0
    for key in dict.fromkeys(key for tree in trees for key in tree):
        cells = [shown(tree[key]) if key in tree else "–" for tree in trees]
        if len(set(cells)) == 1:
            same += 1
        else:
            rows.append([_key(key), *cells])
    rest = element("p", f"{same} other keys are the same.", class_="none")
    return joined(table(["key", *heads], rows) if rows else None, rest)


def shown(value: object) -> str:
    """A value of the config as YAML has it, without the noise of floats."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def starts(run: Run) -> Html | None:
    """When, where and on how many ranks the run was started."""
    if not run.starts:
        return None
    names = ("time", "host", "world_size", "step")
    rows = [
        [*(str(start.get(name, "")) for name in names), str(start["versions"].get("torch", ""))] for start in run.starts
    ]
    return _folded(count(rows, "start"), table(["time", "host", "ranks", "after step", "torch"], rows))


def _key(name: str) -> Html:
    return element("th", element("code", name), scope="row")


def _folded(summary: str, content: Html, is_open: bool = False) -> Html:
    return element("details", element("summary", summary), content, open=is_open)


def _spelt_out(settings: Config) -> dict[str, object]:
    """Every key of the config, those of the method's options too, with dots."""
    return _flat(run_folder.spelt_out(settings))


def _defaults(settings: Config) -> dict[str, object]:
    """The same keys, as far as they have a default."""
    required = {
        "run_dir": "-",
        "data": {"name": settings.data.name, "root": "-"},
        "method": {"name": settings.method.name},
    }
    defaults = _spelt_out(config.validate(Config, required))
    return {key: value for key, value in defaults.items() if key not in _REQUIRED}


def _flat(tree: dict | list, prefix: str = "") -> dict[str, object]:
    """Keys with dots; a list of sections counts its items (views.groups.0.size)."""
    flat: dict[str, object] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        has_sections = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        deeper = isinstance(value, dict) or has_sections
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat
