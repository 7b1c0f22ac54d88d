"""Distributed extraction: every image of a split once, in the order of ids, through a frozen encoder."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist import views
from ssl_dist.config import Config, Data, Normalize, overridden, to_tree, validate
from ssl_dist.data import file_names
from ssl_dist.data.loader import view_batches
from ssl_dist.data.normalize import normalized
from ssl_dist.data.reader import Reader
from ssl_dist.data.readers import Dataset
from ssl_dist.device import allow_tf32
from ssl_dist.distributed.world import World
from ssl_dist.errors import RaisedOn, UserError
from ssl_dist.methods.base import SSLMethod
from ssl_dist.nn import features
from ssl_dist.nn.backbone import Backbone
from ssl_dist.nn.shapes import without_values
from ssl_dist.progress import Progress
from ssl_dist.reading import parse_json
from ssl_dist.run import blueprint, network, plugged
from ssl_dist.run import folder as run_folder
from ssl_dist.storage import durable, hub, weights_file
from ssl_dist.storage.features import read_features, write_features
from ssl_dist.thread_team import ThreadTeam

BATCH_SIZE = 256  # images in a forward pass in evaluation mode; another size rounds differently
TEN_CROPS_BATCH_SIZE = 16  # images of ten crops each; it divides the other, at whose multiples ranks part
BATCH_TIMEOUT_S = 600.0  # without a batch, after which a rank of an extraction ends
PARTS_TIMEOUT_S = 4 * 3600.0  # that a rank which is done waits for the others; one that dies is noticed at once


@dataclass(frozen=True)
class Encoder:
    """A frozen network with what its input needs and where it comes from."""

    module: nn.Module
    config: Config
    normalize: Normalize
    sha256: str
    step: int
    file: Path  # that it was read from
    ids: str = ""  # SHA-256 of the ids that it was trained on; empty for a file of another program
    classes: tuple[str, ...] | None = None  # that it was trained on, by name; None: they are not known
    changed: tuple[str, ...] = ()  # settings of the test transform that are not the run's, as key=value
    layer: str = features.OUTPUT  # whose features are extracted, see nn/features.py

    @property
    def transform(self) -> str:
        """The test transform in words, and the arithmetic where it is not float32; features made with another one are
        stale."""
        size = self.config.data.image_size
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.normalize.mean, self.normalize.std))
        resize = self.config.data.eval_resize or size
        tf32 = ", in TensorFloat-32" if self.config.tf32 else ""
        cubic = " bicubic" if self.config.data.eval_interpolation == "bicubic" else ""
        return f"short side to {resize}{cubic}, centre crop {size}, mean ({mean}), std ({std}){tf32}"

    @property
    def backbone(self) -> Backbone:
        """The network as what it is."""
        assert isinstance(self.module, Backbone), "what a method evaluates is a backbone"
        return self.module

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.normalize.mean)

    @property
    def size_note(self) -> str | None:
        """A line for the user where images are not evaluated at the size of any view; else None."""
        size, groups = self.config.data.image_size, self.config.views.groups
        sizes = sorted({group.size or size for group in groups})
        if any(change.startswith("data.") for change in self.changed) or size in sizes:
            return None
        return (
            f"images are evaluated at {size} px and the views were of {', '.join(map(str, sizes))}; "
            f"data.image_size={sizes[-1]} evaluates at that size"
        )

    def with_transform(self, changed: Sequence[str]) -> "Encoder":
        """The encoder with other settings of the test transform, each as key=value. Raises `UserError` for values that
        are wrong, and for a size that the backbone does not take."""
        if not changed:
            return self
        config = overridden(to_tree(self.config), changed)
        with without_values():
            backbone = network.build_backbone(self.config, self.channels).eval()
            blueprint.try_size(backbone, config.data.image_size, config.backbone.name, "images")
        return replace(self, config=config, changed=tuple(changed))

    def with_layer(self, layer: str) -> "Encoder":
        """The encoder with the features of another layer. Raises `UserError` where the backbone has no such one."""
        if layer == self.layer:
            return self
        features.width(layer, self.backbone.stages, self.backbone.feature_dim)
        return replace(self, layer=layer)

    def like(self, other: "Encoder") -> "Encoder":
        """The encoder with the test transform and the layer of another one."""
        return self.with_transform(other.changed).with_layer(other.layer)


def load_encoder(path: Path) -> Encoder:
    """The encoder in a run's newest checkpoint, or in a checkpoint file. Raises `UserError`."""
    return load_method(path)[1]


def load_method(path: Path) -> tuple[SSLMethod, Encoder]:
    """The method in a run's newest checkpoint, or in a checkpoint file, and its encoder. Raises `UserError`."""
    run = network.restored(path)
    return run.method, encoder_of(run)


def encoder_of(run: network.Restored) -> Encoder:
    """What a method evaluates, of a checkpoint that was read."""
    state, module = run.state, run.method.encoder().float().eval().requires_grad_(False)
    normalize = validate(Normalize, state["normalize"])
    classes = None if state.get("classes") is None else tuple(state["classes"])
    return Encoder(module, run.config, normalize, run.sha256, state["step"], run.file, state["data"]["ids"], classes)


def load_together(path: Path, world: World) -> tuple[SSLMethod, Encoder]:
    """What `load_method` returns, of one checkpoint on all ranks: a training may save another one between two reads.

    Raises `UserError` on every rank.
    """
    plugged.require_same(world)
    method, encoder = world.raise_together(lambda: load_method(path))
    first = world.on_rank0(lambda: (str(encoder.file), encoder.sha256))
    if encoder.sha256 != first[1]:
        method, encoder = load_method(Path(first[0]))
    if len(set(world.all_gather_object(encoder.sha256))) > 1:
        message = f"{path}: changes while it is read; evaluate when the training has saved"
        raise UserError(message, RaisedOn.EVERY_RANK)
    return method, encoder


def load_others(path: Path, settings: Config, images: blueprint.Statistics) -> tuple[Encoder, str]:
    """The encoder in a file of another program, and a line on how the file was read. Raises `UserError`.

    settings: the backbone, the size of images and how they are normalised ("dataset": by mean and std of `images`;
    where nothing is given and the file is one of `ssl-dist export`, as it says).
    """
    name = settings.backbone.name
    path = hub.located(str(path)) if hub.is_name(str(path)) else hub.file_in(path)
    normalize, channels, facts = blueprint.normalization(settings, images), len(images.mean), weights_file.facts(path)
    with without_values():
        blueprint.try_size(network.build_backbone(settings, channels).eval(), settings.data.image_size, name, "images")
    backbone = network.build_backbone(settings, channels)
    fitted = network.fitted(path, backbone, settings.backbone)
    backbone.load_state_dict(fitted.tensors)
    module, note = backbone.float().eval().requires_grad_(False), fitted.note
    if facts and "normalize" not in settings.views.model_fields_set:
        try:
            tree = parse_json(facts["normalize"])
        except ValueError:
            raise UserError(f"{path}: damaged metadata (normalize); export it again") from None
        stated = validate(Normalize, tree, f"{path}: normalize.")
        if len(stated.mean) != channels:
            raise UserError(
                f"{path}: is of images of {len(stated.mean)} channels, and these have {channels}; give others, or "
                "views.normalize=dataset, for which weights of 3 are adapted"
            )
        normalize = stated
        note += "; images are normalised as its metadata says"
    sha256, given = fitted.sha256, settings.backbone
    if given.weights_prefix is not None or fitted.adapted:  # another network of the same file has other features
        sha256 = hashlib.sha256(f"{sha256} {given.weights_prefix} {fitted.adapted}".encode()).hexdigest()
    encoder = Encoder(module, settings, normalize, sha256, 0, path)
    return encoder, f"{note}; images: {encoder.transform}{_left_open(settings, bool(facts))}"


def _left_open(settings: Config, says_normalize: bool) -> str:
    """What nobody has said of the images of a file, in words. says_normalize: whether the file does."""
    absent = ["data.image_size"] if "image_size" not in settings.data.model_fields_set else []
    absent += ["views.normalize"] if "normalize" not in settings.views.model_fields_set and not says_normalize else []
    return f" ({' and '.join(absent)} not given: give what it was trained with)" if absent else ""


def features_path(folder: Path, dataset: Dataset, split: str, layer: str = features.OUTPUT) -> Path:
    return folder / f"{features.named(f'{dataset.name}-{split}', layer)}.safetensors"


def is_fresh(path: Path, encoder: Encoder, dataset: Dataset, split: str) -> bool:
    """Whether `path` holds what `encoder` would write of the split as it is now. A damaged file does not."""
    if not path.exists():
        return False
    try:
        metadata = read_features(path).metadata
    except UserError:
        return False
    return depends_on(encoder, dataset, split).items() <= metadata.items()


def depends_on(encoder: Encoder, dataset: Dataset, split: str) -> dict[str, str]:
    """What features depend on, as their file's metadata has it. The backbone is among it: another one may take the same
    weights and compute otherwise."""
    info = dataset.info(split)
    return {
        "classes": json.dumps(list(info.classes)),
        "data": info.sha256,
        "transform": encoder.transform,
        "checkpoint": encoder.sha256,
        "layer": encoder.layer,
        "backbone": encoder.config.backbone.name,
    }


def extract_features(encoder: Encoder, dataset: Dataset, split: str, folder: Path, world: World, threads: int) -> Path:
    """Write the features file of a split: float32 [N, D], one row an image in the order of ids; and beside it, where
    the data set has it, the list of the images' files.

    Every rank passes a range of ids and writes it beside the file; rank 0 joins the parts. The file is the same, to the
    bit, on any number of ranks with as many threads.
    """
    path = features_path(folder, dataset, split, encoder.layer)
    token = world.on_rank0(lambda: _prepare(folder))
    with dataset.open(split) as reader:
        info = reader.info
        low, high = share_in_batches(world, info.count)
        title = f"{run_folder.title_of_file(encoder.file)}: features {dataset.name} {split}"
        with (
            Progress(title, high - low, "image", quiet=not world.is_rank0) as progress,
            world.state.phase_of(f"the extraction of {split}", BATCH_TIMEOUT_S),
        ):
            ids = np.arange(low, high, dtype=np.int64)
            backbone = encoder.backbone.to(world.device).to(memory_format=torch.channels_last)
            to_input = normalized(encoder.normalize, torch.float32, world.device)
            allow_tf32(encoder.config.tf32)
            data = encoder.config.data

            def embed(pixels: Tensor) -> Tensor:
                return features.of_layer(backbone, encoder.layer, to_input(pixels))

            part = np.concatenate(list(outputs(embed, reader, ids, data, threads, world, progress)))
    metadata = {
        **depends_on(encoder, dataset, split),
        "dataset": dataset.name,
        "split": split,
        "step": str(encoder.step),
        "method": encoder.config.method.name,
    }

    def join(parts: Sequence[np.ndarray]) -> None:
        if (files := dataset.files(split)) is not None:
            with durable.refuse_unwritable(folder, "give another --out"):
                listed = file_names.path_of(folder, f"{dataset.name}-{split}")
                durable.write_text(listed, "".join(f"{line}\n" for line in files))
        write_features(
            path, np.concatenate(parts), dataset.labels(split), np.arange(info.count, dtype=np.int64), metadata
        )

    if world.alone:
        join([part])
        return path
    part_paths = [_part_of(path, rank, token) for rank in range(world.rank_info.world_size)]
    waiting = world.state.phase_of(f"the wait for the other ranks' parts of {split}", PARTS_TIMEOUT_S)
    with waiting, durable.temporary(part_paths[world.rank_info.rank]) as file:
        np.save(file, part)
        durable.sync(file)  # rank 0 may read it on another node
        world.barrier()
        world.on_rank0(lambda: join([np.load(part_path, mmap_mode="r") for part_path in part_paths]))
    return path


def _prepare(folder: Path) -> str:
    """Make the folder, without what killed extractions left there; returns a token that the names of parts contain."""
    with durable.refuse_unwritable(folder, "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
    durable.remove_dead(folder)
    return durable.new_token()


def _part_of(path: Path, rank: int, token: str) -> Path:
    return durable.temporary_path(path.with_name(f"{path.stem}.part-{rank}"), token)


def share_in_batches(world: World, count: int) -> tuple[int, int]:
    """This rank's images [low, high) of `count`: an even share of whole batches. A batch of another size would round
    differently; these are the same on any number of ranks."""
    first, last = world.share(-(-count // BATCH_SIZE))
    return min(first * BATCH_SIZE, count), min(last * BATCH_SIZE, count)


def outputs(
    network: Callable[[Tensor], Tensor],
    reader: Reader,
    ids: np.ndarray,
    data: Data,
    threads: int,
    world: World,
    progress: Progress,
    crops: Literal[1, 10] = 1,
) -> Iterator[np.ndarray]:
    """The network's outputs, float32 [n, D], for the images `ids` under the test transform of `data`, uint8
    or uint16 [n, C, S, S] on the world's device, batch by batch and without gradient; of no ids one batch of none.
    crops: 10: the mean of the outputs for ten crops of an image, see `views.ten_crops`, in place of the output for its
    centre."""
    make = views.test_views if crops == 1 else views.ten_crops
    size = BATCH_SIZE if crops == 1 else TEN_CROPS_BATCH_SIZE

    def make_view(images: views.Images, team: ThreadTeam) -> np.ndarray:
        return make(images, data.image_size, data.eval_resize, data.eval_interpolation, team)

    batches = (ids[start : start + size] for start in range(0, max(1, len(ids)), size))
    with torch.no_grad(), closing(view_batches(reader, batches, make_view, threads)) as views_and_ids:
        for images, _ in views_and_ids:
            pixels = torch.from_numpy(images).to(world.device)
            if crops == 1:
                output = network(pixels)
            else:
                output = network(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).float().mean(1)
            yield output.flatten(1).float().cpu().numpy()
            progress.update(len(images))
            world.state.step += 1
