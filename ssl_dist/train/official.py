"""A run that goes on where one of relational reasoning's official code stopped: backbone, head and optimizer of an
archive of it become a checkpoint of a new run, which `ssl-dist train` resumes."""

import re
from pathlib import Path
from typing import Any

import torch

from ssl_dist.config import Config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import StopRequest
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.run.blueprint import derive
from ssl_dist.storage import checkpoint, weights, weights_file
from ssl_dist.storage.formats import SEED_PARTS
from ssl_dist.train.loop import claimed
from ssl_dist.train.state import TrainState


def take_over(file: Path, config: Config, epoch: int | None) -> Path:
    """Write the checkpoint of a run of this config after `epoch` epochs (None: as the file's name says, the official
    code's `..._epoch_<n>.tar`); returns its path. Raises `UserError`, before anything is written, where the file lacks
    a part or does not fit, and where the run exists."""
    if epoch is None:
        named = re.search(r"epoch_(\d+)", file.name)
        if named is None:
            raise UserError(f"{file}: its name tells no epoch; give --epoch")
        epoch = int(named[1])
    plan, world = derive(config, RankInfo()), one_process()
    step = epoch * plan.order.steps_per_epoch
    if checkpoint.steps(plan.run):
        raise UserError(f"run_dir = {plan.run}: holds a run; choose another folder")
    if not 0 < step <= plan.clock().total_steps:
        raise UserError(
            f"--epoch {epoch}: the training has {plan.clock().total_epochs:g} epochs; give one of these, or a longer "
            "training (optim.epochs)"
        )
    tree, _ = weights_file.read(file)
    if not isinstance(tree, dict):
        raise UserError(
            f"{file}: is no dictionary of backbone, head and optimizer; give an archive of the official code"
        )
    run = TrainState(plan, world)
    fitted = weights.fit(run.method.backbone, config.backbone.name, file)
    if fitted.adapted:
        raise UserError(
            f"{file}: goes on with the images that it was trained on; give their data.root, or begin a new run by "
            f"backbone.weights={file}"
        )
    run.method.backbone.load_state_dict(fitted.tensors)
    for part, key in SEED_PARTS.items():
        if hasattr(run.method, part):
            head = getattr(run.method, part)
            checkpoint.check_fits(head, _part(tree, key, file), file)
            head.load_state_dict(tree[key])
    checkpoint.restore_optimizer(run.optimizer, _optimizer(tree, run.optimizer, file), file)
    run.clock = plan.clock(step)
    with claimed(plan, world):
        run.save(run.clock, StopRequest())
    return checkpoint.path_of(plan.run, step)


def _part(tree: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    if not isinstance(tree.get(key), dict):
        raise UserError(f"{file}: lacks {key}; give an archive that the official code wrote, with all its parts")
    return tree[key]


def _optimizer(tree: dict[str, Any], optimizer: torch.optim.Optimizer, file: Path) -> dict[str, Any]:
    """The state of the official optimizer, which has a group for the backbone and one for the head, as that of ours,
    which has one. Both count their parameters in this order; old versions of torch kept the steps as a number."""
    state = _part(tree, "optimizer", file).get("state", {})
    kept = {number: dict(of_one) for number, of_one in state.items()}
    for of_one in kept.values():
        if isinstance(of_one.get("step"), int | float):
            of_one["step"] = torch.tensor(float(of_one["step"]))
    return {"state": kept, "param_groups": optimizer.state_dict()["param_groups"]}
