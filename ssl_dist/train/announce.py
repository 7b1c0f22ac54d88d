"""What `ssl-dist train` says when it begins, and where a complete run goes next."""

import shlex

import torch

from ssl_dist.results import suggestion
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.run.folder import spans_training
from ssl_dist.train import advice
from ssl_dist.train.state import TrainState
from ssl_dist.views import shown


def beginning(run: TrainState) -> str:
    """Lines: what is trained on what and where, and from which step; then the warnings."""
    plan, config, clock = run.plan, run.config, run.clock
    if clock.done and clock.step:
        return f"{plan.run}: is complete, {clock.total_steps} steps; nothing is left to train. {_prolong(plan)}"
    used, split = len(plan.order.train_ids), plan.split
    part = "" if used == split.count else f" of {split.count:,}"
    classes = f"{len(split.classes)} classes" if split.labelled else "no labels"
    groups = " + ".join(f"{spec.num} of {spec.size} px" for spec in plan.specs)
    device = torch.cuda.get_device_name(run.world.device) if run.world.device.type == "cuda" else "the CPU"
    size, grid = plan.rank_info.world_size, plan.grid
    shards = "" if size == 1 else f" ({grid.images} image x {grid.views} view shards)"
    nodes = "" if size == plan.rank_info.local_world_size else f", {plan.rank_info.local_world_size} on a node"
    lines = {
        "train": f"{config.method.name} on {config.backbone.name}, views of an image: {groups}",
        "images": f"{plan.dataset.name}, split {split.split}: {used:,}{part}, {classes}; {config.data.root}",
        "ranks": f"{size}{shards}{nodes} on {device}, {config.precision}",
        "length": "the weights are written as they are drawn",
        "folder": f"{plan.run}: {f'resumes after step {clock.step}' if clock.step else 'new'}",
    }
    if not split.pixels.is_rgb:
        normalize = "those of dataset.json" if config.views.normalize == "dataset" else str(config.views.normalize)
        lines["pixels"] = f"{split.pixels}, normalised by mean and std: {normalize}; {shown.words(split.pixels)}"
    if config.plugins:
        lines["plugins"] = ", ".join(plugin.file for plugin in config.plugins.values())
    if clock.total_steps:
        options, plural = config.optim, "s" if clock.total_steps > 1 else ""
        lines["length"] = (
            f"{clock.total_steps} step{plural} = {clock.total_epochs:.4g} epochs of {options.batch_size} images a "
            f"step; {options.name}, rate {options.peak_lr:g}"
        )
    text = [f"{name:<8}{line}" for name, line in lines.items()]
    return "\n".join([*text, *(f"warning: {doubt}" for doubt in advice.warnings(plan, run.world.device.type == "cpu"))])


def _prolong(plan: RunPlan) -> str:
    optim = plan.config.optim
    if what := spans_training(plan.config):
        return f"Its length is that of {what}: a longer training needs another run_dir"
    length = f"optim.epochs={2 * optim.epochs}" if optim.epochs else f"optim.steps={2 * (optim.steps or 0)}"
    return f"To go on: {length}; to start anew: another run_dir"


def ending(plan: RunPlan) -> str:
    """Lines: where the complete run lies, and the commands that go on from there."""
    run = shlex.quote(str(plan.run))
    commands = [_measure(plan, run), f"ssl-dist report {run}", f"tensorboard --logdir {run}"]
    return "\n".join([f"{plan.run}: complete; next", *(f"  {command}" for command in commands)])


def _measure(plan: RunPlan, run: str) -> str:
    """The command that measures the run, by the splits and labels that there are."""
    words = suggestion.evaluators(plan.dataset.labelled, plan.dataset.uses, ["knn"])
    return f"ssl-dist evaluate {run} {shlex.join(words)}"
