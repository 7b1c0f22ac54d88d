"""The results of a run on its page, each with its protocol, beside the numbers that papers publish."""

from collections.abc import Sequence

from ssl_dist import results
from ssl_dist.report.markup import Html, element, joined, number_cell, number_head, table
from ssl_dist.report.published import Published, beside
from ssl_dist.report.run import Run


def beside_published(run: Run) -> Html:
    """Two columns: what was measured, and what authors published."""
    own = element("div", element("h3", "This run"), _own(run)) if run.records else None
    return element("div", own, element("div", element("h3", "Published"), published(run)), class_="pair")


def _own(run: Run) -> Html:
    """A small table for each data set, split and protocol, so that many results take little room."""
    protocols = list(dict.fromkeys(record["protocol"] for record in run.records))
    groups: dict[tuple[str, str, str], list[list]] = {}
    for record in run.records:
        name = element("td", record["name"], stale(run, record))
        group = record["dataset"], record["split"], record["protocol"]
        groups.setdefault(group, []).append([name, number_cell(value(record))])
    tables = [
        table([element("th", f"{dataset}, {split}", mark(protocols, protocol), scope="col", colspan=2)], rows)
        for (dataset, split, protocol), rows in sorted(groups.items(), key=lambda item: item[0][:2])
    ]
    return joined(element("div", *tables, class_="scores"), footnotes(protocols))


def group_row(dataset: str, split: str, columns: int) -> Html:
    return element("td", f"{dataset}, {split}", colspan=columns, class_="group")


def value(record: dict) -> str:
    return "not converged" if record["name"].endswith("_converged") else results.number(record["value"])


def stale(run: Run, record: dict) -> Html | None:
    """Names the step of a number that is of another checkpoint than the newest."""
    if run.digest in (None, record["checkpoint"]):
        return None
    return element("small", f" (step {record['step']:,})")


def mark(texts: Sequence[str], text: str) -> Html:
    """The number of the footnote."""
    return element("sup", f"\N{NO-BREAK SPACE}{texts.index(text) + 1}")


def footnotes(texts: Sequence[str]) -> Html:
    return element("ol", *(element("li", text) for text in texts), class_="notes")


def has_published(run: Run) -> bool:
    return bool(beside(run.config))


def published(run: Run) -> Html:
    """The numbers of papers for the run's method, data set and backbone, each with its protocol and source."""
    papers, data = beside(run.config), run.config.data
    if not papers:
        why = "" if data.subset is None and data.limit is None else ", trained on a part of the images"
        words = f"No published number is known here for {run.title}{why} (ssl_dist/report/published.yaml)."
        return element("p", words, class_="none")
    texts = list(dict.fromkeys(map(_footnote, papers)))
    rows = []
    for row in papers:
        remarks = [row.variant, "backbone not named" if row.backbone is None else None, _length(run, row)]
        small = element("small", "; ".join(filter(None, remarks)))
        what = element("td", row.result, mark(texts, _footnote(row)), element("br"), small)
        rows.append([what, number_cell(results.number(row.value, row.std)), _nearest(run, row)])
    caution = "Another protocol, length or data set is no comparison: read the footnotes first."
    heads = ["paper", number_head("value"), number_head("nearest here")]
    return joined(table(heads, rows), footnotes(texts), element("p", caution, class_="none"))


def _footnote(row: Published) -> str:
    return f"{row.protocol}. {row.source}."


def _length(run: Run, row: Published) -> str | None:
    """The paper's training beside this one's."""
    if row.epochs is None:
        return None
    batch = "" if row.batch_size is None else f" of batches of {row.batch_size:,}"
    here = f"{run.lines[-1]['epoch']:.4g} of {run.config.optim.batch_size:,}" if run.lines else "none"
    return f"{row.epochs:,} epochs{batch}; here {here}"


def _nearest(run: Run, row: Published) -> Html:
    """The run's own result that was measured most nearly alike, on a whole split."""
    measured = [record for record in run.records if record["dataset"] == row.dataset]
    for beginning in row.like:
        for record in filter(results.is_of_a_whole_split, measured):
            name = record["name"]
            is_alike = name.startswith(beginning) and ("train" in name) == ("train" in beginning)
            if is_alike and ("top1" in name or "top-1" not in row.result):
                return number_cell(value(record), element("br"), element("small", name))
    return number_cell("–")
