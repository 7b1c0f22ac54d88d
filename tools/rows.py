"""What a benchmark found, as rows `| what | result |`: tools/bench_all.py makes docs/benchmarks.md of them.

No other line that a benchmark prints begins with "| ".
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence


def show(rows: Iterable[tuple[str, str]]) -> None:
    """Print (what, result) of every case, which come last."""
    for what, result in rows:
        print(f"| {what} | {result} |", flush=True)


def beside(ours: Sequence[float], others: Mapping[str, Sequence[float]], unit: str = "", is_rate: bool = False) -> str:
    """`177 ms beside 854 ms of a port: 4.8x (4.4-5.9)`: medians of the rounds, then how much better ours is. is_rate:
    more is better."""
    sides = (
        f"{figure(statistics.median(values))}{unit} {name}: {ratio(*((ours, values) if is_rate else (values, ours)))}"
        for name, values in others.items()
    )
    return f"{figure(statistics.median(ours))}{unit} beside {', '.join(sides)}"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Of the same rounds: the median of their ratios and, of several rounds, the range."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    spread = f" ({_digits(min(ratios))}-{_digits(max(ratios))})" if len(ratios) > 1 else ""
    return f"{_digits(statistics.median(ratios))}x{spread}"


def figure(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _digits(number: float) -> str:
    """Of a ratio: no more than rounds agree in."""
    return f"{number:.{2 if number < 2 else 1 if number < 10 else 0}f}"
