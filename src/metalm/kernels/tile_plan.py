"""Cuts an interval mask into rectangles for the tiled backend, on the host.

Rows are cut where the interval's shape changes (a document or span begins, an empty row), long runs into
equal parts, and short neighbours are joined again while the rectangle around them wastes little.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from metalm.kernels.interval_mask import IntervalMask

_MAX_QUERIES = 128
# Pairs that may be computed in vain to save starting one more tile: about the same cost at 8 heads of 64.
_MAX_WASTED_PAIRS = 4096


class Tile(NamedTuple):
    """Queries `[query_first, query_last)` and all keys that any of them sees, `[key_first, key_last)`.

    Keys of `[full_first, full_last)` are seen by all of the queries; only the others need a test per element.
    """

    query_first: int
    query_last: int
    key_first: int
    key_last: int
    full_first: int
    full_last: int


def plan_tiles(mask: IntervalMask) -> list[list[Tile]]:
    """The tiles of each mask row. They hold all visible pairs once, and no query that sees nothing."""
    starts, ends = mask.start.cpu().numpy(), mask.end.cpu().numpy()
    return [_plan_row(start, end) for start, end in zip(starts, ends, strict=True)]


def _plan_row(start: np.ndarray, end: np.ndarray) -> list[Tile]:
    tiles: list[Tile] = []
    open_first = open_last = 0
    for first, last in _pieces(start, end):
        if last - open_first <= _MAX_QUERIES and first == open_last and open_last > open_first:
            wasted = (last - open_first) * (end[last - 1] - start[open_first])
            wasted -= (open_last - open_first) * (end[open_last - 1] - start[open_first])
            wasted -= (last - first) * (end[last - 1] - start[first])
            if wasted <= _MAX_WASTED_PAIRS:
                open_last = last
                continue
        if open_last > open_first:
            tiles.append(_tile(start, end, open_first, open_last))
        open_first, open_last = first, last
    if open_last > open_first:
        tiles.append(_tile(start, end, open_first, open_last))
    return tiles


def _pieces(start: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    """Runs of rows that see something and whose interval stays or grows key by key, at most one tile long."""
    visible = end > start
    growth = np.diff(end, prepend=end[:1])
    changes = (
        (np.diff(start, prepend=start[:1]) != 0)
        | (np.diff(visible, prepend=visible[:1]))
        | (growth > 1)
        | (np.diff(growth, prepend=growth[:1]) != 0)
    )
    edges = [0, *np.flatnonzero(changes[1:]) + 1, len(start)]
    pieces: list[tuple[int, int]] = []
    for first, last in pairwise(edges):
        if last > first and visible[first]:
            num_parts = -(-(last - first) // _MAX_QUERIES)
            cuts = [first + (last - first) * part // num_parts for part in range(num_parts + 1)]
            pieces += pairwise(cuts)
    return [(int(first), int(last)) for first, last in pieces]


def _tile(start: np.ndarray, end: np.ndarray, first: int, last: int) -> Tile:
    key_last, full_first, full_last = int(end[last - 1]), int(start[last - 1]), int(end[first])
    if full_first >= full_last:
        full_first = full_last = key_last
    return Tile(first, last, int(start[first]), key_last, full_first, full_last)
