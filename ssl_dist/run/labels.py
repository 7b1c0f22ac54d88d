"""`ssl-dist labels`: the labels that a run gave its training images, in the CSV file that data.labels reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_dist import config
from ssl_dist.config import Config
from ssl_dist.data import labels
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError, quoted
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.storage import checkpoint
from ssl_dist.storage.durable import atomic_write_or_refuse

BUFFER = "labels.of_images"  # in a method's state: int32 [heads, images], in the order of training ids
KEYS = ("data.root", "data.reader")


def export_labels(run: Path, out: Path, overrides: Sequence[str]) -> str:
    """Write the labels in a run's newest checkpoint (or in a checkpoint file), a column a head; returns what was
    written in words, and the mutual information with the true labels, where there are any."""
    path, state, _ = checkpoint.load_run(run)
    settings = config.validate(Config, state["config"], f"{path}: ")
    if BUFFER not in state["method"]:
        raise UserError(f"{path}: method {settings.method.name} gives its images no labels")
    plan = _plan(config.to_tree(settings), overrides)
    if state["data"] != plan.data_identity:
        raise UserError(
            f"data.root = {quoted(plan.config.data.root)}: not the images that {path} was trained on; give their folder"
        )
    of_images, ids = state["method"][BUFFER].numpy(), plan.order.train_ids
    if of_images.ndim != 2 or of_images.shape[1] != len(ids) or of_images.dtype.kind != "i":
        raise UserError(
            f"{path}: {BUFFER} is {of_images.dtype} {list(of_images.shape)}, and there are {len(ids)} images; "
            f"{checkpoint.CHANGED}"
        )
    with atomic_write_or_refuse(out) as file:
        file.write(labels.text(ids, of_images).encode())
    summary = f"{out}: labels of {len(ids)} images by {len(of_images)} head(s), after step {state['step']}"
    if not plan.split.labelled:
        return summary
    with plan.open_reader() as reader:
        return summary + information(reader.labels(ids), of_images, len(plan.split.classes))


def _plan(tree: dict[str, Any], overrides: Sequence[str]) -> RunPlan:
    for override in overrides:
        key, equals, value = override.partition("=")
        if key not in KEYS or not equals:
            raise UserError(f"override {quoted(override)}: {' and '.join(KEYS)} can be set here")
        tree = tree | {"data": tree["data"] | {key.removeprefix("data."): value}}
    return derive(config.validate(Config, tree), RankInfo())


def information(true_labels: np.ndarray, of_images: np.ndarray, num_classes: int) -> str:
    """Normalised mutual information of the labels [heads, n] with the true ones [n], -1 unknown: 1 when either gives
    the other. In words, a line, with a line break before."""
    from sklearn.metrics import normalized_mutual_info_score  # scikit-learn takes a second

    has_label = true_labels >= 0
    scores = [normalized_mutual_info_score(true_labels[has_label], row[has_label]) for row in of_images]
    text = ", ".join(f"{score:.3f}" for score in scores)
    return f"\nnormalised mutual information with the {num_classes} classes: {text}"
