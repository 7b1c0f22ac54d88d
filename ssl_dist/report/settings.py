"""The config on a page: the keys that it sets, those at their defaults, and those that differ between runs."""

from collections.abc import Sequence

from ssl_dist import config
from ssl_dist.config import Config
from ssl_dist.report.run import Run
from ssl_dist.report.varied import keys_of, shown

_REQUIRED = ("run_dir", "data.name", "data.root", "method.name")  # what has no default, or decides on the others


def keys(run: Run) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Key, value and default of the keys that the config sets; key and value of those that it leaves as they are."""
    own, usual = keys_of(run.config), _defaults(run.config)
    changed = [key for key in own if key not in usual or usual[key] != own[key]]
    rows = [(key, shown(own[key]), shown(usual[key]) if key in usual else "–") for key in changed]
    return rows, [(key, shown(value)) for key, value in own.items() if key not in changed]


def differences(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str]]], int]:
    """The keys whose values differ, with a value a run, but for the run's folder; how many others there are."""
    trees = [keys_of(run.config) for run in runs]
    rows = [
        (key, [shown(tree[key]) if key in tree else "–" for tree in trees])
        for key in dict.fromkeys(key for tree in trees for key in tree if key != "run_dir")
    ]
    different = [(key, values) for key, values in rows if len(set(values)) > 1]
    return different, len(rows) - len(different)


def _defaults(settings: Config) -> dict[str, object]:
    """The same keys, as far as they have a default."""
    required = {
        "run_dir": "-",
        "data": {"name": settings.data.name, "root": "-"},
        "method": {"name": settings.method.name},
    }
    defaults = keys_of(config.validate(Config, required))
    return {key: value for key, value in defaults.items() if key not in _REQUIRED}
