"""What a preparation counted: totals, what was dropped and why, and the same per subset."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

MAX_PLACES = 100
"""Dropped samples of one cause that a work unit remembers the places of."""

Place = dict[str, str | int]
"""Where a dropped sample was: `file`, and `line` (from 1) where the file has lines; of other files
`row_group` and `row`, `record` or `document`, from 0."""


class Tally:
    """Counters by subset; `dropped` counts by cause. Adds up over work units in any order.

    Attributes:
        places: of the first dropped samples of each cause.
        num_lines: that the unit has of its file; lines of its places count from its first.
    """

    def __init__(self) -> None:
        self.subsets: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.dropped: Counter[str] = Counter()
        self.places: defaultdict[str, list[Place]] = defaultdict(list)
        self.num_lines = 0

    def keep(self, subset: str, **amounts: int) -> None:
        """Counts one kept sample, or several, of a subset: for example `documents=1, tokens=17`."""
        self.subsets[subset].update(amounts)

    def drop(self, cause: str, place: Place | None = None) -> None:
        """Counts a sample that was left out; without a place where that was asked for."""
        self.dropped[cause] += 1
        if place is not None and len(self.places[cause]) < MAX_PLACES:
            self.places[cause].append(place)

    def as_json(self) -> dict[str, Any]:
        """Totals, `dropped` and `subsets`, all in sorted order."""
        total: Counter[str] = Counter()
        for amounts in self.subsets.values():
            total.update(amounts)
        return {
            **dict(sorted(total.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "subsets": {name: dict(sorted(self.subsets[name].items())) for name in sorted(self.subsets)},
        }

    def add(self, counted: Mapping[str, Any]) -> None:
        """Adds what another tally wrote by `as_json`."""
        for name, amounts in counted["subsets"].items():
            self.subsets[name].update(amounts)
        self.dropped.update(counted["dropped"])


def format_table(report: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """The subsets of a report, its total, and what was dropped, as aligned text."""
    rows = [("", *columns)]
    for name, amounts in report["subsets"].items():
        rows.append((name, *(f"{amounts.get(column, 0):,}" for column in columns)))
    rows.append(("total", *(f"{report.get(column, 0):,}" for column in columns)))
    rows += [(f"dropped: {cause}", f"{count:,}") for cause, count in report["dropped"].items()]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(
            zip(row, widths, strict=False))).rstrip()
        for row in rows
    )  # fmt: skip
