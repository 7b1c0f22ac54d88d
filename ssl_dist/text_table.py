"""Text tables for a terminal. Columns are two spaces apart, and no line ends in spaces."""

from collections.abc import Container, Sequence


def aligned(rows: Sequence[Sequence[str]], right_aligned: Container[int] = ()) -> list[str]:
    """A line for each row. right_aligned: the columns whose cells end, rather than begin, in one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right_aligned else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def with_protocols(
    head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], right_aligned: Container[int] = ()
) -> str:
    """A table with a rule below its head. rows: cells and protocol; the last column says which footnote has that."""
    protocols = list(dict.fromkeys(protocol for _, protocol in rows))
    marked = [[*cells, f"[{protocols.index(protocol) + 1}]"] for cells, protocol in rows]
    head_line, *lines = aligned([[*head, ""], *marked], right_aligned)
    rule = "-" * max(map(len, [head_line, *lines]))
    footnotes = [f"[{number}] {protocol}" for number, protocol in enumerate(protocols, 1)]
    return "\n".join([head_line, rule, *lines, "", *footnotes])
