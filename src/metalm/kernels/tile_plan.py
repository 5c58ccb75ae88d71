"""Cuts an interval mask into rectangles for the tiled backend, on the host.

Rows are cut where the interval's shape changes (a document or span begins, an empty row), long runs into
equal parts, and short neighbours are joined again while the rectangle around them wastes little. Where
tiles may have any length, short runs of about one length are put together as one batch instead.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from metalm.kernels.interval_mask import IntervalMask

_MAX_QUERIES = 128
# Pairs that may be computed in vain to save starting one more tile: about the same cost at 8 heads of 64.
_MAX_WASTED_PAIRS = 4096
# Queries and keys of short runs, which are padded to multiples of the step, and batched where some are alike.
_MAX_SHORT_RUN = 64
_SHORT_RUN_STEP = 16
_MIN_RUNS_OF_BATCH = 4


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
    starts, ends = _bounds(mask)
    plan = []
    for start, end in zip(starts, ends, strict=True):
        pieces = _join(start, end, _pieces(start, end, keep_runs=False))
        plan.append([_tile(start, end, first, last) for first, last in pieces])
    return plan


@dataclass(frozen=True, eq=False)
class RunBatch:
    """Short runs of one padded shape: `[runs, queries]` times `[runs, keys]`, of all rows of a mask.

    Args:
        queries: int64 `[N, queries]`, indices into the elements `[B * Sq]`, -1 in the padding behind a run.
        keys: int64 `[N, keys]`, indices into `[B * Sk]`: all that any of the run's queries sees.
        is_causal: the first query of each run sees the first key alone, and each further query one key more.
    """

    queries: np.ndarray
    keys: np.ndarray
    is_causal: bool


@dataclass(frozen=True, eq=False)
class RunPlan:
    """Batches of short runs, and tiles `[B][...]` of the rest, causal and full ones of any length.

    Together all visible pairs once, and no query that sees nothing.
    """

    batches: list[RunBatch]
    tiles: list[list[Tile]]


def plan_runs(mask: IntervalMask) -> RunPlan:
    """Cuts a mask into batches of short runs and tiles."""
    starts, ends = _bounds(mask)
    pieces = [_pieces(start, end, keep_runs=True) for start, end in zip(starts, ends, strict=True)]
    alike: dict[tuple[int, int, bool], list[tuple[int, int, int]]] = defaultdict(list)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for first, last in pieces[row]:
            num_queries, num_keys = last - first, int(end[last - 1] - start[first])
            if max(num_queries, num_keys) <= _MAX_SHORT_RUN:
                shape = (_padded(num_queries), _padded(num_keys), _grows(start, end, first, last))
                alike[shape].append((row, first, last))
    batches, batched = [], set()
    for (num_queries, num_keys, is_causal), runs in alike.items():
        if len(runs) >= _MIN_RUNS_OF_BATCH:
            row, first, last = np.array(runs, dtype=np.int64).T
            queries = _elements(first, last, num_queries, row * mask.num_queries)
            keys = _elements(starts[row, first], ends[row, last - 1], num_keys, row * mask.num_keys)
            batches.append(RunBatch(queries, keys, is_causal))
            batched.update(runs)
    rest = []
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        left = [piece for piece in pieces[row] if (row, *piece) not in batched]
        rest.append([_tile(start, end, first, last) for first, last in _join(start, end, left)])
    return RunPlan(batches, rest)


def _bounds(mask: IntervalMask) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends on the host."""
    return mask.start.cpu().numpy(), mask.end.cpu().numpy()


def _padded(length: int) -> int:
    return -(-length // _SHORT_RUN_STEP) * _SHORT_RUN_STEP


def _elements(first: np.ndarray, last: np.ndarray, length: int, offset: np.ndarray) -> np.ndarray:
    """Of `[first, last)` in a row that begins at `offset`: int64 `[N, length]`, -1 behind the last."""
    element = first[:, None] + np.arange(length)
    return np.where(element < last[:, None], element + offset[:, None], -1)


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
            whole = keep_runs and (_grows(start, end, first, last) or end[first] == end[last - 1])
            num_parts = 1 if whole else -(-(last - first) // _MAX_QUERIES)
            cuts = [first + (last - first) * part // num_parts for part in range(num_parts + 1)]
            pieces += pairwise(cuts)
    return pieces


def _grows(start: np.ndarray, end: np.ndarray, first: int, last: int) -> bool:
    """Whether a piece is causal; of a piece, start and the growth of end are the same all over."""
    return bool(end[first] == start[first] + 1 and end[last - 1] - start[first] == last - first)


def _is_causal(start: np.ndarray, end: np.ndarray, first: int, last: int) -> bool:
    grows = start[first] + 1 + np.arange(last - first)
    return bool((start[first:last] == start[first]).all() and (end[first:last] == grows).all())


def _tile(start: np.ndarray, end: np.ndarray, first: int, last: int) -> Tile:
    key_last, full_first, full_last = int(end[last - 1]), int(start[last - 1]), int(end[first])
    if full_first >= full_last:
        full_first = full_last = key_last
    is_causal = _is_causal(start, end, first, last)
    return Tile(first, last, int(start[first]), key_last, full_first, full_last, is_causal)
