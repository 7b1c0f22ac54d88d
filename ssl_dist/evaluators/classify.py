"""Inference alone: what a trained classifier makes of the test split, of its own data set or of another one."""

import hashlib
from pathlib import Path

from pydantic import Field

from ssl_dist.config import Section
from ssl_dist.errors import UserError
from ssl_dist.methods.base import SSLMethod
from ssl_dist.run.encoder import Encoder, load_together
from ssl_dist.storage import checkpoint
from ssl_dist.transfer.classification import classify, draw
from ssl_dist.transfer.recipe import encoder_file
from ssl_dist.transfer.subject import EvalContext


class Options(Section):
    head: str | None = Field(
        None, description="folder of a probe or a fine-tuning in RUN/evaluations; null: the run's own classifier"
    )


def protocol(options: Options) -> str:
    """The sentence that says how was measured; a head is named with the start of its checkpoint's SHA-256."""
    if options.head is None:
        return "inference by the run's own classifier, all test images, centre crop"
    newest = checkpoint.newest_digest(Path(options.head))
    if newest is None:
        raise UserError(f"classify.head = {options.head!r}: holds no checkpoint; name a folder of RUN/evaluations")
    return f"inference by the classifier of {Path(options.head).name} ({newest[1][:12]}), all test images, centre crop"


def measure(subject: EvalContext, options: Options) -> dict[str, float]:
    """`classify_top1` and `classify_top5` in percent.

    Raises `UserError` when there is no classifier, when it is of another run or checkpoint, and when it was trained on
    images that are held out.
    """
    path, world = subject.run if options.head is None else Path(options.head), subject.world
    method, own = load_together(path, world)
    world.raise_together(lambda: _check(method, own, subject, options, path))
    found = classify(method, own, subject.source, subject.test, world, world.rank_info.cores, subject.test_ids)
    draw(found, subject, "classify", "the classifier")
    return found.values("classify")


def _check(method: SSLMethod, own: Encoder, subject: EvalContext, options: Options, path: Path) -> None:
    """`own` is the encoder of the checkpoint that holds the classifier."""
    said = f"classify.head = {'null' if options.head is None else repr(options.head)}"
    if type(method).logits is SSLMethod.logits:
        raise UserError(
            f"{said}: {path} holds {own.config.method.name}, which does not classify; give the folder of a probe or a "
            "fine-tuning (RUN/evaluations/...), or a supervised run"
        )
    if options.head is not None:
        begun_from = checkpoint.load_hashed(own.file)[0]["data"].get("weights")
        if begun_from != hashlib.sha256(encoder_file(subject.encoder)).hexdigest():
            raise UserError(
                f"{said}: was not trained on the newest checkpoint of {subject.run}; evaluate the run that it is of"
            )
    if subject.part is not None and own.ids != hashlib.sha256(subject.train_ids.tobytes()).hexdigest():
        raise UserError(f"{said}: was trained on images of {subject.part}; leave --validation out, or probe with it")
