"""The pictures of clusters, the page of all of them, and the list of every image's cluster.

With classes the purest cluster stands first, without any the largest.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ssl_dist.keys import EVALUATION, ORDER, hash64, permutation
from ssl_dist.results.cluster_page import Cluster, html
from ssl_dist.results.confusion import class_names
from ssl_dist.results.figures import FigureWriter
from ssl_dist.storage.features import Features

_NUM_ROWS, _NUM_COLUMNS = 20, 14  # clusters in the picture and images of each


class Clusters(NamedTuple):
    """Clusters of images. part, rows: the images, int64 [n]; clusters_n: the number of each one's cluster; counts_KC:
    images by cluster and class, None: there are no classes; how: what made the clusters, in words."""

    part: Features
    rows: np.ndarray
    clusters_n: np.ndarray
    counts_KC: np.ndarray | None
    how: str

    @property
    def sizes_K(self) -> np.ndarray:
        return np.bincount(self.clusters_n)

    @property
    def purity_K(self) -> np.ndarray:
        """Percent of a cluster's images that have its most frequent class; NaN of an empty one, and without classes."""
        if self.counts_KC is None:
            return np.full(len(self.sizes_K), np.nan)
        return np.where(self.sizes_K > 0, self.counts_KC.max(1) * 100 / np.maximum(1, self.sizes_K), np.nan)

    @property
    def order(self) -> list[int]:
        """The numbers of those that have images, the first first."""
        rank_K = -self.sizes_K if self.counts_KC is None else -self.purity_K
        return [int(k) for k in np.argsort(rank_K, kind="stable") if self.sizes_K[k]]

    @property
    def what(self) -> str:
        metadata, empty = self.part.metadata, int((self.sizes_K == 0).sum())
        text = f"{len(self.rows):,} images of {metadata['dataset']} {metadata['split']} in {len(self.order)} clusters"
        return f"{text} ({self.how})" + (f", {empty} more without an image" if empty else "")


def draw(writer: FigureWriter, clusters: Clusters, per_cluster: int, seed: int) -> None:
    """Write the pictures, the list, and the page with `per_cluster` images of each cluster; 0: no page."""
    listed = _listed(writer, clusters)
    if clusters.counts_KC is not None:
        _draw_purities(writer, clusters, clusters.counts_KC)
    if per_cluster:
        page = writer.add_page("clusters", _page(writer, clusters, per_cluster, seed), clusters.part)
        listed = f"All clusters: {page}. {listed}"
    _draw_images(writer, clusters, seed, listed)


def _draw_purities(writer: FigureWriter, clusters: Clusters, counts_KC: np.ndarray) -> None:
    from ssl_dist.results import charts  # matplotlib takes a second

    names, best_K, sizes_K = class_names(clusters.part), counts_KC.argmax(1), clusters.sizes_K
    writer.add(
        "clusters-purity",
        charts.class_bars(
            clusters.purity_K,
            [f"{k}: {names[best_K[k]]} ({size:,})" for k, size in enumerate(sizes_K.tolist())],
            float(counts_KC.max(1).sum() * 100 / len(clusters.rows)),
            "% of the cluster's images that have its most frequent class", "clusters",
        ),
        "Clusters by purity",
        f"{clusters.what}: the share of the most frequent class in each, the purest first. Beside a bar: the cluster's"
        " number, that class, and how many images the cluster has. The dashed line is the accuracy by majority vote.",
        clusters.part,
    )  # fmt: skip


def _draw_images(writer: FigureWriter, clusters: Clusters, seed: int, listed: str) -> None:
    from ssl_dist.results import charts  # matplotlib takes a second

    part, counts_KC, order = clusters.part, clusters.counts_KC, clusters.order
    names = [] if counts_KC is None else class_names(part)
    half = _NUM_ROWS // 2
    shown = order if len(order) <= _NUM_ROWS else order[:half] + order[-half:]
    drawn_rows = []
    for k in shown:
        own = _drawn(clusters.rows[clusters.clusters_n == k], k, _NUM_COLUMNS, seed)
        title, belongs = f"cluster {k}: {clusters.sizes_K[k]:,} images", np.zeros(len(own), bool)
        if counts_KC is not None:
            best = counts_KC[k].argmax()
            title += f"\n{clusters.purity_K[k]:.0f} % {names[best]}"
            belongs = part.labels[own] == best
        drawn_rows.append((title, writer.images(part, own), belongs))
    first, ends = (
        ("largest", "largest and the {} smallest") if counts_KC is None else ("purest", "purest and the {} least pure")
    )
    some = "" if len(order) <= _NUM_ROWS else f"; shown are the {half} {ends.format(half)}"
    frames = " Green frames, first in a row: images of the cluster's most frequent class." if names else ""
    writer.add(
        "clusters-images",
        charts.clusters(drawn_rows),
        "Images of clusters",
        f"{clusters.what}, the {first} first{some}: images of each that are drawn by key (seed {seed}), not by hand or"
        f" by their distance.{frames} {listed}",
        part,
    )


def _listed(writer: FigureWriter, clusters: Clusters) -> str:
    """Write the list of every image's cluster; says where it is, for a caption."""
    part, rows = clusters.part, clusters.rows
    ids, files = part.image_ids[rows].tolist(), writer.files(part, rows)
    lines = zip(ids, files, clusters.clusters_n.tolist(), strict=True)
    return f"All images: {writer.add_table('clusters', ('image_id', 'file', 'cluster'), lines, part)}."


def _drawn(rows: np.ndarray, k: int, number: int, seed: int) -> np.ndarray:
    """Some rows of cluster k, by key."""
    return rows[permutation(hash64(seed, EVALUATION, k), len(rows))[:number]]


def _page(writer: FigureWriter, clusters: Clusters, per_cluster: int, seed: int) -> Iterator[str]:
    """The page of all clusters, part by part."""
    part, counts_KC, order, sizes_K = clusters.part, clusters.counts_KC, clusters.order, clusters.sizes_K
    by_cluster = np.split(clusters.rows[np.argsort(clusters.clusters_n, kind="stable")], np.cumsum(sizes_K)[:-1])
    random_places = permutation(hash64(seed, EVALUATION, ORDER), len(order))
    names = None if counts_KC is None else class_names(part)

    def articles() -> Iterator[Cluster]:
        for k, random_place in zip(order, random_places.tolist(), strict=True):
            own, labels, majority = _drawn(by_cluster[k], k, per_cluster, seed), None, None
            if counts_KC is not None:
                # Classes that are frequent in the cluster stand first.
                own = own[np.lexsort((part.labels[own], -counts_KC[k, part.labels[own]]))]
                labels, majority = part.labels[own], int(counts_KC[k].argmax())
            images, files = writer.images(part, own), writer.files(part, own)
            yield Cluster(
                k, int(sizes_K[k]), random_place, images, files, labels, majority, float(clusters.purity_K[k])
            )

    classes = (
        " A frame's colour is the image's true class, which the pointer names; beside a cluster stand its size, the"
        " share of its most frequent class, and that class."
    )
    caption = (
        f"{clusters.what}. Up to {per_cluster} images of each, drawn by key (seed {seed})."
        f"{classes if names else ' The pointer names the file of an image.'}"
    )
    if choice := writer.choice(part):
        caption += f" The {choice}."
    return html("All clusters", caption, articles(), "largest" if names is None else "purest", names)
