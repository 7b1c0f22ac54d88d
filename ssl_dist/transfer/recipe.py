"""Train on top of a run's backbone by a paper's recipe, and test: what `probe` and `finetune` have in common.

The training is a run of its own in RUN/evaluations, with the loop of every run: on any number of ranks, stopped and
resumed at any step, with its log in TensorBoard. The network of its last step is tested, unless the user asks for the
best epoch, which is chosen by images held out of the training split and never by the test split.
"""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
from pydantic import Field

from ssl_dist import config
from ssl_dist.config import Config, NonNegativeFloat, PositiveFloat, PositiveInt, Section
from ssl_dist.distributed.signals import STOPPED, StopRequest
from ssl_dist.errors import RaisedOn, UserError
from ssl_dist.methods.base import SSLMethod
from ssl_dist.run.blueprint import derive
from ssl_dist.run.encoder import Encoder
from ssl_dist.storage import checkpoint
from ssl_dist.storage.durable import atomic_write_or_refuse
from ssl_dist.train.loop import train_in
from ssl_dist.transfer.classification import Classified, Crops, classify, draw
from ssl_dist.transfer.subject import EvalContext

ALL = 10**9  # checkpoints
CROP_AND_FLIP = {"random_resized_crop": {"scale": [0.08, 1.0], "ratio": [0.75, 4 / 3]}, "horizontal_flip": 0.5}


class Stopped(Exception):
    """Raised on every rank after a request to stop: the training is saved, and the same command resumes it."""


Epoch = Literal["last", "best"]
OPTIM_KEYS = ("epochs", "batch_size", "lr", "weight_decay")


class Overrides(Section):
    """Options that replace values of a recipe (null: the recipe's), and which epoch is tested."""

    epochs: PositiveInt | None = Field(None, description="null: the recipe's")
    batch_size: PositiveInt | None = Field(None, description="null: the recipe's")
    lr: PositiveFloat | None = Field(None, description="null: the recipe's; of finetune, the backbone's")
    weight_decay: NonNegativeFloat | None = Field(None, description="null: the recipe's")
    epoch: Epoch = Field(
        "last", description="that is tested; best: the one with the highest top-1 on the images of --validation"
    )


@dataclass(frozen=True)
class Recipe:
    """One paper's protocol. optim: section of a config; view: recipe of the training views, None: the test transform;
    options: of the method that is trained, methods/linear_probe.py or fine_tuning.py; crops: of a test image."""

    paper: str
    optim: dict
    view: dict | None = None
    options: dict = field(default_factory=dict)
    crops: Crops = 1

    def replaced(self, overrides: Overrides, crops: Crops | None = None, **options: object) -> "Recipe":
        """The recipe with those values of the overrides, and of the method's options, that are not null."""
        values = {name: value for name in OPTIM_KEYS if (value := getattr(overrides, name)) is not None}
        changed = {name: value for name, value in options.items() if value is not None}
        return Recipe(self.paper, self.optim | values, self.view, self.options | changed, crops or self.crops)

    @property
    def description(self) -> str:
        """The protocol in a few words."""
        optim = self.optim
        schedule = {"constant": "constant rate", "cosine": "cosine", "epoch_cosine": "cosine by epoch"}.get(
            optim.get("schedule", "constant"), f"a tenth of the rate after epochs {optim.get('milestone_epochs')}"
        )
        views = "test transform" if self.view is None else " and ".join(name.replace("_", " ") for name in self.view)
        return (
            f"{optim['name']}, rate {optim['lr']:g}, weight decay {optim.get('weight_decay', 0):g}, {schedule}, "
            f"{optim['epochs']} epochs of batches of {optim['batch_size']}, views: {views}"
        )


def tested(epoch: Epoch) -> str:
    """Which epoch is tested, for a protocol."""
    return "last epoch" if epoch == "last" else "the epoch with the highest top-1 on the images measured"


def train_and_classify(
    context: EvalContext, name: str, method: str, recipe: Recipe, epoch: Epoch = "last"
) -> Classified:
    """Train the method of this name by the recipe, or resume that training, and classify the test split.

    name: the evaluator's; epoch: the one that is tested, and kept. Raises `Stopped`, and `UserError` for a training
    that cannot run, and for the best epoch where the test split is measured.
    """
    if epoch == "best" and context.held_out is None:
        raise UserError(
            f"{name}.epoch = best: an epoch is not chosen by the test split; give --validation, and measure the head "
            f"that is kept by classify classify.head={context.run}/evaluations/{name}-...",
            RaisedOn.EVERY_RANK,
        )
    of_epoch = {} if epoch == "last" else {"epoch": epoch}
    digest = context.digest({"recipe": recipe.optim, "view": recipe.view, "options": recipe.options} | of_epoch)
    folder = context.run / "evaluations" / f"{name}-{digest}"
    world = context.world
    is_new = world.on_rank0(lambda: _prepare(folder, context))
    tree = _config_of(context, folder, method, recipe)
    if epoch == "best":
        tree["checkpoint"] = {"keep": ALL, "every_epochs": 1}
    settings = config.validate(config.Config, tree)
    try:
        plan = world.raise_together(lambda: derive(settings, world.rank_info))
    except UserError as error:
        if is_new:
            world.on_rank0(lambda: shutil.rmtree(folder))
        # The keys of the training are options of the evaluator here.
        message = str(error).replace("optim.", f"{name}.").replace("method.options.", f"{name}.")
        raise UserError(message, RaisedOn.EVERY_RANK) from None
    with StopRequest() as stop:
        code, training = train_in(world, context.watchdog, stop, plan)
    if code == STOPPED:
        raise Stopped(str(folder))
    if epoch == "best":
        classified = _best(context, folder, training.method, recipe)
    else:
        classified = classify(training.method, context.encoder, context, crops=recipe.crops)
    draw(classified, context, name, f"the {method.replace('_', ' ')} of {recipe.paper}")
    return classified


def _best(context: EvalContext, folder: Path, method: SSLMethod, recipe: Recipe) -> Classified:
    """What the epoch with the highest top-1 tells, of equal ones the first; the other checkpoints are removed."""
    world = context.world
    found = {}
    for step in world.on_rank0(lambda: checkpoint.steps(folder)):
        path = checkpoint.path_of(folder, step)
        checkpoint.restore(method, world.raise_together(partial(checkpoint.load, path))["method"], path)
        found[step] = classify(method, context.encoder, context, crops=recipe.crops)
    best = max(found, key=lambda step: (max(found[step].num_top1.values()), -step))
    world.on_rank0(lambda: checkpoint.keep_only(folder, best))
    return found[best]


def _prepare(folder: Path, context: EvalContext) -> bool:
    """Write the files that the training starts from: the backbone's weights and the ids of its images. Returns whether
    the folder is new."""
    is_new = not folder.exists()
    path = folder / "encoder.safetensors"
    if not path.exists():
        with atomic_write_or_refuse(path) as file:
            file.write(encoder_file(context.encoder))
    if context.train_ids is not None:
        with atomic_write_or_refuse(folder / "train_ids.txt") as file:
            file.write("".join(f"{i}\n" for i in context.train_ids).encode())
    return is_new


def encoder_file(encoder: Encoder) -> bytes:
    """The encoder's weights as a safetensors file, the same bytes for the same weights."""
    tensors = {key: value.cpu().contiguous() for key, value in encoder.module.state_dict().items()}
    return safetensors.torch.save(tensors)


def _config_of(context: EvalContext, folder: Path, method: str, recipe: Recipe) -> dict:
    """The config of the training."""
    dataset, ids = context.dataset, None if context.train_ids is None else str(folder / "train_ids.txt")
    data = {"name": dataset.name, "root": dataset.root, "reader": dataset.reader, "split": context.train, "subset": ids}
    tree = config_tree(context.encoder.config, data, folder, method, recipe)
    tree["views"]["normalize"] = config.to_tree(context.encoder.normalize)
    tree["backbone"]["weights"] = str(folder / "encoder.safetensors")
    return tree


def config_tree(run: Config, images: dict, folder: Path, method: str, recipe: Recipe) -> dict:
    """The config of a training on a run's backbone, without its weights. images: keys of the section data that say
    which are trained on."""
    data, view = run.data, recipe.view
    if view is None:  # the test transform
        view = {"resize": {"short_side": data.eval_resize or data.image_size, "interpolation": data.eval_interpolation}}
    return {
        "seed": run.seed,
        "run_dir": str(folder),
        "data": {
            **images, "image_size": data.image_size, "eval_resize": data.eval_resize, "workers": data.workers,
            "eval_interpolation": data.eval_interpolation,
        },
        "views": {"groups": [view]},
        "backbone": {"name": run.backbone.name, "patch_size": run.backbone.patch_size, "resize_pos_embed": True},
        "method": {"name": method, "options": recipe.options},
        "optim": recipe.optim,
        "precision": run.precision,
        "tf32": run.tf32,
        "channels_last": run.channels_last,
        "deterministic": run.deterministic,
        "timeout": run.timeout,
        "checkpoint": {"keep": 1},
    }  # fmt: skip
