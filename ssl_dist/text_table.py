"""Tables as text: for a terminal, as Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Container, Sequence

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "×": r"$\times$", "–": "--", "−": "$-$", "…": r"\ldots{}",
}  # fmt: skip


def aligned(rows: Sequence[Sequence[str]], right_aligned: Container[int] = ()) -> list[str]:
    """A line for each row, for a terminal: columns are two spaces apart, and no line ends in spaces. right_aligned: the
    columns whose cells end, rather than begin, in one place."""
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


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right_aligned: Container[int] = ()) -> list[str]:
    """A line for the head, one below it, and one for each row."""
    rule = "".join("|---:" if column in right_aligned else "|---" for column in range(len(head))) + "|"
    head_line, *lines = (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (head, *rows)
    )
    return [head_line, rule, *lines]


def as_latex(
    head: Sequence[str], rows: Sequence[Sequence[str]], right_aligned: Container[int] = (), remarks: Sequence[str] = ()
) -> str:
    """A tabular that needs the package booktabs. remarks: comments above it, which a document does not show."""
    columns = "".join("r" if column in right_aligned else "l" for column in range(len(head)))
    head_line, *lines = (" & ".join(map(in_latex, cells)) + r" \\" for cells in (head, *rows))
    comments = [f"% {' '.join(remark.split())}" for remark in (r"\usepackage{booktabs}", *remarks)]
    table = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", head_line, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([*comments, *table, r"\end{tabular}", ""])


def in_latex(text: str) -> str:
    """Text as LaTeX prints it, ± and the sign of a number among it."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    escaped = re.sub(r"(?<![\w.$-])-(?=[\d.])", "$-$", escaped)
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped  # an option of the line's end before it


def as_csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated, quoted where needed; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([head, *rows])
    return text.getvalue()
