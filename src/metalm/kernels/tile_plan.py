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
    `is_causal`: the first query sees the first key alone, and each further query one key more.
    """

    query_first: int
    query_last: int
    key_first: int
    key_last: int
    full_first: int
    full_last: int
    is_causal: bool

    @property
    def is_full(self) -> bool:
        return (self.full_first, self.full_last) == (self.key_first, self.key_last)


def plan_tiles(mask: IntervalMask) -> list[list[Tile]]:
    """Tiles of at most 128 queries of each mask row: all visible pairs once, no query that sees nothing."""
    return _plan(mask, keep_runs=False)


def plan_whole_runs(mask: IntervalMask) -> list[list[Tile]]:
    """The same, but causal and full tiles may be of any length."""
    return _plan(mask, keep_runs=True)


def _plan(mask: IntervalMask, keep_runs: bool) -> list[list[Tile]]:
    starts, ends = mask.start.cpu().numpy(), mask.end.cpu().numpy()
    return [
        [_tile(start, end, first, last) for first, last in _join(start, end, _pieces(start, end, keep_runs))]
        for start, end in zip(starts, ends, strict=True)
    ]


def _join(start: np.ndarray, end: np.ndarray, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins neighbours while the rectangle around them is short and wastes little."""
    joined = pieces[:1]
    for first, last in pieces[1:]:
        open_first, open_last = joined[-1]
        wasted = (last - open_first) * (end[last - 1] - start[open_first])
        wasted -= (open_last - open_first) * (end[open_last - 1] - start[open_first])
        wasted -= (last - first) * (end[last - 1] - start[first])
        fits = last - open_first <= _MAX_QUERIES and wasted <= _MAX_WASTED_PAIRS
        if first == open_last and fits:
            joined[-1] = (open_first, last)
        else:
            joined.append((first, last))
    return joined


def _pieces(start: np.ndarray, end: np.ndarray, keep_runs: bool) -> list[tuple[int, int]]:
    """Runs of rows that see something, whose interval stays or grows key by key, cut to a tile's length."""
    visible = end > start
    growth = np.diff(end, prepend=0)
    begins = (np.diff(start, prepend=-1) != 0) | (np.diff(visible, prepend=~visible[:1])) | (growth > 1)
    # Where a run begins, its end may be anywhere; from the next row on it stays, or grows by one.
    turns = (np.diff(growth, prepend=growth[:1]) != 0) & ~np.roll(begins, 1)
    edges = [*(int(edge) for edge in np.flatnonzero(begins | turns)), len(start)]
    pieces: list[tuple[int, int]] = []
    for first, last in pairwise(edges):
        if visible[first]:
            whole = keep_runs and (_is_causal(start, end, first, last) or end[first] == end[last - 1])
            num_parts = 1 if whole else -(-(last - first) // _MAX_QUERIES)
            cuts = [first + (last - first) * part // num_parts for part in range(num_parts + 1)]
            pieces += pairwise(cuts)
    return pieces


def _is_causal(start: np.ndarray, end: np.ndarray, first: int, last: int) -> bool:
    grows = start[first] + 1 + np.arange(last - first)
    return bool((start[first:last] == start[first]).all() and (end[first:last] == grows).all())


def _tile(start: np.ndarray, end: np.ndarray, first: int, last: int) -> Tile:
    key_last, full_first, full_last = int(end[last - 1]), int(start[last - 1]), int(end[first])
    if full_first >= full_last:
        full_first = full_last = key_last
    is_causal = _is_causal(start, end, first, last)
    return Tile(first, last, int(start[first]), key_last, full_first, full_last, is_causal)
