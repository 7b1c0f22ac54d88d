"""The results of a run on its page, each with its protocol, beside the numbers that papers publish."""

import math
import re
from collections.abc import Iterable, Sequence

from ssl_dist import methods, results
from ssl_dist.report import published
from ssl_dist.report.published import Published
from ssl_dist.report.run import Run, command


def distinct(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order in which they come first: footnotes."""
    return list(dict.fromkeys(texts))


def alike(records: Sequence[dict]) -> list[tuple[tuple[str, str, str], list[dict]]]:
    """The records by data set, split and protocol, so that many take little room."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["dataset"], record["split"], record["protocol"]), []).append(record)
    return sorted(groups.items(), key=lambda item: item[0][:2])


def value(record: dict) -> str:
    return "not converged" if record["name"].endswith("_converged") else results.number(record["value"])


def remarks(row: Published) -> list[str]:
    """What a published number is of: its variant, its training, and where it stands in the source."""
    remarks = [row.variant] if row.variant else []
    if row.epochs is not None:
        remarks.append(f"{row.epochs:,} epochs" + (f" of batches of {row.batch_size:,}" if row.batch_size else ""))
    if row.views is not None:
        remarks.append(f"K = {row.views}")
    if row.seeds is not None:
        remarks.append(f"mean of {row.seeds} seeds")
    return [*remarks, row.line]


def measured_alike(run: Run, row: Published) -> list[dict]:
    """The run's results that may stand beside the number."""
    return published.measured_alike(row, run.config, run.records)


def differences(run: Run, row: Published, record: dict) -> list[str]:
    """What differs, in words, between the number and a result that agrees with it."""
    config, found = run.config, []
    epochs = epochs_at(run, record["step"])
    if row.epochs is not None and (epochs is None or not math.isclose(epochs, row.epochs, rel_tol=0.005)):
        found.append(f"{row.epochs:,} epochs, here {'unknown' if epochs is None else f'{epochs:.4g}'}")
    if row.batch_size not in (None, config.optim.batch_size):
        found.append(f"batches of {row.batch_size:,}, here of {config.optim.batch_size:,}")
    views = config.num_views or getattr(methods.find(config.method.name), "num_views", None)
    if row.views not in (None, views):
        found.append(f"K = {row.views}, here {views}")
    if (row.seeds or 1) > 1:
        found.append(f"mean of {row.seeds} seeds, here of one")
    if config.backbone.weights is not None:
        found.append("here it began from weights of a file")
    crops = record["options"].get("crops") or (10 if re.search(r"\b(10|ten) crops", record["protocol"]) else 1)
    if row.protocol.crops not in (None, crops):
        found.append(f"{row.protocol.crops} crops of a test image, here {crops}")
    if "recipe" in row.protocol.options:  # what else is set replaces a value of the recipe
        for key, value in record["options"].items():
            if key not in ("recipe", "crops") and value is not None:
                found.append(f"here {row.protocol.evaluator}.{key}={value}")
    return found


def epochs_at(run: Run, step: int) -> float | None:
    """Epochs that the training had done after `step` steps; None: its log does not tell."""
    if not run.lines or not run.lines[-1]["step"]:
        return None
    return step * run.lines[-1]["epoch"] / run.lines[-1]["step"]


def missing(run: Run, row: Published) -> str:
    """Why no result of the run stands beside the number, in one line; commands between backticks."""
    if row.split is None:
        return "the source does not tell which images were measured"
    if row.protocol.evaluator is None:
        return "no evaluator measures it so"
    if not published.is_of_variant(row, run.config):
        return "of another variant: " + ", ".join(f"{key} {value}" for key, value in row.options.items())
    words = [row.protocol.evaluator]
    words += [f"{words[0]}.{key}={value}" for key, value in row.protocol.options.items() if value is not None]
    if row.measured_on is not None:
        words += [f"data.name={row.measured_on}", f"data.root=data/{row.measured_on}"]
    return f"not measured yet: {command(run, 'evaluate', *words)}"
