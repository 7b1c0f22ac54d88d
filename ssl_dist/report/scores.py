"""The results of a run on its page, each with its protocol, beside the numbers that papers publish."""

from collections.abc import Iterable, Sequence

from ssl_dist import results
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
    return published.differences(row, run.config, record, epochs_at(run, record["step"]))


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
