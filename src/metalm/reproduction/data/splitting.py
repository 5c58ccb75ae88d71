"""Splits by group: what belongs together, such as the claims about a passage, is on one side.

Which side is decided by the hash of a group's name alone, so that it is the same everywhere, and in all tasks
that have a group in common.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
"""Of the groups; the others are for training."""


def normalised(text: str) -> str:
    """A text without case, punctuation and runs of spaces: what reads the same is the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def place_of(name: str) -> float:
    """A number in 0..1 for a name, as if drawn."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:7]) / 2**56


def side_of(group: str) -> str:
    """`train`, `validation` or `test`."""
    place = place_of(group)
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def split_by_group(
    items: Iterable[Item],
    group: Callable[[Item], str],
    most: Mapping[str, int] | None = None,
    unit: Callable[[Item], str] | None = None,
) -> dict[str, list[Item]]:
    """Items on three sides, whole groups each; the units of a side are in an order as if at random.

    Args:
        group: the name of the group that an item belongs to.
        most: by side, how many of its items are kept, those of its first units.
        unit: a part of a group whose items stay next to each other; default: the group.
    """
    sides: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    for item in sorted(items, key=lambda item: place_of(f"order {(unit or group)(item)}")):
        sides[side_of(group(item))].append(item)
    return {side: kept[: (most or {}).get(side, len(kept))] for side, kept in sides.items()}


def owners_split(
    train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """Three sides of an owner's two: validation is taken from training, whole groups each.

    Records of training whose group, such as the same picture, is in the test are left out.

    Args:
        train, test: records with their `group`.
    """
    tested = {record["group"] for record in test}
    others = [record for record in train if record["group"] not in tested]
    sides: dict[str, list[Any]] = {"train": [], "validation": []}
    for record in others:
        sides["validation" if side_of(record["group"]) == "validation" else "train"].append(record)
    return sides | {"test": list(test)}


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
