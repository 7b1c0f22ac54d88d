"""The config on a page: the keys that it sets, those at their defaults, and those that differ between runs."""

from collections.abc import Sequence

from ssl_dist import config
from ssl_dist.config import Config
from ssl_dist.report.run import Run
from ssl_dist.run import folder as run_folder

_REQUIRED = ("run_dir", "data.name", "data.root", "method.name")  # what has no default, or decides on the others


def keys(run: Run) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Key, value and default of the keys that the config sets; key and value of those that it leaves as they are."""
    own, usual = _spelt_out(run.config), _defaults(run.config)
    changed = [key for key in own if key not in usual or usual[key] != own[key]]
    rows = [(key, shown(own[key]), shown(usual[key]) if key in usual else "–") for key in changed]
    return rows, [(key, shown(value)) for key, value in own.items() if key not in changed]


def differences(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str]]], int]:
    """The keys whose values differ, with a value a run; how many others there are."""
    trees = [_spelt_out(run.config) for run in runs]
    rows = [
        (key, [shown(tree[key]) if key in tree else "–" for tree in trees])
        for key in dict.fromkeys(key for tree in trees for key in tree)
    ]
    different = [(key, values) for key, values in rows if len(set(values)) > 1]
    return different, len(rows) - len(different)


def shown(value: object) -> str:
    """A value of the config as YAML has it, without the noise of floats."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _spelt_out(settings: Config) -> dict[str, object]:
    """Every key of the config with dots, those of the method's options and of each group of views, too."""
    tree = run_folder.spelt_out(settings)
    tree["views"]["groups"] = dict(enumerate(tree["views"]["groups"]))
    return {key: value for key, value in run_folder.flat(tree).items() if value != {}}


def _defaults(settings: Config) -> dict[str, object]:
    """The same keys, as far as they have a default."""
    required = {
        "run_dir": "-",
        "data": {"name": settings.data.name, "root": "-"},
        "method": {"name": settings.method.name},
    }
    defaults = _spelt_out(config.validate(Config, required))
    return {key: value for key, value in defaults.items() if key not in _REQUIRED}
