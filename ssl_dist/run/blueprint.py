"""The plan of a run: all that derives from its config before a rank is started. `explain` prints it, `train` runs it.

Every mistake that can be seen without starting a rank is refused here, so it costs seconds and exit code 2.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ssl_dist import backbones, grid, methods, views
from ssl_dist.clock import Clock
from ssl_dist.config import Config, Normalize, Section
from ssl_dist.data import labels
from ssl_dist.data.plan import DataOrder, from_list, limited, per_class
from ssl_dist.data.reader import Reader, SplitInfo
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError, first_line, quoted
from ssl_dist.methods.base import Info, SSLMethod
from ssl_dist.nn import batchnorm, recompute
from ssl_dist.nn.backbone import Backbone, TokenBackbone
from ssl_dist.nn.shapes import without_values
from ssl_dist.run import network, plugged
from ssl_dist.storage import weights


@dataclass(frozen=True)
class RunPlan:
    """A config with the method's class and options, the data set, the grid of ranks and the order of images."""

    config: Config
    rank_info: RankInfo
    method_class: type[SSLMethod]
    options: Section
    dataset: Dataset
    split: SplitInfo
    labels: np.ndarray | None = None  # int64 [images of the split], where they are not the split's own

    @property
    def run(self) -> Path:
        return Path(self.config.run_dir)

    @cached_property
    def num_views(self) -> int:
        """K."""
        configured = self.config.num_views
        fixed: int | None = getattr(self.method_class, "num_views", None)
        if fixed is None:
            if configured is None:
                raise UserError(
                    "views.num = None: this method leaves the number of views to you; set views.num=32, say"
                )
            return configured
        if self.method_class.free_views and configured is not None:
            return configured
        if configured not in (None, fixed):
            raise UserError(
                f"views.num = {configured}: method {self.config.method.name} uses {fixed} views; set views.num=null"
            )
        return fixed

    @cached_property
    def specs(self) -> list[views.ViewSpec]:
        config, pixels = self.config, self.split.pixels
        return views.view_specs(config.views.groups, self.num_views, config.data.image_size, pixels)

    @cached_property
    def grid(self) -> grid.Grid:
        return grid.choose(
            self.config.data.view_shards,
            self.rank_info.world_size,
            self.rank_info.local_world_size,
            self.config.optim.batch_size,
            [spec.num for spec in self.specs],
            self.method_class.free_views,
            self.config.method.name,
        )

    @cached_property
    def order(self) -> DataOrder:
        data, count = self.config.data, self.split.count
        if data.subset is None:
            ids = limited(count, data.limit)
        else:
            if isinstance(data.subset, str):
                ids = from_list(data.subset, count)
            else:
                classes = self.dataset.labels(self.split.split)  # the split's own, also where labels come from a file
                ids = per_class(np.arange(count, dtype=np.int64), classes, data.subset.per_class, data.subset.start)
            ids = ids[limited(len(ids), data.limit)]
        return DataOrder(ids, self.config.optim.batch_size, self.config.seed)

    @property
    def data_identity(self) -> dict[str, str]:
        """What must be the same on a resume: the samples of the split, which of them are trained on, and the files of
        labels and weights."""
        identity = {"split": self.split.sha256, "ids": hashlib.sha256(self.order.train_ids.tobytes()).hexdigest()}
        if self.labels is not None:
            identity["labels"] = hashlib.sha256(self.labels.tobytes()).hexdigest()
        if self.initial_weights is not None:
            identity["weights"] = self.initial_weights.sha256
        return identity

    @property
    def class_names(self) -> list[str] | None:
        """What the outputs of a classifier stand for; None: for numbers of a file of labels."""
        return list(self.split.classes) if self.labels is None else None

    @cached_property
    def initial_weights(self) -> weights.Weights | None:
        """The file that the backbone begins from, without its tensors. None: it begins from random ones."""
        if self.config.backbone.weights is None:
            return None
        with without_values():
            backbone = network.build_backbone(self.config, self.split.pixels.channels)
        return replace(network.initial_weights(backbone, self.config.backbone), tensors={})

    def clock(self, step: int = 0) -> Clock:
        """`step` steps into the training. A method that does not train has none ahead of it."""
        options, per_epoch = self.config.optim, self.order.steps_per_epoch
        total = options.steps
        if total is None:
            assert options.epochs is not None, "a config gives one of the two"
            total = options.epochs * per_epoch
        return Clock(step, per_epoch, total if self.method_class.trainable else 0)

    @cached_property
    def normalize(self) -> Normalize:
        """Mean and standard deviation of pixels in [0, 1] that views and test images are normalised with."""
        return normalization(self.config, self.split)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images; bf16 is a matter of autocast."""
        return torch.float64 if self.config.precision == "fp64" else torch.float32

    @property
    def threads(self) -> int:
        """Threads that decode images and make views on this rank: its share of the cores."""
        workers = self.config.data.workers
        return self.rank_info.cores if workers == "auto" else workers

    def open_reader(self) -> Reader:
        reader = self.dataset.open(self.split.split)
        if self.labels is not None:
            reader.replace_labels(self.labels)
        return reader

    @cached_property
    def info(self) -> Info:
        return Info(
            num_images=len(self.order.train_ids),
            num_classes=len(self.split.classes) if self.split.labelled else 0,
            view_groups=tuple((spec.num, spec.size) for spec in self.specs),
            batch_size=self.config.optim.batch_size,
            total_epochs=self.clock().total_epochs,
            steps_per_epoch=self.order.steps_per_epoch,
            seed=self.config.seed,
            channels=self.split.pixels.channels,
        )

    def build(self) -> SSLMethod:
        """The method on its backbone with initial weights, equal on every rank: a function of the seed, and the
        backbone's of `backbone.weights` where given."""
        file = None if self.initial_weights is None else self.initial_weights.path
        method = network.build_method(self.config, self.method_class, self.options, self.info, file).to(self.dtype)
        name = self.config.backbone.name
        if self.config.backbone.recompute:
            recompute.by_blocks(method.backbone, name)
        if self.config.optim.accumulate > 1:
            recompute.in_parts(method.backbone, name, self.config.optim.accumulate)
        return method


def derive(config: Config, rank_info: RankInfo, dataset: Dataset | None = None) -> RunPlan:
    """The plan of `config`, its data set named, on this rank. dataset: None for that of `data.root`. Raises `UserError`
    for everything that can not run."""
    config = plugged.pinned(config)
    method_class = methods.find(config.method.name)
    options = methods.build_options(method_class, config.method.options, _reset(config, method_class))
    own = config.backbone
    backbones.check(own.name, own.zero_init_residual, own.patch_size, own.drop_path)
    if dataset is None:
        dataset = Dataset(config.data.root, config.data.name, config.data.reader)
    if config.data.name is None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"name": dataset.name})})
    # Without labels a method trains on everything there is.
    split_name = config.data.split or (dataset.uses.training if method_class.needs_labels else dataset.uses.pretraining)
    labels_file, own_labels = config.data.labels, None
    if method_class.needs_labels and labels_file is None:
        _require_labels(config, dataset, split_name)
    split = dataset.info(split_name)
    if labels_file is not None:
        own_labels = labels.read(labels_file.file, labels_file.column, split.count)
        classes = tuple(map(str, range(own_labels.max() + 1)))
        split = replace(split, classes=classes, labelled=bool((own_labels >= 0).any()))
        if method_class.needs_labels and not split.labelled:
            raise UserError(f"data.labels.file: {labels_file.file} has no label, and {config.method.name} needs them")
    plan = RunPlan(config, rank_info, method_class, options, dataset, split, own_labels)
    # Each raises what it refuses.
    _ = plan.num_views, plan.specs, plan.grid, plan.order, plan.normalize, plan.initial_weights
    train_ids = plan.order.train_ids
    if labels_file is not None and own_labels is not None and method_class.needs_labels:
        missing = train_ids[own_labels[train_ids] < 0]
        if len(missing):
            raise UserError(
                f"data.labels.file: {labels_file.file} has no label for {len(missing)} of the images to train on, "
                f"image {missing[0]} for one; add them, or choose the others by data.subset"
            )
    if dataset.is_converted:
        with plan.open_reader():
            pass  # a missing FFCV or a damaged file shows now
    with without_values():  # what the method or the backbone refuses shows now, and no memory is taken
        method = plan.build().eval()
        if rank_info.world_size > 1:
            batchnorm.refuse_others(method)
        for size in dict.fromkeys(spec.size for spec in plan.specs):
            try_size(method.backbone, size, config.backbone.name, "views")
        try_size(method.backbone, config.data.image_size, config.backbone.name, "images in evaluation")
        _require_patches(config, method)
        if config.optim.batch_size == 1 and method_class.trainable and plan.num_views == 1:
            _refuse_one_row(method, config.data.image_size)
    return plan


def _require_labels(config: Config, dataset: Dataset, split: str) -> None:
    """Raises `UserError` where the split is not there, or has no labels."""
    labelled = [name for name, is_labelled in dataset.labelled.items() if is_labelled]
    if split in labelled:
        return
    remedy = "give " + " or ".join(f"data.split={name}" for name in labelled)
    if not labelled:
        remedy = "convert a folder of classes, or train without labels: `method={name: simclr}` views.num=null"
    what = "this split has none" if split in dataset.splits else f"{dataset.root} holds no such split"
    raise UserError(f"data.split = {quoted(split)}: method {config.method.name} needs labels, and {what}; {remedy}")


def _require_patches(config: Config, method: SSLMethod) -> None:
    """Raises `UserError` where attention shall be shown of a backbone that has none."""
    every, name = config.log.attention_every_epochs, config.backbone.name
    if every is not None and not isinstance(method.encoder(), TokenBackbone):
        raise UserError(
            f"log.attention_every_epochs = {every}: backbone {name} has no patches to show; set it to null, or "
            "backbone.name to a vision transformer, as timm/vit_tiny_patch16_224"
        )


def _reset(config: Config, method_class: type[SSLMethod]) -> str:
    """The overrides that rid a config of what it has for another method."""
    fixed: int | None = getattr(method_class, "num_views", None)
    if fixed is None and config.num_views is None:
        return "method.options={} views.num=32"
    if fixed is not None and not method_class.free_views and config.views.num not in (None, fixed):
        return "method.options={} views.num=null"
    return "method.options={}"


class Statistics(Protocol):
    """Of images, per channel, of pixels in [0, 1]: a converted split has them."""

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...


def normalization(config: Config, images: Statistics) -> Normalize:
    """What `views.normalize` means for `images`. Raises `UserError` as `check_constants` does."""
    normalize, channels = config.views.normalize, len(images.mean)
    if normalize == "dataset":
        return Normalize(mean=images.mean, std=images.std)
    if normalize == "none":
        return Normalize(mean=(0.0,) * channels, std=(1.0,) * channels)
    check_constants(normalize, channels, "views.normalize=dataset")
    return normalize


def check_constants(normalize: Normalize, channels: int, instead: str) -> None:
    """Raises `UserError` for values of `views.normalize` that pixels of 0 to 1 can not have, as those of 0 to 255 are:
    the images would be all but constant; and for another number of channels. instead: what else can be done then."""
    if max(*map(abs, normalize.mean), *normalize.std) > 1:
        mean, std = ([round(value / 255, 6) for value in values] for values in (normalize.mean, normalize.std))
        raise UserError(
            f"views.normalize = {{mean: {list(normalize.mean)}, std: {list(normalize.std)}}}: is of pixels in 0..1, "
            f"where none of these is above 1; of pixels in 0..255 it is {{mean: {mean}, std: {std}}}"
        )
    if len(normalize.mean) != channels:
        raise UserError(
            f"views.normalize: is of {len(normalize.mean)} channels, and the images have {channels}; give a value of "
            f"each, or {instead}"
        )


# Sides of images that networks are made for, as a remedy where another one does not fit.
_USUAL_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 336, 384, 448, 512)


def try_size(backbone: Backbone, size: int, name: str, what: str) -> None:
    """Raises `UserError` when the backbone, on the meta device and called `name`, takes no images of `size` px. what:
    the images of that size."""
    if reason := _misfit(backbone, size):
        fit = next((other for other in _USUAL_SIZES if not _misfit(backbone, other)), None)
        remedy = "" if fit is None else f"; it takes {fit} px (data.image_size={fit}, or the size of a group of views)"
        raise UserError(f"data.image_size: {what} of {size} px do not fit backbone {name}: {reason}{remedy}")


def _misfit(backbone: Backbone, size: int) -> str:
    """Why the backbone takes no images of that size; empty when it does."""
    try:
        backbone(
            torch.empty(1, backbone.in_channels, size, size, dtype=next(backbone.parameters()).dtype, device="meta")
        )
    except (RuntimeError, AssertionError, ValueError) as error:
        return first_line(error).rstrip(".")
    return ""


def _refuse_one_row(method: SSLMethod, size: int) -> None:
    """Raises `UserError` when a BatchNorm gets one value of a channel from a single image, and so has no variance."""
    method.train()
    layers = [x for x in method.backbone.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm) and x.training]
    method.eval()

    def check(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            raise UserError(
                "optim.batch_size = 1: BatchNorm has one value of a channel where the backbone's maps have one pixel; "
                "give 2 or more"
            )

    for layer in layers:
        layer.register_forward_pre_hook(check)
    method.backbone(torch.empty(1, method.info.channels, size, size, dtype=next(method.parameters()).dtype))
