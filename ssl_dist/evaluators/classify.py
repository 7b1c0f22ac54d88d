"""Inference alone: what a trained classifier makes of the test split, of its own data set or of another one."""

from pathlib import Path

from pydantic import Field

from ssl_dist import features
from ssl_dist.config import Section
from ssl_dist.errors import UserError
from ssl_dist.evaluators.classification import classify, draw
from ssl_dist.evaluators.subject import Subject
from ssl_dist.methods.base import SSLMethod


class Options(Section):
    head: str | None = Field(
        None, description="folder of a probe or a fine-tuning, as RUN/evaluations has; null: the run's own classifier"
    )


def protocol(options: Options) -> str:
    whose = "the run's own classifier" if options.head is None else f"the classifier of {Path(options.head).name}"
    return f"inference by {whose}, all test images, centre crop"


def measure(subject: Subject, options: Options) -> dict[str, float]:
    """`classify_top1` and `classify_top5` in percent. Raises `UserError` when there is no classifier."""
    path = subject.run if options.head is None else Path(options.head)
    method, encoder = features.load_method(path)
    if type(method).logits is SSLMethod.logits:
        raise UserError(
            f"classify.head = {options.head!r}: {path} holds {encoder.config.method.name}, which does not classify; "
            "give the folder of a probe or a fine-tuning (RUN/evaluations/...), or a supervised run"
        )
    world = subject.world
    found = classify(method, encoder, subject.source, subject.test, world, world.place.cores, subject.test_ids)
    draw(found, subject, "classify", "the classifier")
    return found.values("classify")
