"""The results of a run on its page, each with its protocol, beside the numbers that papers publish."""

from collections.abc import Iterable, Sequence

from ssl_dist import results
from ssl_dist.report.published import Published
from ssl_dist.report.run import Run


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


def remarks(run: Run, row: Published) -> list[str]:
    """The variant that a published number is of, and how long its training was compared with this one."""
    remarks = [row.variant] if row.variant else []
    if row.backbone is None:
        remarks.append("backbone not named")
    if row.epochs is not None:
        batch = "" if row.batch_size is None else f" of batches of {row.batch_size:,}"
        here = f"{run.lines[-1]['epoch']:.4g} of {run.config.optim.batch_size:,}" if run.lines else "none"
        remarks.append(f"{row.epochs:,} epochs{batch}; here {here}")
    return remarks


def nearest(run: Run, row: Published) -> dict | None:
    """The run's own result that was measured most nearly alike, on a whole split."""
    measured = [record for record in run.records if record["dataset"] == row.dataset]
    for beginning in row.like:
        for record in filter(results.is_of_a_whole_split, measured):
            name = record["name"]
            is_alike = name.startswith(beginning) and ("train" in name) == ("train" in beginning)
            if is_alike and ("top1" in name or "top-1" not in row.result):
                return record
    return None
