"""Is a run healthy? Verdicts in words from what it logged (metrics.jsonl), each with its numbers, threshold and remedy.

Pure functions of the lines of metrics.jsonl: dicts with step, epoch, loss, lr, feature_std, effective_rank, data_wait,
seconds_per_step and what a method adds. A verdict that is not `fine` names what to do. The thresholds are rules of
thumb; they were set so that no healthy run of this project's methods raises an alarm.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ssl_dist.config import Optim

# fine; note: no illness, but worth knowing; look: perhaps an illness; ill; unknown: it was not logged, or too little.
LEVELS = ("ill", "look", "note", "unknown", "fine")

COLLAPSED_STD, THIN_STD = 0.05, 0.1  # feature_std is 1 for isotropic features, about 0.5 for those after a ReLU
COLLAPSED_RANK, THIN_RANK = 2.0, 5.0  # directions that are left
SATURATED, EARLY = 99.0, 0.25  # percent of pairs that the relation head gets right; share of the training
CHANCE, ONE_SIDED = 1.0, 60.0  # percentage points from 50; between positives and negatives
WAITING, STARVING = 0.1, 0.3  # share of the time in which the loop stood still for want of images
LOST = 0.5  # share of the loss's fall that it has given back
FALLING = 0.05  # share of its whole fall by which it fell from the third quarter of the training to the last
WARM_UP = 0.5  # share of the training
FAST_ADAM, FAST_SGD = 0.01, 1.0
HUGE = 1e100
SPANS = 8  # the training is looked at in so many equal parts
FEWEST = 2 * SPANS  # lines below which nothing is said of the course of a loss


@dataclass(frozen=True)
class Verdict:
    subject: str
    level: str  # one of LEVELS
    words: str
    measured: str
    threshold: str
    remedy: str = ""


def judge(lines: Sequence[dict], optim: Optim, total_steps: int | None) -> list[Verdict]:
    """All verdicts on a run, of which `lines` are those of metrics.jsonl in their order.

    total_steps: the length of its training; None: not known.
    """
    found = [progress(lines, total_steps), divergence(lines), still_falling(lines, total_steps), collapse(lines)]
    if any("accuracy_positive" in line for line in lines):
        found.append(relation_head(lines))
    return [*found, loader(lines), learning_rate(lines, optim, total_steps)]


def progress(lines: Sequence[dict], total_steps: int | None) -> Verdict:
    """Has the training come to its end?"""
    threshold = "the last step that the config asks for"
    if not lines or total_steps is None:
        return Verdict("End of training", "unknown", "No step was logged.", "no lines", threshold)
    step = lines[-1]["step"]
    measured = f"step {step:,} of {total_steps:,}"
    if step >= total_steps:
        return Verdict("End of training", "fine", "The training is complete.", measured, threshold)
    return Verdict(
        "End of training", "note", f"The run is at {100 * step / total_steps:.0f} % of its training: it is still "
        "going, or was stopped.", measured, threshold, "The same command goes on where it stopped.",
    )  # fmt: skip


def divergence(lines: Sequence[dict]) -> Verdict:
    """Does the loss rise again, or is it no number any more?"""
    subject, threshold = "Loss", f"it gives back less than {100 * LOST:.0f} % of its fall, and is a number throughout"
    losses = _of(lines, "loss")
    broken = [(step, value) for step, value in losses if not math.isfinite(value)]
    if broken:
        return Verdict(
            subject, "ill", f"The loss is not a number since step {broken[0][0]:,}.",
            f"loss {broken[0][1]} in {len(broken)} of {len(losses)} lines", threshold,
            "Go on from the checkpoint before it with a lower optim.lr or a longer optim.warmup_epochs; with bf16, try "
            "precision=fp32.",
        )  # fmt: skip
    if len(losses) < FEWEST:
        return _too_few(subject, losses, threshold)
    spans = _spans([value for _, value in losses])
    means = [statistics.fmean(span) for span in spans]
    low = min(range(SPANS), key=means.__getitem__)
    fall, rise = means[0] - means[low], means[-1] - means[low]
    noise = 3 * (_error(spans[-1]) + _error(spans[low]))
    measured = f"{_short(means[0])} in the first eighth, lowest {_short(means[low])}, {_short(means[-1])} in the last"
    if rise > noise and rise > LOST * fall:
        level = "ill" if rise >= fall else "look"
        worse = "and ends above where it began" if rise >= fall else f"and lost {100 * rise / fall:.0f} % of its fall"
        return Verdict(
            subject, level, f"The loss diverges: it rises again {worse}.", measured, threshold,
            "Lower optim.lr, lengthen optim.warmup_epochs, or let the rate fall (optim.schedule=cosine).",
        )  # fmt: skip
    if low == 0 or fall < 3 * (_error(spans[0]) + _error(spans[low])):
        return Verdict(
            subject, "look", "The loss has not fallen.", measured, threshold,
            "Try another optim.lr (three times more and less), and look at the views: does the task have an answer?",
        )  # fmt: skip
    return Verdict(subject, "fine", "The loss falls and stays low.", measured, threshold)


def still_falling(lines: Sequence[dict], total_steps: int | None) -> Verdict:
    """Would a longer training go on to lower the loss?"""
    subject = "Length"
    threshold = (
        f"from the third quarter to the last, less than {100 * FALLING:.0f} % of the whole fall, or of the noise"
    )
    losses = _of(lines, "loss")
    if not all(math.isfinite(value) for _, value in losses):
        return Verdict(subject, "unknown", "The loss is no number: mend that first.", "loss nan", threshold)
    if len(losses) < FEWEST:
        return _too_few(subject, losses, threshold)
    spans = _spans([value for _, value in losses])
    means = [statistics.fmean(span) for span in spans]
    quarters = [statistics.fmean(means[4:6]), statistics.fmean(means[6:])]
    fall, last = means[0] - min(means), quarters[0] - quarters[1]
    noise = math.hypot(*(_error(span) for span in spans[4:]))  # twice the standard error of the difference
    measured = f"{_short(quarters[0])} in the third quarter, {_short(quarters[1])} in the last"
    if fall > 0:
        measured += f": {100 * last / fall:.0f} % of the fall"
    if fall <= 0 or last < FALLING * fall or last < noise:
        return Verdict(subject, "fine", "The loss is level at the end.", measured, threshold)
    if total_steps is not None and lines[-1]["step"] < total_steps:
        return Verdict(subject, "fine", "The loss is falling, and the training goes on.", measured, threshold)
    return Verdict(
        subject, "note", "The loss is still falling at the end: a longer training would go on to learn.", measured,
        threshold, "Raise optim.epochs. With optim.schedule=constant the same run goes on; another schedule needs "
        "another run_dir.",
    )  # fmt: skip


def collapse(lines: Sequence[dict]) -> Verdict:
    """Do the representations of different images differ, and in more than a few directions?"""
    subject = "Collapse"
    threshold = (
        f"feature_std above {THIN_STD} (collapsed below {COLLAPSED_STD}), effective rank above {THIN_RANK:.0f} "
        f"(collapsed below {COLLAPSED_RANK:.0f})"
    )
    std, rank = _at_end(lines, "feature_std"), _at_end(lines, "effective_rank")
    if std is None and rank is None:
        return Verdict(subject, "unknown", "The health of the representations was not logged.", "no lines", threshold)
    measured = f"feature_std {_short(std)}, effective rank {_short(rank)} at the end"
    known = [value for value in (std, rank) if value is not None]
    if not all(map(math.isfinite, known)):
        return Verdict(
            subject, "ill", "The representations are not finite, or a batch holds a single one.", measured, threshold,
            "Look at the loss: where it is a number, raise optim.batch_size; else lower optim.lr.",
        )  # fmt: skip
    std, rank = std if std is not None else math.inf, rank if rank is not None else math.inf
    if std < COLLAPSED_STD or rank < COLLAPSED_RANK:
        which = "all images have nearly the same one" if std < COLLAPSED_STD else "one direction is left"
        return Verdict(
            subject, "ill", f"The representations have collapsed: {which}.", measured, threshold,
            "Lower optim.lr and begin anew; strengthen what keeps images apart (more negatives by a larger "
            "optim.batch_size, the variance or uniformity term of the method); check that views.groups leaves colour "
            "and place to tell images by.",
        )  # fmt: skip
    if std < THIN_STD or rank < THIN_RANK:
        return Verdict(
            subject, "look", "The representations use few directions or differ little.", measured, threshold,
            "Watch the curves of feature_std and effective_rank; if they still fall, treat it as a collapse.",
        )  # fmt: skip
    return Verdict(subject, "fine", "The representations are alive.", measured, threshold)


def relation_head(lines: Sequence[dict]) -> Verdict:
    """Does the relation head still have something to learn from its pairs?"""
    subject = "Relation head"
    threshold = f"between {50 + CHANCE:.0f} and {SATURATED:.0f} % of the pairs right, positives and negatives alike"
    both, positive, negative = (_at_end(lines, key) for key in ("accuracy", "accuracy_positive", "accuracy_negative"))
    known = [value for value in (both, positive, negative) if value is not None]
    if len(known) < 3 or not all(map(math.isfinite, known)):
        return Verdict(subject, "unknown", "The head's accuracy was not logged.", "no lines", threshold)
    measured = f"{both:.1f} % of the pairs right at the end (positives {positive:.1f} %, negatives {negative:.1f} %)"
    if both >= SATURATED:
        since = _saturated_since(lines)
        early = since is not None and since <= EARLY
        when = f", and were so after {100 * since:.0f} % of the training" if early else ""
        return Verdict(
            subject, "ill" if early else "look", f"The head is saturated: the pairs are too easy{when}.", measured,
            threshold, "Make the positives harder (smaller views.groups.0.random_resized_crop.scale, stronger "
            "color_jitter, grayscale) and the negatives nearer (larger optim.batch_size); train shorter if the data "
            "set is small.",
        )  # fmt: skip
    if abs(positive - negative) > ONE_SIDED:
        kind = "positive" if positive > negative else "negative"
        return Verdict(
            subject, "look", f"The head calls nearly every pair {kind}.", measured, threshold,
            "Lower optim.lr; check method.options.alpha, the weight of positives.",
        )  # fmt: skip
    if abs(both - 50) < CHANCE and len(lines) >= FEWEST:
        return Verdict(
            subject, "look", "The head guesses: it has learned nothing yet.", measured, threshold,
            "Train longer, or raise optim.lr; look at the views: can a person tell which belong together?",
        )  # fmt: skip
    return Verdict(subject, "fine", "The head learns: its pairs are neither hopeless nor trivial.", measured, threshold)


def loader(lines: Sequence[dict]) -> Verdict:
    """Do the images come as fast as the network takes them?"""
    subject = "Images"
    threshold = f"less than {100 * WAITING:.0f} % of the time spent waiting ({100 * STARVING:.0f} %: starving)"
    timed = [line for line in lines if _is_amount(line.get("data_wait")) and _is_amount(line.get("seconds_per_step"))]
    weighted = [
        (line["data_wait"], (line["step"] - before) * line["seconds_per_step"])
        for before, line in zip([0, *(line["step"] for line in timed)], timed, strict=False)
    ]
    weighted = weighted[1:] or weighted  # the first line has the start of the workers in it
    seconds = sum(time for _, time in weighted)
    if seconds <= 0:
        return Verdict(subject, "unknown", "The wait for images was not logged.", "no lines", threshold)
    wait = sum(share * time for share, time in weighted) / seconds
    measured = f"{100 * wait:.2g} % of the time"
    if wait < WAITING:
        return Verdict(subject, "fine", "The images come in time.", measured, threshold)
    return Verdict(
        subject, "ill" if wait >= STARVING else "look", "The loader starves the network: steps wait for images.",
        measured, threshold, "Use data.reader=ffcv, more cores (data.workers), a faster or local disk for data.root, "
        "or smaller stored images (ssl-dist convert --max-side).",
    )  # fmt: skip


def learning_rate(lines: Sequence[dict], optim: Optim, total_steps: int | None) -> Verdict:
    """Was the rate what the schedule means, and of a usual size for the optimizer?"""
    subject = "Learning rate"
    fast = {"adam": FAST_ADAM, "adamw": FAST_ADAM, "sgd": FAST_SGD}.get(optim.name)
    threshold = f"a warm-up shorter than {100 * WARM_UP:.0f} % of the training" + (
        f", at most {fast} for {optim.name}" if fast else ""
    )
    rates = [value for _, value in _of(lines, "lr") if math.isfinite(value)]
    epochs = [value for _, value in _of(lines, "epoch")]
    if not rates or not epochs:
        return Verdict(subject, "unknown", "The rate was not logged.", "no lines", threshold)
    measured = f"first {_short(rates[0])}, highest {_short(max(rates))}, last {_short(rates[-1])}; {optim.schedule}"
    if max(rates) == 0:
        return Verdict(subject, "ill", "The rate is 0: nothing is learned.", measured, threshold, "Raise optim.lr.")
    whole = epochs[-1] * max(1.0, (total_steps or 0) / max(1, lines[-1]["step"]))
    if optim.warmup_epochs > WARM_UP * whole:
        return Verdict(
            subject, "look", f"The warm-up of {optim.warmup_epochs:g} epochs takes most of the {whole:.3g} in all.",
            measured, threshold, "Shorten optim.warmup_epochs or train longer.",
        )  # fmt: skip
    if fast and max(rates) > fast:
        return Verdict(
            subject, "look", f"The rate is unusually high for {optim.name}.", measured, threshold, "Lower optim.lr."
        )
    return Verdict(subject, "fine", f"The rate is usual for {optim.name}.", measured, threshold)


def _of(lines: Sequence[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have the number; one of which no sum could be made counts as infinite."""
    found = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
    return [(step, math.inf if abs(value) > HUGE else float(value)) for step, value in found]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_amount(value: object) -> bool:
    return _is_number(value) and 0 <= value < HUGE


def _at_end(lines: Sequence[dict], key: str) -> float | None:
    """Mean over the last tenth of the lines that have the number."""
    values = [value for _, value in _of(lines, key)]
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _spans(values: Sequence[float]) -> list[Sequence[float]]:
    """SPANS equal parts, in order."""
    edges = [number * len(values) // SPANS for number in range(SPANS + 1)]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


def _error(values: Sequence[float]) -> float:
    """Standard error of their mean, from the steps between neighbours: a trend, however steep, is no noise."""
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    return statistics.median(steps) / 0.954 / math.sqrt(len(values))  # of two normal values: median 0.954 std


def _saturated_since(lines: Sequence[dict]) -> float | None:
    """The share of the training after which the accuracy has stayed at SATURATED; None when too little is logged."""
    values = [value for _, value in _of(lines, "accuracy")]
    if len(values) < FEWEST:
        return None
    below = [number for number, span in enumerate(_spans(values), 1) if statistics.fmean(span) < SATURATED]
    return max(below, default=0) / SPANS


def _too_few(subject: str, losses: Sequence, threshold: str) -> Verdict:
    words = f"Too few lines are logged to say: it takes {FEWEST}; lower log.every_steps for short runs."
    return Verdict(subject, "unknown", words, f"{len(losses)} line{'' if len(losses) == 1 else 's'}", threshold)


def _short(value: float | None) -> str:
    return "not logged" if value is None else f"{value:.4g}"
