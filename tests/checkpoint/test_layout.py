"""Ranges of shards found in shards of another cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.test_checkpoint import WHOLE, make_checkpoint
from metalm.checkpoint.layout import ShardLayout
from metalm.checkpoint.reader import CheckpointReader
from metalm.parallel.sharding import Sharding, cut_shard


def shard(whole: torch.Tensor, layout: ShardLayout, rank: int) -> torch.Tensor:
    sharding = None if layout.dimension is None else Sharding(layout.dimension, layout.stride)
    return cut_shard(whole, sharding, rank, layout.tensor_size).flatten()


@st.composite
def cuts(draw: Any) -> tuple[ShardLayout, ShardLayout]:
    """Two layouts of one parameter; either may leave it whole."""
    dimension = draw(st.sampled_from((0, 1)))
    stride = draw(st.sampled_from((1, 2, 3)))
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))]
    shape[dimension] *= stride * 4
    sizes = [draw(st.sampled_from((1, 2, 4))) for _ in range(2)]
    layouts = [
        ShardLayout(tuple(shape), dimension, stride, size)
        if size > 1 or draw(st.booleans())
        else ShardLayout(tuple(shape))
        for size in sizes
    ]
    return layouts[0], layouts[1]


@given(cuts(), st.data())
def test_runs_hold_what_the_range_holds(layouts: tuple[ShardLayout, ShardLayout], data: Any) -> None:
    mine, source = layouts
    whole = torch.arange(mine.size).reshape(mine.shape)
    rank = data.draw(st.integers(0, mine.tensor_size - 1))
    start = data.draw(st.integers(0, mine.shard_size - 1))
    size = data.draw(st.integers(1, mine.shard_size - start))
    found = torch.full((size,), -1)
    runs = list(mine.runs_from(source, rank, start, size))
    for run in runs:
        held = shard(whole, source, run.tensor_rank)[run.start : run.start + run.size]
        assert len(held) == run.size
        found[run.offset : run.offset + run.size] = held
    assert torch.equal(found, shard(whole, mine, rank)[start : start + size])
    assert sum(run.size for run in runs) == size  # nothing is read twice


def test_the_same_cut_is_one_run() -> None:
    layout = ShardLayout((64, 96), 1, 1, 4)
    (run,) = layout.runs_from(layout, 3, 17, 1000)
    assert (run.tensor_rank, run.start, run.offset, run.size) == (3, 17, 0, 1000)


@pytest.mark.parametrize(
    "cut", [(2, 1, 2), (-1, 1, 2), (0, 1, 3), (0, 3, 2), (0, 0, 2), (None, 1, 2), (1, 1, 0)]
)
def test_cuts_that_cannot_be_are_refused(cut: tuple[Any, int, int]) -> None:
    with pytest.raises(ValueError):
        ShardLayout((8, 6), *cut)


def test_a_rank_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    reader = CheckpointReader(make_checkpoint(tmp_path))
    layout = ShardLayout((8, 6), 0, 2, 4)
    for rank in range(4):
        before = reader.bytes_read
        found = reader.read_range("decoder", "w", "exp_avg", layout, rank, 1, 9)
        assert torch.equal(found, shard(WHOLE + 1, layout, rank)[1:10])
        assert reader.bytes_read - before == 4 * 9
