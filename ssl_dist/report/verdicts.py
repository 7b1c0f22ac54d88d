"""Is a run healthy? Verdicts in words from what it logged (metrics.jsonl), each with its numbers, threshold and remedy.

Pure functions of the lines of metrics.jsonl: dicts with step, epoch, loss, lr, feature_std, effective_rank, data_wait,
seconds_per_step and what a method adds. A verdict that is not `ok` names what to do. The thresholds are rules of thumb;
they were set so that no healthy run of this project's methods raises an alarm.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeGuard, get_args

from ssl_dist.config import Optim, usual

# By seriousness. info: worth knowing, no fault; warning: perhaps a fault; unknown: not logged, or too little of it.
Level = Literal["error", "warning", "info", "unknown", "ok"]
LEVELS: tuple[Level, ...] = get_args(Level)

COLLAPSED_STD, THIN_STD = 0.05, 0.1  # feature_std is 1 for isotropic features, about 0.5 for those after a ReLU
COLLAPSED_RANK, THIN_RANK = 2.0, 5.0  # effective rank, in directions
SATURATED_PERCENT = 99.0  # of the pairs that the relation head gets right
EARLY_SHARE = 0.25  # of the training, within which a head should not saturate
CHANCE_POINTS, ONE_SIDED_POINTS = 1.0, 60.0  # percentage points from 50; between positives and negatives
SLOW_WAIT, STARVING_WAIT = 0.1, 0.3  # share of the time in which the loop waited for images
LOST_SHARE = 0.5  # share of the loss's fall that it has lost again
FALLING_SHARE = 0.05  # share of its whole fall by which it fell from the third quarter of the training to the last
WARM_UP_SHARE = 0.5  # of the training
MAX_LR = {name: high for name, (_, high) in usual.LEARNING_RATES.items()}
MAX_MAGNITUDE = 1e100  # of a number that sums can be made of
SPANS = 8  # equal parts of the training that are compared
MIN_LINES = 2 * SPANS  # below which nothing is said of the course of a loss


@dataclass(frozen=True)
class Verdict:
    """What one check says of a run: its numbers, what they should be, and the remedy where they are not."""

    check: str
    threshold: str
    level: Level
    words: str
    measured: str
    remedy: str = ""


def judge(lines: Sequence[dict], optim: Optim, total_steps: int | None) -> list[Verdict]:
    """All verdicts on a run, of which `lines` are those of metrics.jsonl in their order.

    total_steps: the length of its training; None: not known.
    """
    verdicts = [progress(lines, total_steps), divergence(lines), still_falling(lines, total_steps), collapse(lines)]
    if any("accuracy_positive" in line for line in lines):
        verdicts.append(relation_head(lines))
    return [*verdicts, loader(lines), learning_rate(lines, optim, total_steps)]


def progress(lines: Sequence[dict], total_steps: int | None) -> Verdict:
    """Has the training come to its end?"""
    verdict = partial(Verdict, "End of training", "the last step that the config asks for")
    if not lines or total_steps is None:
        return verdict("unknown", "No step was logged.", "no lines")
    step = lines[-1]["step"]
    measured = f"step {step:,} of {total_steps:,}"
    if step >= total_steps:
        return verdict("ok", "The training is complete.", measured)
    words = f"The run is at {100 * step / total_steps:.0f} % of its training: it is still going, or was stopped."
    return verdict("info", words, measured, "The same command goes on where it stopped.")


def divergence(lines: Sequence[dict]) -> Verdict:
    """Does the loss rise again, or is it no number any more?"""
    threshold = f"it gives back less than {100 * LOST_SHARE:.0f} % of its fall, and is a number throughout"
    verdict = partial(Verdict, "Loss", threshold)
    losses = _values(lines, "loss")
    broken = [(step, value) for step, value in losses if not math.isfinite(value)]
    if broken:
        return verdict(
            "error", f"The loss is not a number since step {broken[0][0]:,}.",
            f"loss {broken[0][1]} in {len(broken)} of {len(losses)} lines",
            "Go on from the checkpoint before it with a lower optim.lr or a longer optim.warmup_epochs; with bf16, try "
            "precision=fp32.",
        )  # fmt: skip
    if len(losses) < MIN_LINES:
        return verdict("unknown", *_too_few(losses))
    spans = _spans([value for _, value in losses])
    means = [statistics.fmean(span) for span in spans]
    low = min(range(SPANS), key=means.__getitem__)
    fall, rise = means[0] - means[low], means[-1] - means[low]
    noise = 3 * (_standard_error(spans[-1]) + _standard_error(spans[low]))
    measured = f"{_short(means[0])} in the first eighth, lowest {_short(means[low])}, {_short(means[-1])} in the last"
    if rise > noise and rise > LOST_SHARE * fall:
        worse = "and ends above where it began" if rise >= fall else f"and lost {100 * rise / fall:.0f} % of its fall"
        return verdict(
            "error" if rise >= fall else "warning", f"The loss diverges: it rises again {worse}.", measured,
            "Lower optim.lr, lengthen optim.warmup_epochs, or let the rate fall (optim.schedule=cosine).",
        )  # fmt: skip
    if low == 0 or fall < 3 * (_standard_error(spans[0]) + _standard_error(spans[low])):
        return verdict(
            "warning", "The loss has not fallen.", measured,
            "Try another optim.lr (three times more and less), and look at the views: does the task have an answer?",
        )  # fmt: skip
    return verdict("ok", "The loss falls and stays low.", measured)


def still_falling(lines: Sequence[dict], total_steps: int | None) -> Verdict:
    """Would a longer training go on to lower the loss?"""
    share = f"less than {100 * FALLING_SHARE:.0f} % of the whole fall, or of the noise"
    verdict = partial(Verdict, "Length", f"from the third quarter to the last, {share}")
    losses = _values(lines, "loss")
    if not all(math.isfinite(value) for _, value in losses):
        return verdict("unknown", "The loss is no number: mend that first.", "loss nan")
    if len(losses) < MIN_LINES:
        return verdict("unknown", *_too_few(losses))
    spans = _spans([value for _, value in losses])
    means = [statistics.fmean(span) for span in spans]
    quarters = [statistics.fmean(means[4:6]), statistics.fmean(means[6:])]
    fall, last = means[0] - min(means), quarters[0] - quarters[1]
    noise = math.hypot(*(_standard_error(span) for span in spans[4:]))  # twice the standard error of the difference
    measured = f"{_short(quarters[0])} in the third quarter, {_short(quarters[1])} in the last"
    if fall > 0:
        measured += f": {100 * last / fall:.0f} % of the fall"
    if fall <= 0 or last < FALLING_SHARE * fall or last < noise:
        return verdict("ok", "The loss is level at the end.", measured)
    if total_steps is not None and lines[-1]["step"] < total_steps:
        return verdict("ok", "The loss is falling, and the training goes on.", measured)
    return verdict(
        "info", "The loss is still falling at the end: a longer training would go on to learn.", measured,
        "Raise optim.epochs. With optim.schedule=constant the same run goes on; another schedule needs another "
        "run_dir.",
    )  # fmt: skip


def collapse(lines: Sequence[dict]) -> Verdict:
    """Do the representations of different images differ, and in more than a few directions?"""
    threshold = (
        f"feature_std above {THIN_STD} (collapsed below {COLLAPSED_STD}), effective rank above {THIN_RANK:.0f} "
        f"(collapsed below {COLLAPSED_RANK:.0f})"
    )
    verdict = partial(Verdict, "Collapse", threshold)
    std, rank = _at_end(lines, "feature_std"), _at_end(lines, "effective_rank")
    if std is None and rank is None:
        return verdict("unknown", "The health of the representations was not logged.", "no lines")
    measured = f"feature_std {_short(std)}, effective rank {_short(rank)} at the end"
    if not all(math.isfinite(value) for value in (std, rank) if value is not None):
        return verdict(
            "error", "The representations are not finite, or a batch holds a single one.", measured,
            "Look at the loss: where it is a number, raise optim.batch_size; else lower optim.lr.",
        )  # fmt: skip
    std, rank = std if std is not None else math.inf, rank if rank is not None else math.inf
    if std < COLLAPSED_STD or rank < COLLAPSED_RANK:
        which = "all images have nearly the same one" if std < COLLAPSED_STD else "one direction is left"
        return verdict(
            "error", f"The representations have collapsed: {which}.", measured,
            "Lower optim.lr and begin anew; strengthen what keeps images apart (more negatives by a larger "
            "optim.batch_size, the variance or uniformity term of the method); check that views.groups leaves colour "
            "and place to tell images by.",
        )  # fmt: skip
    if std < THIN_STD or rank < THIN_RANK:
        return verdict(
            "warning", "The representations use few directions or differ little.", measured,
            "Watch the curves of feature_std and effective_rank; if they still fall, treat it as a collapse.",
        )  # fmt: skip
    return verdict("ok", "The representations are alive.", measured)


def relation_head(lines: Sequence[dict]) -> Verdict:
    """Does the relation head still have something to learn from its pairs?"""
    usual = f"between {50 + CHANCE_POINTS:.0f} and {SATURATED_PERCENT:.0f} %"
    verdict = partial(Verdict, "Relation head", f"{usual} of the pairs right, positives and negatives alike")
    logged = [_at_end(lines, key) for key in ("accuracy", "accuracy_positive", "accuracy_negative")]
    accuracies = [value for value in logged if value is not None and math.isfinite(value)]
    if len(accuracies) < 3:
        return verdict("unknown", "The head's accuracy was not logged.", "no lines")
    both, positive, negative = accuracies
    measured = f"{both:.1f} % of the pairs right at the end (positives {positive:.1f} %, negatives {negative:.1f} %)"
    if both >= SATURATED_PERCENT:
        since = _saturated_since(lines)
        early = since <= EARLY_SHARE
        when = f", and were so after {100 * since:.0f} % of the training" if early else ""
        return verdict(
            "error" if early else "warning", f"The head is saturated: the pairs are too easy{when}.", measured,
            "Make the positives harder (smaller views.groups.0.random_resized_crop.scale, stronger color_jitter, "
            "grayscale) and the negatives nearer (larger optim.batch_size); train shorter if the data set is small.",
        )  # fmt: skip
    if abs(positive - negative) > ONE_SIDED_POINTS:
        kind = "positive" if positive > negative else "negative"
        return verdict(
            "warning", f"The head calls nearly every pair {kind}.", measured,
            "Lower optim.lr; check method.options.alpha, the weight of positives.",
        )  # fmt: skip
    if abs(both - 50) < CHANCE_POINTS and len(lines) >= MIN_LINES:
        return verdict(
            "warning", "The head guesses: it has learned nothing yet.", measured,
            "Train longer, or raise optim.lr; look at the views: can a person tell which belong together?",
        )  # fmt: skip
    return verdict("ok", "The head learns: its pairs are neither hopeless nor trivial.", measured)


def loader(lines: Sequence[dict]) -> Verdict:
    """Do the images come as fast as the network takes them?"""
    threshold = f"less than {100 * SLOW_WAIT:.0f} % of the time spent waiting ({100 * STARVING_WAIT:.0f} %: starving)"
    verdict = partial(Verdict, "Images", threshold)
    timed = [line for line in lines if is_amount(line.get("data_wait")) and is_amount(line.get("seconds_per_step"))]
    weighted = [
        (line["data_wait"], (line["step"] - before) * line["seconds_per_step"])
        for before, line in zip([0, *(line["step"] for line in timed)], timed, strict=False)
    ]
    weighted = weighted[1:] or weighted  # the first line has the start of the workers in it
    seconds = sum(time for _, time in weighted)
    if seconds <= 0:
        return verdict("unknown", "The wait for images was not logged.", "no lines")
    wait = sum(share * time for share, time in weighted) / seconds
    measured = f"{100 * wait:.2g} % of the time"
    if wait < SLOW_WAIT:
        return verdict("ok", "The images come in time.", measured)
    return verdict(
        "error" if wait >= STARVING_WAIT else "warning", "The loader starves the network: steps wait for images.",
        measured, "Use data.reader=ffcv, more cores (data.workers), a faster or local disk for data.root, or smaller "
        "stored images (ssl-dist convert --max-side).",
    )  # fmt: skip


def learning_rate(lines: Sequence[dict], optim: Optim, total_steps: int | None) -> Verdict:
    """Was the rate what the schedule means, and of a usual size for the optimizer?"""
    max_lr = MAX_LR.get(optim.name, math.inf)
    usual = f", at most {max_lr} for {optim.name}" if optim.name in MAX_LR else ""
    threshold = f"a warm-up shorter than {100 * WARM_UP_SHARE:.0f} % of the training{usual}"
    verdict = partial(Verdict, "Learning rate", threshold)
    rates = [value for _, value in _values(lines, "lr") if math.isfinite(value)]
    epochs = [value for _, value in _values(lines, "epoch")]
    if not rates or not epochs:
        return verdict("unknown", "The rate was not logged.", "no lines")
    measured = f"first {_short(rates[0])}, highest {_short(max(rates))}, last {_short(rates[-1])}; {optim.schedule}"
    if max(rates) == 0:
        return verdict("error", "The rate is 0: nothing is learned.", measured, "Raise optim.lr.")
    whole = epochs[-1] * max(1.0, (total_steps or 0) / max(1, lines[-1]["step"]))
    if optim.warmup_epochs > WARM_UP_SHARE * whole:
        words = f"The warm-up of {optim.warmup_epochs:g} epochs takes most of the {whole:.3g} in all."
        return verdict("warning", words, measured, "Shorten optim.warmup_epochs or train longer.")
    if max(rates) > max_lr:
        return verdict("warning", f"The rate is unusually high for {optim.name}.", measured, "Lower optim.lr.")
    return verdict("ok", f"The rate is usual for {optim.name}.", measured)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a line is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_amount(value: object) -> bool:
    return is_number(value) and 0 <= value < MAX_MAGNITUDE


def _values(lines: Sequence[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have the number; one of which no sum could be made counts as infinite."""
    logged = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    return [(step, math.inf if abs(value) > MAX_MAGNITUDE else float(value)) for step, value in logged]


def _at_end(lines: Sequence[dict], key: str) -> float | None:
    """Mean over the last tenth of the lines that have the number."""
    values = [value for _, value in _values(lines, key)]
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _spans(values: Sequence[float]) -> list[Sequence[float]]:
    """SPANS equal parts, in order."""
    edges = [number * len(values) // SPANS for number in range(SPANS + 1)]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


def _standard_error(values: Sequence[float]) -> float:
    """Of their mean, from the steps between neighbours: a trend, however steep, is no noise."""
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    return statistics.median(steps) / 0.954 / math.sqrt(len(values))  # of two normal values: median 0.954 std


def _saturated_since(lines: Sequence[dict]) -> float:
    """The share of the training after which the accuracy has stayed saturated; inf when too little is logged."""
    values = [value for _, value in _values(lines, "accuracy")]
    if len(values) < MIN_LINES:
        return math.inf
    below = [number for number, span in enumerate(_spans(values), 1) if statistics.fmean(span) < SATURATED_PERCENT]
    return max(below, default=0) / SPANS


def _too_few(losses: Sequence) -> tuple[str, str]:
    """The words, and what was measured."""
    words = f"Too few lines are logged to say: it takes {MIN_LINES}; lower log.every_steps for short runs."
    return words, f"{len(losses)} line{'' if len(losses) == 1 else 's'}"


def _short(value: float | None) -> str:
    return "not logged" if value is None else f"{value:.4g}"
