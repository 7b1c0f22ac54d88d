"""The plugins of a config: loaded, pinned to what they are, and found again by what a run has recorded of them."""

import contextlib
from pathlib import Path

from ssl_dist import plugins
from ssl_dist.config import Config, PluginFile, load
from ssl_dist.distributed.world import World
from ssl_dist.errors import RaisedOn, UserError


def pinned(config: Config) -> Config:
    """The config with its plugins loaded, each recorded by its absolute path and SHA-256; and with that of the method
    or the backbone, where it was loaded by other means.

    A file that is recorded already must be what it was, where the method or the backbone is of it. Raises `UserError`.
    """
    files = dict(config.plugins)
    for name, given in files.items():
        if given.sha256 is None:
            plugins.load(name, given.file)
        else:
            plugins.load_recorded(name, given.file, given.sha256, "the config", plugins.ANEW)
    require_recorded(config, "the config", plugins.ANEW)
    for name in [*files, *used(config)]:
        if (file := plugins.file(name)) is not None:
            files[name] = PluginFile(file=str(file.path), sha256=file.sha256)
    return config.model_copy(update={"plugins": files}) if files else config


def recall(config: Config, record: Path, folder: Path) -> None:
    """Load what a run has recorded; files that are gone or have changed are missed where something of them is asked
    for. record: the file that says it; folder: the run's."""
    for name, given in config.plugins.items():
        if given.sha256 is not None:
            plugins.load_recorded(name, given.file, given.sha256, str(record), plugins.AS_IT_IS, folder)


def recall_run(run: Path) -> None:
    """The same by RUN/config.yaml, where there is a whole one: before the checkpoint is read, which says it too."""
    path = run / "config.yaml"
    with contextlib.suppress(UserError):
        recall(load(path), path, run)


def used(config: Config) -> list[str]:
    """The names of the files that the method and the backbone are of."""
    files = [
        plugins.file_of(plugins.METHODS, config.method.name),
        plugins.file_of(plugins.BACKBONES, config.backbone.name),
    ]
    return [*dict.fromkeys(name for name in files if name is not None)]


def require_recorded(config: Config, record: str, remedy: str = plugins.AS_IT_IS) -> None:
    """Raises `UserError` when a file that method or backbone are of is loaded as another than the recorded one, unless
    it was chosen as it is. record, remedy: for the message."""
    for name in used(config):
        given, file = config.plugins.get(name), plugins.file(name)
        assert file is not None, "a file that is used is loaded"
        if given is None or given.sha256 in (None, file.sha256) or plugins.is_chosen(name):
            continue
        raise UserError(plugins.changed(given.file, record, remedy))


def require_same(world: World) -> None:
    """Raises `UserError` on all ranks when they have loaded different files."""
    (first_rank, first), *others = world.all_gather_object((str(world.rank_info), plugins.hashes()))
    for rank, of_rank in others:
        for name in sorted(first.keys() | of_rank.keys()):
            if first.get(name) != of_rank.get(name):
                raise UserError(
                    f"plugins.{name}: {first_rank} has {_short(first.get(name))}, {rank} has "
                    f"{_short(of_rank.get(name))}; give all ranks the same file",
                    RaisedOn.EVERY_RANK,
                )


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else f"one of SHA-256 {sha256[:12]}"
