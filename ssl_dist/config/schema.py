"""The configuration of a run: every key with its type, default and meaning; YAML files and `key=value` overrides.

A config is flat data. Derived values are properties and are never written back.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from ssl_dist import plugins
from ssl_dist.config import hints, shipped
from ssl_dist.config.implied import Neighbours
from ssl_dist.config.optimizer import Optim
from ssl_dist.config.recipe import MAX_VIEWS, ColorJitter, Interpolation, NumViews, RandomResizedCrop, ViewGroup
from ssl_dist.config.section import (
    FiniteFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    fields_along,
    parse_yaml,
    read_yaml,
    to_tree,
    validate,
)
from ssl_dist.errors import UserError, quoted


class Normalize(Section):
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[FiniteFloat, ...] = Field(
        strict=False, min_length=1, max_length=32, description="of each channel: red, green and blue"
    )
    std: tuple[PositiveFloat, ...] = Field(
        strict=False, min_length=1, max_length=32, description="of each channel: red, green and blue"
    )

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"std: has {len(self.std)} values, and mean {len(self.mean)}; give one of each channel")
        return self


class Views(Section):
    num: NumViews | None = Field(None, description="K, the views of each image; null: what the method fixes")
    normalize: Literal["dataset", "none"] | Normalize = Field(
        "dataset", description="dataset (mean and std of dataset.json), none, or {mean: [r, g, b], std: [r, g, b]}"
    )
    groups: Annotated[list[ViewGroup], Field(min_length=1)] = Field(
        default_factory=lambda: [
            ViewGroup(
                random_resized_crop=RandomResizedCrop(), horizontal_flip=0.5, color_jitter=ColorJitter(), grayscale=0.2
            )
        ],
        description="recipes; several groups (multicrop) give each its own num and size",
    )

    @model_validator(mode="after")
    def _numbers(self) -> Self:
        nums = [group.num for group in self.groups]
        if len(nums) > 1 and None in nums:
            raise ValueError(f"groups[{nums.index(None)}].num: must be given when there are several groups")
        total = sum(num or 0 for num in nums)
        if total > MAX_VIEWS:
            raise ValueError(f"groups: have {total} views together; at most {MAX_VIEWS} can be made of an image")
        if total and self.num and total != self.num:
            raise ValueError(f"num: {self.num} differs from the sum of the groups' num, {total}; leave one of them out")
        return self


class ClassSubset(Section):
    """The images number start .. start + per_class - 1 of every class, counted in id order."""

    per_class: PositiveInt = Field(description="images of every class")
    start: NonNegativeInt = Field(0, description="the first of them, counted from 0 within its class")


class LabelsFile(Section):
    """Labels in the place of the split's own: CSV with the columns image_id, label[, label ...]."""

    file: PathText = Field(description="CSV file")
    column: NonNegativeInt = Field(0, description="which of the label columns, counted from 0")


DatasetName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class Data(Section):
    name: DatasetName | None = Field(
        None,
        description="data set: an entry of the catalog, or a word for one of your own; null: what data.root holds",
    )
    root: PathText = Field(description="folder with <split>.beton and dataset.json (what `convert --out` wrote)")
    reader: Literal["ffcv", "arrays"] = Field("ffcv", description="ffcv, or arrays: the same pixels without FFCV")
    image_size: PositiveInt = Field(
        32,
        description="side in pixels of an image in evaluation, and of a view unless its group says otherwise; where it "
        "is not given and all groups give a size: the largest of these",
    )
    eval_resize: PositiveInt | None = Field(
        None,
        description="evaluation resizes the short side to this before the centre crop; null: to image_size; an "
        "override of image_size alone changes it in proportion",
    )
    eval_interpolation: Interpolation = Field("bilinear", description="of that resize")
    view_shards: Literal["auto"] | PositiveInt = Field(
        "auto", description="ranks over which the views of an image are spread (Wv); the images take the rest"
    )
    workers: Literal["auto"] | PositiveInt = Field("auto", description="threads that make views, on every rank")
    split: str | None = Field(None, description="null: the method's natural split of this data set")
    subset: ClassSubset | PathText | None = Field(
        None, description="{per_class: n, start: m}, or a file with one id a line"
    )
    limit: PositiveInt | None = Field(None, description="train on this many ids, evenly spaced over the split")
    labels: LabelsFile | None = Field(
        None, description="{file: labels.csv, column: 0}: labels for the training instead of the split's own"
    )

    @model_validator(mode="after")
    def _resize(self) -> Self:
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(f"eval_resize: {self.eval_resize} must be at least image_size, {self.image_size}")
        return self


class Backbone(Section):
    name: str = Field("conv4", description="see `ssl-dist explain`; anything in timm as timm/<name>")
    zero_init_residual: bool = Field(
        False, description="residual blocks of resnet18 to resnet200 begin as the identity (SFRIK and VICReg do it)"
    )
    patch_size: PositiveInt | None = Field(
        None, description="side in pixels of the patches of a transformer of timm; null: as its name says"
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="networks of timm: stochastic depth, how often a residual branch of the last block is left out; "
        "those before it in proportion",
    )
    freeze_patches: bool = Field(
        False, description="transformers of timm: the projection of patches keeps its first weights (MoCo v3)"
    )
    recompute: bool = Field(
        False, description="keep only the maps between blocks and compute what is in them again for the gradient"
    )
    weights: PathText | None = Field(
        None,
        description="what to begin from: a file of another program (docs/weights.md), a run or its checkpoint, "
        "hf://ORG/NAME or timm:NAME; null: random weights",
    )
    weights_prefix: str | None = Field(
        None,
        description="what stands before the backbone's names in that file, as student.backbone.; null: it is found",
    )
    resize_pos_embed: bool = Field(
        False, description="positional embeddings of images of another size are interpolated as timm does; else refused"
    )


class MethodSection(Section):
    name: str = Field("relational", description="a file of ssl_dist/methods")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options, checked by the method")


class Checkpoint(Section):
    every_epochs: PositiveInt | None = Field(1, description="save after this many epochs; null: never for that reason")
    every_steps: PositiveInt | None = Field(None, description="save after this many steps")
    keep: PositiveInt = Field(2, description="the newest checkpoints that are kept")
    keep_every: PositiveInt | None = Field(None, description="also keep checkpoints whose step is a multiple of this")


class Log(Section):
    every_steps: PositiveInt = Field(20, description="steps between two lines of metrics.jsonl and TensorBoard")
    images_every_epochs: PositiveInt = Field(
        10, description="epochs between two grids of views in TensorBoard, and of what the method draws of them"
    )
    filters_every_epochs: PositiveInt | None = Field(
        None,
        description="epochs between two pictures, in TensorBoard, of the filters of the backbone's first layer, where "
        "that is a convolution; null: never",
    )
    attention_every_epochs: PositiveInt | None = Field(
        None,
        description="transformers: epochs between two pictures, in TensorBoard and RUN/figures, of the attention of "
        "the class token and of the principal components of the patches, of eight images; null: never",
    )
    knn_every_epochs: PositiveInt | None = Field(
        None,
        description="epochs between two kNN classifications (k = 20) of held-out images of the labelled training split "
        "by the other ones; null: never",
    )
    probe_every_epochs: PositiveInt | None = Field(
        None,
        description="epochs between two measurements, on held-out images of the split that is trained on, of a linear "
        "classifier that learns in every step, at the cost of one more forward pass of one view; null: none",
    )


class PluginFile(Section):
    file: PathText = Field(description="a Python file")
    sha256: str | None = Field(None, description="of its bytes; a run records it")


def plugin_files(given: Any) -> Any:
    """The value of the key plugins, where it is a list of files as a dict by their names; else as it is. Raises
    ValueError when two have one name."""
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        return given
    by_name = {plugins.name_of(file): {"file": file} for file in files}
    if len(by_name) < len(files):
        raise ValueError("two files have one name; write {NAME: {file: FILE}, ...}")
    return by_name


class Config(Section):
    seed: NonNegativeInt = Field(0, description="of everything random")
    run_dir: PathText = Field(min_length=1, description="the run's folder; the same command again resumes it")
    data: Data
    views: Views = Field(default_factory=Views)
    backbone: Backbone = Field(default_factory=Backbone)
    method: MethodSection = Field(default_factory=MethodSection)
    optim: Optim = Field(default_factory=Optim)
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="bf16, fp16: autocast, weights stay float32; fp16 scales the loss, and passes over a step whose "
        "gradient overflows",
    )
    tf32: bool = Field(
        False, description="on GPUs, what goes into float32 convolutions and products is rounded to TensorFloat-32"
    )
    channels_last: bool = Field(True, description="memory layout of images; faster on CPU and GPU")
    compile: bool = Field(False, description="torch.compile the backbone: minutes at the start, faster steps on a GPU")
    deterministic: bool = Field(False, description="deterministic CUDA kernels, for bit-exact resumes on a GPU")
    timeout: Annotated[float, Field(gt=0, le=86400)] = Field(
        60.0, description="seconds after which a rank that hangs ends the run"
    )
    plugins: dict[str, PluginFile] = Field(
        default_factory=dict,
        description="[mine.py]: Python files with methods, backbones and evaluators of your own (see "
        "CONTRIBUTING.md); a run records each as NAME: {file: FILE, sha256: ...}",
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    log: Log = Field(default_factory=Log)

    @field_validator("plugins", mode="before")
    @classmethod
    def _plugins(cls, given: Any) -> Any:
        return plugin_files(given)

    @model_validator(mode="after")
    def _compile(self) -> Self:
        chosen = {"backbone.recompute": self.backbone.recompute, "optim.accumulate": self.optim.accumulate > 1}
        for key in filter(chosen.get, chosen):
            if self.compile:
                raise ValueError(f"compile: true cannot trace {key}; leave one of the two out")
        return self

    @classmethod
    def hint(cls, path: Sequence[int | str], value: object) -> str:
        return hints.for_unknown(cls, path, value)

    @property
    def num_views(self) -> int | None:
        """K as the config gives it; None when it leaves the number to the method."""
        return self.views.num or sum(group.num or 0 for group in self.views.groups) or None


def load(path: str | Path, overrides: Sequence[str] = (), note: Callable[[str], object] = lambda line: None) -> Config:
    """The config in a YAML file (see `shipped.found`) with `key.sub=value` overrides (values are YAML). note: gets a
    line for each key of the file that an override of another one has changed. Raises `UserError`."""
    tree = read_yaml(shipped.found(path), f"config {path}", "configs/ holds examples")
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: must be a mapping of sections (data, views, method, ...); see configs/")
    return overridden(tree, overrides, note)


def overridden(tree: dict, overrides: Sequence[str], note: Callable[[str], object] = lambda line: None) -> Config:
    """The config in `tree` with `key.sub=value` overrides, which change `tree` too. note: see `load`. Raises
    `UserError`."""
    neighbours = Neighbours.of(tree)
    with contextlib.suppress(ValueError):  # `validate` says it with the key
        tree |= {"plugins": plugin_files(tree["plugins"])} if "plugins" in tree else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {quoted(override)}: write key=value, for example optim.lr=1e-3")
        _assign(tree, key.split("."), parse_yaml(value, f"override {quoted(override)}"), override)
    for line in neighbours.follow(tree, [override.partition("=")[0] for override in overrides]):
        note(line)
    config = validate(Config, tree)
    sizes = [group.size for group in config.views.groups if group.size is not None]
    if "image_size" in config.data.model_fields_set or len(sizes) < len(config.views.groups):
        return config
    return validate(Config, tree | {"data": tree["data"] | {"image_size": max(sizes)}})


def _assign(tree: dict | list, path: list[str], value: Any, override: str) -> None:
    """Put `value` in its place in `tree`, below sections that are made where they are missing."""
    for i, name in enumerate(path[:-1]):
        if isinstance(tree, dict):
            if tree.get(name) is None:
                tree[name] = _default(path[: i + 1])
            child = tree[name]
        else:
            child = tree[_index(name, tree, override)]
        if not isinstance(child, dict | list):
            raise UserError(f"override {quoted(override)}: {'.'.join(path[: i + 1])} is not a section")
        tree = child
    if isinstance(tree, dict):
        tree[path[-1]] = value
    else:
        tree[_index(path[-1], tree, override)] = value


def _default(path: list[str]) -> dict | list:
    """What an override below `path` changes where the file has nothing: a list's default, an empty section."""
    fields = fields_along(Config, path)
    default = fields[-1].get_default(call_default_factory=True) if len(fields) == len(path) else None
    return [to_tree(item) for item in default] if isinstance(default, list) else {}


def _index(name: str, items: list, override: str) -> int:
    if name not in map(str, range(len(items))):
        raise UserError(f"override {quoted(override)}: {quoted(name)} is not one of the items 0..{len(items) - 1}")
    return int(name)


def dump(config: Config) -> str:
    """The config as YAML, every key written out."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=110)
