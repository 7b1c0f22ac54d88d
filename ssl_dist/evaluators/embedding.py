"""Maps of the features in two dimensions: principal components and t-SNE (van der Maaten & Hinton, 2008).

Both are scikit-learn's, of test images that are chosen by key, evenly over the classes. Measured is how much they keep:
the variance that principal components explain, in percent, and trustworthiness (Venna & Kaski, 2001; 1 where every
neighbour on the map is one among the features). One thread and a seed, so that a map can be made again.

With a writer the same images go to TensorBoard's projector, RUN/tensorboard/embedding (-<layer>): their first
128 principal components, classes, files and thumbnails.

Of a split alone without classes the images are drawn by key, and the maps have one colour.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from threadpoolctl import threadpool_limits

from ssl_dist.config import NonNegativeInt, PositiveFloat, PositiveInt, Section
from ssl_dist.errors import UserError
from ssl_dist.keys import EVALUATION, hash64
from ssl_dist.nn import features
from ssl_dist.results.confusion import class_names
from ssl_dist.results.figures import FigureWriter
from ssl_dist.results.sampling import evenly
from ssl_dist.storage.durable import refuse_unwritable
from ssl_dist.storage.features import Features, check_pair, have_classes

PROTOCOL = (
    "maps of at most {limit} test images, chosen by key (seed {seed}) evenly over the classes, features to length 1:"
    " {normalize}; t-SNE: initialised by PCA, perplexity {perplexity:g}, {iterations} iterations; trustworthiness:"
    " {neighbours} neighbours"
)
VERSION = 1
DRAWS = True
_PROJECTOR_DIMS = 128  # the projector reduces by itself what is wider than 200
_MIN_RELATIVE_SPREAD = 1e-8  # of the largest feature; features in float32 that differ less are equal
_MIN_SPREAD = 1e-12  # below it squared distances leave t-SNE's range, and the process with them
_THUMBNAIL_SIZE = 40  # pixels; the projector takes a picture of all thumbnails of 8192 pixels at the most


class Options(Section):
    limit: Annotated[int, Field(ge=4, le=5000)] = Field(2000, description="images of a map; memory grows as its square")
    normalize: bool = Field(True, description="features to length 1 first, as kNN and retrieval take them")
    perplexity: PositiveFloat = Field(30.0, description="of t-SNE: about how many neighbours count")
    iterations: Annotated[int, Field(ge=500)] = Field(
        1000, description="of t-SNE; it is only after 250 that groups spread"
    )
    neighbours: PositiveInt = Field(5, description="of trustworthiness")
    seed: NonNegativeInt = Field(0, description="of the choice of images and of t-SNE")


class _Map(NamedTuple):
    """Positions [N, 2] of images, and their trustworthiness."""

    xy_N2: np.ndarray
    trustworthiness: float


def protocol_without_labels(options: Options) -> str:
    """The sentence for a split that has no classes."""
    return (
        PROTOCOL.replace(" evenly over the classes", "").replace("test images", "images").format(**options.model_dump())
    )


def run(
    train: Features,
    test: Features,
    options: Options,
    writer: FigureWriter | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`embedding_pca2_variance` and `embedding_pca10_variance`, percent of the first components; how many explain 90 %,
    `embedding_pca90_dims`; `embedding_pca_trustworthiness` and `embedding_tsne_trustworthiness`.

    Raises `UserError` for files that do not belong together, missing labels, fewer than two classes, too few images for
    perplexity or neighbours, and features that are all equal.
    """
    check_pair(train, test)
    from sklearn.decomposition import PCA  # scikit-learn takes a second
    from sklearn.manifold import TSNE, trustworthiness

    with_classes = have_classes(train, test)
    shown = test.labels if with_classes else np.zeros(len(test), np.int64)
    rows = evenly(shown, options.limit, hash64(options.seed, EVALUATION))
    _check_counts(len(rows), test, options)
    features_ND = torch.from_numpy(test.take(rows)).double()
    x_ND = (F.normalize(features_ND) if options.normalize else features_ND).numpy()
    if np.ptp(x_ND, axis=0).max() <= max(_MIN_RELATIVE_SPREAD * np.abs(x_ND).max(), _MIN_SPREAD):
        raise UserError(f"{test.source}: all images have the same features; the checkpoint has collapsed, use another")
    with threadpool_limits(1):  # sums in one order, whatever the machine: t-SNE can make another map of a last digit
        pca = PCA(svd_solver="full").fit(x_ND)
        components_NE = pca.transform(x_ND)
        tsne = TSNE(
            perplexity=options.perplexity, max_iter=options.iterations, init="pca", random_state=options.seed
        ).fit_transform(x_ND)
        maps = {
            name: _Map(xy_N2, trustworthiness(x_ND, xy_N2, n_neighbors=options.neighbours))
            for name, xy_N2 in (("pca", components_NE[:, :2]), ("tsne", tsne))
        }
    explained_E = np.cumsum(pca.explained_variance_ratio_) * 100
    values = {f"embedding_pca{n}_variance": float(explained_E[:n][-1]) for n in (2, 10)}
    values["embedding_pca90_dims"] = float(min(len(explained_E), int(np.searchsorted(explained_E, 90)) + 1))
    values |= {f"embedding_{name}_trustworthiness": float(each.trustworthiness) for name, each in maps.items()}
    if writer is not None:
        thumbnails = _thumbnails(writer, test, rows)
        names = class_names(test) if with_classes else None
        _draw(writer, test, rows, names, maps, thumbnails, pca.explained_variance_ratio_, options)
        name = features.named("embedding", test.metadata.get("layer", features.OUTPUT))
        folder = writer.folder.parent / "tensorboard" / name
        columns = {"class": [names[label] for label in test.labels[rows]]} if names else {}
        columns |= {"image": test.image_ids[rows].astype(str).tolist(), "file": writer.files(test, rows)}
        write_projector(folder, components_NE[:, :_PROJECTOR_DIMS], thumbnails, test, columns)
    return values


def _check_counts(count: int, test: Features, options: Options) -> None:
    if test.dim < 2:
        raise UserError(f"{test.source}: an image has one number; a map needs at least two features of each")
    if count < 4:
        raise UserError(f"{test.source}: {count} images are too few for a map; give a split of 4 or more")
    lacks = []
    if options.perplexity >= count:
        what = f"embedding.perplexity = {options.perplexity:g}: must be below the number of images, {count}"
        lacks.append((what, f"embedding.perplexity={count // 3}"))
    if options.neighbours >= count / 2:
        what = f"embedding.neighbours = {options.neighbours}: must be below half the number of images, {count}"
        lacks.append((what, f"embedding.neighbours={(count - 1) // 2}"))
    if lacks:
        raise UserError(f"{'; '.join(what for what, _ in lacks)}; give {' '.join(remedy for _, remedy in lacks)}")


def _draw(
    writer: FigureWriter,
    test: Features,
    rows: np.ndarray,
    names: list[str] | None,
    maps: dict[str, _Map],
    thumbnails: torch.Tensor,
    explained_E: np.ndarray,
    options: Options,
) -> None:
    from ssl_dist.results import charts  # matplotlib takes a second

    """names: of the classes, None: there are none."""
    labels = None if names is None else test.labels[rows]
    first, second = explained_E[:2] * 100
    axis_names = {
        "pca": (f"first component ({first:.1f} % of the variance)", f"second component ({second:.1f} %)"),
        "tsne": ("", ""),
    }
    length = "features of length 1" if options.normalize else "features"
    chosen = "which has no classes, drawn by key" if names is None else "evenly over the classes by key"
    what = (
        f"{len(rows):,} images of {test.metadata['dataset']} {test.metadata['split']}, {chosen} (seed {options.seed})"
    )
    how = {
        "pca": f"the first two principal components of their {length}",
        "tsne": f"t-SNE of their {length}, initialised by PCA, perplexity {options.perplexity:g},"
        f" {options.iterations} iterations; neighbours mean something, distances between groups and axes do not",
    }
    count, colours = 0, ""
    if labels is not None:
        count = len(np.unique(labels))
        repeats = f", in colours that repeat over {count} classes" if count > charts.MAX_LABELLED_CLASSES else ""
        colours = f" Colour and shape: the class{repeats}."
    titles = {"pca": "Features by principal components", "tsne": "Features by t-SNE"}
    for name, each in maps.items():
        writer.add(
            f"embedding-{name}",
            charts.points(each.xy_N2, labels, names, axis_names[name]),
            titles[name],
            f"{what}: {how[name]}.{colours} Trustworthiness {each.trustworthiness:.3f}"
            f" with {options.neighbours} neighbours (1: all that are near on the map are near among the features).",
        )
    images = (thumbnails * 255).round().byte().permute(0, 2, 3, 1).numpy()
    writer.add(
        "embedding-images",
        charts.image_map(maps["tsne"].xy_N2, images, labels, names),
        "Images where t-SNE puts them",
        f"{what}: {how['tsne']}. Where several images fall on one place, the one nearest its middle is shown."
        + (" The frame's colour is the class." if 0 < count <= len(charts.PALETTE) else ""),
    )


# -------------------------------------------------------------------------------------------------- the projector


def write_projector(
    folder: Path, vectors_ND: np.ndarray, thumbnails: torch.Tensor, test: Features, columns: dict[str, list[str]]
) -> None:
    """TensorBoard's files in `folder`, in the place of what was there. thumbnails: float32 [n, 3, s, s] in [0, 1];
    columns: what is said of the images of `test`; one of empty texts is left out.

    Raises `UserError` when the folder cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    from ssl_dist.run.board import EventFile

    class Projector(SummaryWriter):
        """Without its file of events, whose thread prints a traceback where the disk is full."""

        def _get_file_writer(self) -> SimpleNamespace:
            return SimpleNamespace(get_logdir=lambda: self.log_dir)

    temporary = folder.with_name(f".{folder.name}.new")
    columns = {name: [" ".join(text.split()) for text in texts] for name, texts in columns.items() if any(texts)}
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    header: list[str] | None = list(columns)
    if len(columns) == 1:  # TensorBoard has no header over one column
        rows, header = [text for [text] in rows], None
    with refuse_unwritable(folder, "give a run's folder that can, with space left"):
        shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
        try:
            EventFile(temporary, 0)  # TensorBoard looks for runs where events are
            with Projector(str(temporary)) as writer:
                writer.add_embedding(
                    vectors_ND.astype(np.float32),
                    rows,
                    thumbnails,
                    int(test.metadata["step"]),
                    f"{test.metadata['dataset']}-{test.metadata['split']}",
                    header,
                )
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _thumbnails(writer: FigureWriter, test: Features, rows: np.ndarray) -> torch.Tensor:
    blocks = []
    for start in range(0, len(rows), 256):
        images = torch.from_numpy(writer.images(test, rows[start : start + 256])).permute(0, 3, 1, 2).float() / 255
        side = min(images.shape[-1], _THUMBNAIL_SIZE)
        blocks.append(F.interpolate(images, (side, side), mode="bilinear", antialias=True).clamp(0, 1))
    return torch.cat(blocks)
