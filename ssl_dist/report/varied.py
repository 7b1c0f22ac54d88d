"""What was varied between runs: the keys of their configs that differ, and names for runs made of them."""

from collections.abc import Sequence

from ssl_dist.config import Config
from ssl_dist.run import folder as run_folder

_SHORT = {"views.num": "K", "data.name": "trained on", "method.name": "method", "backbone.name": "backbone"}
FAMILY = ("method.name", "backbone.name", "data.name")
MAX_KEYS = 6  # that name a group of runs in a table
MAX_LABEL = 40  # letters; a longer one names a run no better than its folder does


def keys_of(settings: Config) -> dict[str, object]:
    """Every key of the config with dots, those of the method's options and of each group of views, too."""
    tree = run_folder.spelt_out(settings)
    tree["views"]["groups"] = dict(enumerate(tree["views"]["groups"]))
    return {key: value for key, value in run_folder.flat(tree).items() if value != {}}


def compared(settings: Config) -> dict[str, object]:
    """Those that must be equal in the runs of a mean over seeds. Two files of weights may be one, but nothing here
    proves it."""
    keys = keys_of(settings)
    return {
        key: value
        for key, value in keys.items()
        if key != "seed" and (key == "backbone.weights" or not run_folder.is_free(key))
    }


def varied(trees: Sequence[dict[str, object]]) -> list[str]:
    """The keys that were varied: method, backbone and data set where they differ, and what differs between two that
    have these in common; what comes with another method, such as its options, is no choice of its own."""
    families: dict[str, list[dict[str, object]]] = {}
    for tree in trees:
        families.setdefault(repr([tree.get(key) for key in FAMILY]), []).append(tree)
    found = [key for key in FAMILY if _differ(key, trees)]
    for family in families.values():
        keys = dict.fromkeys(key for tree in family for key in tree)  # one in the middle may have keys of its own
        found += [key for key in keys if key not in found and _differ(key, family)]
    return found


def _differ(key: str, trees: Sequence[dict[str, object]]) -> bool:
    return len({repr(tree.get(key)) for tree in trees}) > 1


def head(key: str) -> str:
    """What stands above the values of a key: the field's word where there is one."""
    return _SHORT.get(key, key)


def shown(value: object) -> str:
    """A value of the config as YAML has it, without the noise of floats."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def named(values: dict[str, object]) -> str:
    """A group of runs by its values: K = 4, optim.lr = 0.1."""
    return ", ".join(f"{head(key)} = {shown(value)}" for key, value in values.items())


def labels(configs: Sequence[Config]) -> list[str] | None:
    """A short name for each of several runs: what was varied, and the seed where it differs. None where that tells them
    not apart, is long, or where methods, backbones or data sets are compared."""
    trees = [compared(settings) for settings in configs]
    keys, seeds = varied(trees), len({settings.seed for settings in configs}) > 1
    if set(keys) & set(FAMILY):
        return None
    found = []
    for settings, tree in zip(configs, trees, strict=True):
        of_run = named({key: tree.get(key) for key in keys})
        found.append(", ".join([*([of_run] if of_run else []), *([f"seed {settings.seed}"] if seeds else [])]))
    return found if len(set(found)) == len(found) and max(map(len, found)) <= MAX_LABEL else None
