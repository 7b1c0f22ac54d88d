"""A training on top of a run's backbone and its test: what the evaluators `probe` and `finetune` have in common.

The training is a run of its own in RUN/evaluations, by the loop of every other: on any number of ranks, stopped and
resumed at any step, with its log in TensorBoard. The network of its last step is tested, never the best one.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from pydantic import Field

from ssl_dist import config
from ssl_dist.config import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from ssl_dist.distributed.signals import STOPPED, StopRequest
from ssl_dist.errors import RaisedOn, UserError
from ssl_dist.run.blueprint import derive
from ssl_dist.run.encoder import Encoder
from ssl_dist.storage.durable import atomic_write_or_refuse
from ssl_dist.train.loop import train_in
from ssl_dist.transfer.classification import Classified, classify, draw
from ssl_dist.transfer.subject import EvalContext

CROP_AND_FLIP = {"random_resized_crop": {"scale": [0.08, 1.0], "ratio": [0.75, 4 / 3]}, "horizontal_flip": 0.5}


class Stopped(Exception):
    """The ranks were asked to stop; the training is saved and goes on with the same command."""


class Overrides(Section):
    """What may be changed of a recipe; null: as the recipe says."""

    epochs: PositiveInt | None = Field(None, description="null: the recipe's")
    batch_size: PositiveInt | None = Field(None, description="null: the recipe's")
    lr: PositiveFloat | None = Field(None, description="null: the recipe's; of finetune, the backbone's")
    weight_decay: NonNegativeFloat | None = Field(None, description="null: the recipe's")


@dataclass(frozen=True)
class Recipe:
    """One paper's protocol. optim: section of a config; view: recipe of the training views, None: the test transform;
    options: of the module in ssl_dist/transfer."""

    paper: str
    optim: dict
    view: dict | None = None
    options: dict = field(default_factory=dict)

    def changed(self, overrides: Overrides) -> "Recipe":
        given = {name: value for name in Overrides.model_fields if (value := getattr(overrides, name)) is not None}
        return Recipe(self.paper, self.optim | given, self.view, self.options)

    @property
    def words(self) -> str:
        """The protocol in a few words."""
        known = self.optim
        schedule = {"constant": "constant rate", "cosine": "cosine", "epoch_cosine": "cosine by epoch"}.get(
            known.get("schedule", "constant"), f"a tenth of the rate after epochs {known.get('milestone_epochs')}"
        )
        views = "test transform" if self.view is None else " and ".join(_words(self.view))
        return (
            f"{known['name']}, rate {known['lr']:g}, weight decay {known.get('weight_decay', 0):g}, {schedule}, "
            f"{known['epochs']} epochs of batches of {known['batch_size']}, views: {views}"
        )


def _words(view: dict) -> list[str]:
    return [name.replace("_", " ") for name in view]


def trained(subject: EvalContext, name: str, module: str, recipe: Recipe, options: dict) -> Classified:
    """Train `module` of ssl_dist/transfer by the recipe, or go on with it, and classify the test split.

    Raises `Stopped`, and `UserError` for what can not run.
    """
    digest = subject.digest({"recipe": recipe.optim, "view": recipe.view, "options": options})
    folder = subject.run / "evaluations" / f"{name}-{digest}"
    world = subject.world
    is_new = world.on_rank0(lambda: _prepare(folder, subject))
    settings = config.validate(config.Config, _tree(subject, folder, module, recipe, options))
    try:
        plan = world.raise_together(lambda: derive(settings, world.rank_info))
    except UserError as error:
        if is_new:
            world.on_rank0(lambda: shutil.rmtree(folder))
        # The keys of the training are options of the evaluator here.
        message = str(error).replace("optim.", f"{name}.").replace("method.options.", f"{name}.")
        raise UserError(message, RaisedOn.EVERY_RANK) from None
    with StopRequest() as stop:
        code, training = train_in(world, subject.watchdog, stop, plan)
    if code == STOPPED:
        raise Stopped(str(folder))
    threads = world.rank_info.cores
    found = classify(training.method, subject.encoder, subject.source, subject.test, world, threads, subject.test_ids)
    draw(found, subject, name, f"the {module.replace('_', ' ')} of {recipe.paper}")
    return found


def _prepare(folder: Path, subject: EvalContext) -> bool:
    """The backbone's weights as a file of the training, which begins from it like any from given weights. Returns
    whether the folder is new."""
    is_new = not folder.exists()
    path = folder / "encoder.safetensors"
    if not path.exists():
        with atomic_write_or_refuse(path) as file:
            file.write(encoder_file(subject.encoder))
    if subject.train_ids is not None:
        with atomic_write_or_refuse(folder / "train_ids.txt") as file:
            file.write("".join(f"{i}\n" for i in subject.train_ids).encode())
    return is_new


def encoder_file(encoder: Encoder) -> bytes:
    """The encoder's weights as a safetensors file, the same bytes for the same weights."""
    tensors = {key: value.cpu().contiguous() for key, value in encoder.module.state_dict().items()}
    return safetensors.torch.save(tensors)


def _tree(subject: EvalContext, folder: Path, module: str, recipe: Recipe, options: dict) -> dict:
    """The config of the training."""
    run, source = subject.encoder.config, subject.source
    data = run.data
    view = recipe.view
    if view is None:  # the test transform
        view = {"resize": {"short_side": data.eval_resize or data.image_size, "interpolation": data.eval_interpolation}}
    return {
        "seed": run.seed,
        "run_dir": str(folder),
        "data": {
            "name": source.name, "root": source.root, "reader": source.reader, "split": subject.train,
            "image_size": data.image_size, "eval_resize": data.eval_resize, "workers": data.workers,
            "eval_interpolation": data.eval_interpolation,
            "subset": None if subject.train_ids is None else str(folder / "train_ids.txt"),
        },
        "views": {"normalize": config.to_tree(subject.encoder.normalize), "groups": [view]},
        "backbone": {"name": run.backbone.name, "weights": str(folder / "encoder.safetensors")},
        "method": {"name": module, "options": recipe.options | options},
        "optim": recipe.optim,
        "precision": run.precision,
        "channels_last": run.channels_last,
        "deterministic": run.deterministic,
        "timeout": run.timeout,
        "checkpoint": {"keep": 1},
    }  # fmt: skip
