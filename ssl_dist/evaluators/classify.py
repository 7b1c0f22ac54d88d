"""Inference alone: a trained classifier on the test split of its own data set or of another one."""

import hashlib
import sys
from pathlib import Path

from pydantic import Field

from ssl_dist.config import Section
from ssl_dist.errors import UserError
from ssl_dist.methods.base import SSLMethod
from ssl_dist.run.encoder import Encoder, load_together
from ssl_dist.storage import checkpoint
from ssl_dist.transfer.classification import CROPS, Crops, classify, draw
from ssl_dist.transfer.recipe import encoder_file
from ssl_dist.transfer.subject import EvalContext

VERSION = 2  # classes are matched by name


class Options(Section):
    head: str | None = Field(
        None, description="folder of a probe or a fine-tuning in RUN/evaluations; null: the run's own classifier"
    )
    crops: Crops = Field(1, description="of a test image: 1, its centre; 10, corners and centre, and mirrored")


def protocol(options: Options) -> str:
    """The sentence that says how was measured; a head is named with the start of its checkpoint's SHA-256."""
    if options.head is None:
        return f"inference by the run's own classifier, all test images, {CROPS[options.crops]}"
    newest = checkpoint.newest_digest(Path(options.head))
    if newest is None:
        raise UserError(f"classify.head = {options.head!r}: holds no checkpoint; name a folder of RUN/evaluations")
    return (
        f"inference by the classifier of {Path(options.head).name} ({newest[1][:12]}), all test images, "
        f"{CROPS[options.crops]}"
    )


def measure(context: EvalContext, options: Options) -> dict[str, float]:
    """`classify_top1` and `classify_top5` in percent.

    Raises `UserError` when there is no classifier, when it is of another run or checkpoint, and when it was trained on
    images that are held out.
    """
    path, world = context.run if options.head is None else Path(options.head), context.world
    method, encoder = load_together(path, world)
    encoder = encoder.with_transform(context.encoder.changed)
    world.raise_together(lambda: _check(method, encoder, context, options, path))
    if encoder.classes is None and world.is_rank0:
        print(
            f"{encoder.file}: does not name its classes; those of {context.dataset.name} are matched by number",
            file=sys.stderr,
            flush=True,
        )
    classified = classify(method, encoder, context, encoder.classes, options.crops)
    draw(classified, context, "classify", "the classifier", encoder.classes)
    return classified.values("classify")


def _check(method: SSLMethod, encoder: Encoder, context: EvalContext, options: Options, path: Path) -> None:
    """`encoder` is that of the checkpoint in `path`, which holds the classifier."""
    setting = f"classify.head = {'null' if options.head is None else repr(options.head)}"
    if type(method).logits is SSLMethod.logits:
        raise UserError(
            f"{setting}: {path} holds {encoder.config.method.name}, which does not classify; give the folder of a "
            "probe or a fine-tuning (RUN/evaluations/...), or a supervised run"
        )
    if options.head is not None:
        initial_weights = checkpoint.load(encoder.file)["data"].get("weights")
        if initial_weights != hashlib.sha256(encoder_file(context.encoder)).hexdigest():
            raise UserError(
                f"{setting}: was not trained on the newest checkpoint of {context.run}; evaluate the run that it is of"
            )
    if context.held_out is not None:
        assert context.train_ids is not None, "a part was held out of the training images"
        if encoder.ids != hashlib.sha256(context.train_ids.tobytes()).hexdigest():
            raise UserError(
                f"{setting}: was trained on images of {context.held_out}; leave --validation out, or probe with it"
            )
