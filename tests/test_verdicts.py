"""Every problem of a run is named with its numbers and a remedy, and healthy runs raise no alarm."""

import math

import numpy as np
import pytest

from ssl_dist.config import Optim
from ssl_dist.report import verdicts

ADAM = Optim()


def healthy(num_lines=100, every=20, seed=0, **changes):
    """Lines as relational reasoning writes them. changes: by key, another function of progress in [0, 1], or None."""
    noise = np.random.default_rng(seed).normal(size=(num_lines, 8))
    curves = {
        "loss": lambda t: 0.05 + 0.05 * math.exp(-6 * t),
        "lr": lambda t: 1e-3,
        "accuracy": lambda t: 50 + 32 * (1 - math.exp(-6 * t)),
        "accuracy_positive": lambda t: 50 + 33 * (1 - math.exp(-6 * t)),
        "accuracy_negative": lambda t: 50 + 31 * (1 - math.exp(-6 * t)),
        "feature_std": lambda t: 0.6 - 0.1 * t,
        "effective_rank": lambda t: 35 + 10 * t,
        "images_per_s": lambda t: 850.0,
        "data_wait": lambda t: 0.07 if t == 0 else 3e-4,
        "seconds_per_step": lambda t: 0.15,
    } | changes
    lines = []
    for number in range(num_lines):
        t = number / (num_lines - 1)
        line = {"step": every * number + 1, "epoch": (every * number + 1) / 390}
        for column, (key, curve) in enumerate(curves.items()):
            if curve is not None:
                is_noisy = key in ("loss", "accuracy", "accuracy_positive", "accuracy_negative")
                line[key] = curve(t) * (1 + 0.02 * noise[number, column % 8] * is_noisy)
        lines.append(line)
    return lines


def judged(lines, optim=ADAM, total=None):
    total = lines[-1]["step"] if total is None else total
    return {verdict.check: verdict for verdict in verdicts.judge(lines, optim, total)}


def the_only_alarm(lines, optim=ADAM):
    """The verdict that is no `ok` or `info`, of a run that has nothing else."""
    [alarm] = [v for v in judged(lines, optim).values() if v.level not in ("ok", "info")]
    assert alarm.words and alarm.measured and alarm.threshold and alarm.remedy and alarm.level in verdicts.LEVELS
    return alarm


HEALTHY = {
    "relational": {},
    "negative, and down at once": {"loss": lambda t: -4.3 + 0.8 * math.exp(-30 * t)},
    "a high first step": {"loss": lambda t: 13.7 if t == 0 else 1.5 + 0.4 * math.exp(-4 * t)},
    "labels drawn anew each epoch": {
        "loss": lambda t: 3.4 + math.exp(-3 * t) + 0.3 * math.exp(-5 * ((5 * t) % 1)),
        "accuracy": lambda t: 2.0 + 4 * t,
        "accuracy_positive": None,
    },
    "cosine": {"lr": lambda t: 1e-3 * (1 + math.cos(math.pi * t)) / 2},
    "features that thin out and recover": {
        "feature_std": lambda t: 0.3 - 0.2 * math.sin(math.pi * t),
        "effective_rank": lambda t: 40 - 22 * t,
    },
    "many directions": {"feature_std": None, "effective_rank": lambda t: 415.0},
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_runs_raise_no_alarm(kind):
    for seed in range(20):
        verdicts = judged(healthy(seed=seed, **HEALTHY[kind]))
        assert {v.check: v.measured for v in verdicts.values() if v.level not in ("ok", "info")} == {}


@pytest.mark.parametrize(
    ("key", "curve", "level", "measured"),
    [
        ("feature_std", lambda t: 0.5 * math.exp(-8 * t), "error", "feature_std 0.000"),
        ("effective_rank", lambda t: 1 + 30 * math.exp(-20 * t), "error", "effective rank 1"),
        ("effective_rank", lambda t: 3.0, "warning", "effective rank 3"),
        ("feature_std", lambda t: 0.08, "warning", "feature_std 0.08"),
        ("feature_std", lambda t: math.nan, "error", "feature_std nan"),
    ],
)
def test_collapse(key, curve, level, measured):
    alarm = the_only_alarm(healthy(**{key: curve}))
    assert (alarm.check, alarm.level) == ("Collapse", level) and measured in alarm.measured


def test_saturated_relation_head():
    early = exact(90.0, 90.0, 90.0)[:5] + exact(99.9, 99.9, 99.9)[5:]
    alarm = the_only_alarm(early)
    assert (alarm.check, alarm.level) == ("Relation head", "error") and "99.9 %" in alarm.measured
    assert "after 12 % of the training" in alarm.words
    alarm = the_only_alarm(exact(95.0, 95.0, 95.0)[:70] + early[70:])
    assert alarm.level == "warning" and "after" not in alarm.words
    few = judged(exact(99.9, 99.9, 99.9)[:10])["Relation head"]
    assert few.level == "warning" and "after" not in few.words  # ten lines do not say since when


def test_relation_head_that_guesses_or_gives_one_answer():
    assert "guesses" in the_only_alarm(exact(50.2, 52.0, 48.4)).words
    assert "nearly every pair positive" in the_only_alarm(exact(51.5, 99.0, 4.0)).words
    assert "nearly every pair negative" in the_only_alarm(exact(51.5, 4.0, 99.0)).words
    few = judged(exact(50.2, 52.0, 48.4)[:3])["Relation head"]
    assert few.level == "ok"  # three steps prove nothing


def exact(both, positive, negative):
    values = {"accuracy": both, "accuracy_positive": positive, "accuracy_negative": negative}
    return [line | values for line in healthy()]


@pytest.mark.parametrize(("share", "level"), [(0.2, "warning"), (0.6, "error")])
def test_starving_loader(share, level):
    alarm = the_only_alarm(healthy(data_wait=lambda t: share))
    assert (alarm.check, alarm.level) == ("Images", level) and f"{100 * share:.0f} %" in alarm.measured


def test_a_slow_start_is_no_starving_loader():
    lines = healthy(data_wait=lambda t: 0.9 * (t == 0), seconds_per_step=lambda t: 1000.0 if t == 0 else 0.15)
    assert judged(lines)["Images"].level == "ok"


def test_waiting_is_weighted_by_time():
    lines = healthy(data_wait=lambda t: 0.5 if t > 0.9 else 0.0, seconds_per_step=lambda t: 2.0 if t > 0.9 else 0.1)
    assert judged(lines)["Images"].level == "error"  # a tenth of the steps, most of the time


@pytest.mark.parametrize(
    ("loss", "level", "words"),
    [
        (lambda t: 0.1 - 0.05 * t if t < 0.5 else 0.075 + 0.2 * (t - 0.5), "error", "ends above where it began"),
        (lambda t: 0.1 - 0.1 * t if t < 0.5 else 0.05 + 0.075 * (t - 0.5), "warning", "of its fall"),
        (lambda t: 0.7, "warning", "has not fallen"),
        (lambda t: math.nan if t > 0.7 else 0.1 - 0.1 * t, "error", "not a number since step 1,401"),
        (lambda t: math.inf if t > 0.99 else 0.1 - 0.05 * t, "error", "not a number since step 1,981"),
    ],
)
def test_diverging_loss(loss, level, words):
    verdict = judged(healthy(loss=loss))["Loss"]
    assert verdict.level == level and words in verdict.words and verdict.remedy


def test_still_falling():
    lines = healthy(loss=lambda t: 1.0 - 0.5 * t)
    assert judged(lines)["Length"].level == "info" and "30 % of the fall" in judged(lines)["Length"].measured
    going_on = judged(lines, total=10 * lines[-1]["step"])
    assert going_on["Length"].level == "ok" and going_on["End of training"].level == "info"
    assert "10 %" in going_on["End of training"].words
    level = judged(healthy(loss=lambda t: 1.0 + math.exp(-30 * t)))["Length"]
    assert level.level == "ok" and not level.remedy


@pytest.mark.parametrize(
    ("lr", "optim", "words"),
    [
        (lambda t: 0.0, ADAM, "is 0"),
        (lambda t: 0.05, Optim(lr=0.05), "unusually high for adam"),
        (lambda t: 3.0, Optim(name="sgd", lr=3.0), "unusually high for sgd"),
        (lambda t: t * 1e-3, Optim(warmup_epochs=10), "warm-up of 10 epochs takes most of the 5.08 in all"),
    ],
)
def test_learning_rate(lr, optim, words):
    alarm = the_only_alarm(healthy(lr=lr), optim)
    assert alarm.check == "Learning rate" and words in alarm.words


def test_a_warm_up_is_compared_with_the_whole_training():
    lines = healthy(lr=lambda t: t * 1e-3)
    assert judged(lines, Optim(warmup_epochs=10), total=lines[-1]["step"] * 20)["Learning rate"].level == "ok"


def test_lars_takes_high_rates():
    assert judged(healthy(lr=lambda t: 9.6), Optim(name="lars", lr=9.6))["Learning rate"].level == "ok"


def test_what_is_not_logged_is_unknown():
    assert {v.level for v in verdicts.judge([], ADAM, None)} == {"unknown"}
    bare = [{"step": n, "epoch": n / 10} for n in range(1, 50)]
    assert {v.check for v in verdicts.judge(bare, ADAM, 49) if v.level != "unknown"} == {"End of training"}
    odd = [line | {"loss": "0.1", "data_wait": None, "feature_std": True} for line in bare]
    assert {v.check for v in verdicts.judge(odd, ADAM, 49) if v.level != "unknown"} == {"End of training"}
    few = judged(healthy(num_lines=5))
    assert few["Loss"].level == few["Length"].level == "unknown" and few["Loss"].measured == "5 lines"


def test_other_methods_have_no_relation_head():
    assert "Relation head" not in judged(healthy(accuracy_positive=None, accuracy_negative=None))
