"""Check before the first step that all ranks have the same program, config and images, and one file system."""

import hashlib
import os
import secrets
import time
from pathlib import Path

from ssl_dist import config
from ssl_dist.distributed.heartbeat import archive_exit_reports
from ssl_dist.distributed.world import World
from ssl_dist.errors import RaisedOn, UserError, quoted
from ssl_dist.numba_cache import PACKAGE
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.run.folder import differences, flat
from ssl_dist.storage import checkpoint

LOCAL_KEYS = ("data.root", "data.reader", "data.workers")  # keys that may differ from node to node
VISIBLE_TIMEOUT_S = 30.0  # in which a file made on one node must be seen on the others (NFS caches attributes)


def agree(plan: RunPlan, world: World) -> str:
    """A name of this start, the same on all ranks. Raises `UserError` on all of them when they differ.

    Compared are the program, its libraries, the config and the images trained on; then every rank must see a file that
    the first one writes to RUN/logs.
    """
    facts_of_ranks = world.all_gather_object((str(world.rank_info), _facts(plan)))
    first_name, first = facts_of_ranks[0]
    for name, facts in facts_of_ranks[1:]:
        for key, of_first, of_other in differences(first, facts):
            raise UserError(
                f"{key}: {first_name} has {quoted(of_first)}, {name} has {quoted(of_other)}; "
                "start all ranks with the same program, config and data",
                RaisedOn.EVERY_RANK,
            )
    logs = plan.run / "logs"
    start = world.on_rank0(lambda: _begin(logs))
    visible = world.all_gather_object(_appears(_token(logs, start)))
    world.on_rank0(lambda: _token(logs, start).unlink())
    blind = [name for (name, _), sees in zip(facts_of_ranks, visible, strict=True) if not sees]
    if blind:
        raise UserError(
            f"run_dir = {quoted(str(plan.run))}: {', '.join(blind[:4])} cannot see what {first_name} writes there; "
            "choose a folder on a file system that all nodes share",
            RaisedOn.EVERY_RANK,
        )
    return start


def _facts(plan: RunPlan) -> dict[str, object]:
    tree = config.to_tree(plan.config)
    tree["plugins"] = {name: plugin["sha256"] for name, plugin in tree["plugins"].items()}  # wherever it lies
    settings = {key: value for key, value in flat(tree).items() if key not in LOCAL_KEYS}
    settings["run_dir"] = os.path.abspath(plan.run)
    sources = sorted(PACKAGE.rglob("*.py"))
    program = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    normalize = {"mean and std": config.to_tree(plan.normalize)}
    images = {f"images ({key})": value for key, value in plan.data_identity.items()}
    return settings | normalize | images | checkpoint.versions() | {"program": program}


def _token(logs: Path, start: str) -> Path:
    return logs / f".start-{start}"


def _begin(logs: Path) -> str:
    """Clear RUN/logs of what earlier starts left, and make the file that all ranks must see."""
    (logs / "board").mkdir(exist_ok=True)
    for record in (logs / "board").iterdir():
        record.unlink()
    archive_exit_reports(logs)
    for token in logs.glob(".start-*"):
        token.unlink()  # of a start that was killed
    start = secrets.token_hex(8)
    _token(logs, start).touch()
    return start


def _appears(path: Path) -> bool:
    end = time.monotonic() + VISIBLE_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes an NFS client ask the server again
    return True
