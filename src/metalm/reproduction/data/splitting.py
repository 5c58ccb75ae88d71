"""Splits by group: what belongs together, such as the claims about a passage, is on one side.

Which side is decided by the hash of a group's name alone, so that it is the same everywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")
SPLITS = ("train", "validation", "test")


def normalised(text: str) -> str:
    """A text without case, punctuation and runs of spaces: what reads the same is the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def order_of(name: str) -> bytes:
    """A number for a name, by which to sort as if at random."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def split_by_group(
    items: Iterable[Item], group: Callable[[Item], str], sizes: Mapping[str, int]
) -> dict[str, list[Item]]:
    """Items on three sides, whole groups each; items of a side are in an order as if at random.

    Args:
        group: the name of the group that an item belongs to.
        sizes: by `validation` and `test`, at least so many items; by `train`, at most so many: of a larger
            rest, only the first groups are kept.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(item)
    sides: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for name in sorted(groups, key=order_of):
        for side in ("test", "validation", "train"):
            if len(sides[side]) < sizes.get(side, len(groups) + sum(map(len, groups.values()))):
                sides[side] += groups[name]
                break
    return sides


def connected(rows: Sequence[Iterable[Hashable]]) -> list[int]:
    """Which connected group each row is in: rows that share a value are in one, and so are those between.

    Returns:
        For each row the number of the first row of its group.
    """
    parents = list(range(len(rows)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    first_with: dict[Hashable, int] = {}
    for number, values in enumerate(rows):
        for value in values:
            one, other = sorted((root(number), root(first_with.setdefault(value, number))))
            parents[other] = one
    return [root(number) for number in range(len(rows))]
