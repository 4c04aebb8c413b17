"""Small plain-text tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_MOST_RUNS = 6


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table. Columns are as wide as their longest cell, with two spaces between them."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def runs(numbers: Iterable[int]) -> str:
    """Integers as short ranges: "0-28", "0, 2, ..., 30", "0-4, 6-10, ..., 54-58"."""
    ordered = sorted(set(numbers))
    found: list[list[int]] = []
    for number in ordered:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}{'-' if len(run) > 2 else ', '}{run[-1]}" for run in found]
    if len(words) > _MOST_RUNS:
        words = [*words[:2], "...", words[-1]]
    return ", ".join(words)
