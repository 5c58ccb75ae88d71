"""Every sample is dealt exactly once per epoch, to whichever lane, in whatever corpus."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalm.data.order import sample_order
from metalm.data.order.sample_order import SampleOrder, SequentialOrder
from metalm.data.storage.index import ShardIndex
from metalm.data.storage.shard_scan import RECORD, Shard


def corpus(samples_per_shard: list[int]) -> ShardIndex:
    shards = tuple(Shard(f"{n}.tar", 1, "", count, {}) for n, count in enumerate(samples_per_shard))
    records = np.zeros(sum(samples_per_shard), RECORD)
    return ShardIndex(Path("nowhere"), "text", None, None, 0, shards, "", records)


def order_of(
    samples_per_shard: list[int],
    num_lanes: int,
    chunk_samples: int = 8,
    window: int = 24,
    seed: int = 1,
    split: int = 1,
) -> SampleOrder:
    return SampleOrder(
        corpus(samples_per_shard),
        seed=seed,
        source_name="prose",
        num_lanes=num_lanes,
        chunk_samples=chunk_samples,
        shuffle_window=window,
        split=split,
    )


def dealt(order: SampleOrder, epochs: int) -> Counter[int]:
    """How often each sample was dealt once every lane has read all its blocks of the first epochs.

    Lanes end at the same chunk of the endless sequence, which ends an epoch.
    """
    blocks = -(-epochs * order.num_chunks // (order.num_lanes * order.block_chunks))
    return Counter(
        int(sample)
        for lane in range(order.num_lanes)
        for number in range(blocks)
        for sample in order.block(lane, number)
    )


SHAPES = {
    "fewer shards than lanes": [300, 211, 90],
    "as many shards as lanes": [50, 41, 7, 100, 3, 80, 9, 64],
    "more shards than lanes": [30, 1, 5, 17] * 9,
    "one shard": [500],
    "fewer samples than lanes": [3, 2],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_once_per_epoch(shape: str) -> None:
    samples, lanes = SHAPES[shape], 8
    order = order_of(samples, lanes)
    # After `lanes * block_chunks` epochs all lanes end a block at the end of an epoch.
    epochs = lanes * order.block_chunks
    assert dealt(order, epochs) == {sample: epochs for sample in range(sum(samples))}


@settings(max_examples=40, deadline=None)
@given(
    samples=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    lanes=st.integers(1, 12),
    chunk=st.integers(1, 9),
    window=st.integers(1, 30),
)
def test_every_sample_once_per_epoch_in_any_corpus(
    samples: list[int], lanes: int, chunk: int, window: int
) -> None:
    order = order_of(samples, lanes, chunk, window)
    epochs = lanes * order.block_chunks
    assert dealt(order, epochs) == {sample: epochs for sample in range(sum(samples))}


def test_one_epoch_is_a_run_of_chunks_over_the_lanes() -> None:
    samples, lanes = [70, 50], 4
    order = order_of(samples, lanes, chunk_samples=8, window=1)
    # With one chunk per block, chunk n of the sequence is block n // lanes of lane n % lanes.
    for epoch in range(3):
        numbers = range(epoch * order.num_chunks, (epoch + 1) * order.num_chunks)
        blocks = [order.block(n % lanes, n // lanes) for n in numbers]
        np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(120))
        assert {order.epoch(n % lanes, n // lanes) for n in numbers} == {epoch}


def test_small_corpora_are_cut_finer_so_that_every_lane_reads_in_every_epoch() -> None:
    order = order_of([100], num_lanes=8, chunk_samples=64)
    assert order.num_chunks >= 8
    assert order_of([100_000], num_lanes=8, chunk_samples=64).chunk_samples == 64


def test_epochs_lanes_and_seeds_have_different_orders() -> None:
    order, other = order_of([4000], 2, window=4000), order_of([4000], 2, window=4000, seed=2)
    first, later = order.block(0, 0), order.block(0, 1)
    assert (first != np.sort(first)).mean() > 0.9
    assert set(first) != set(later)
    assert (first[:100] != other.block(0, 0)[:100]).mean() > 0.9


def test_a_window_beyond_memory_ends_with_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller windows above it go on through later epochs."""
    assert len(order_of([400], 2, window=1000).block(0, 0)) == 1000
    monkeypatch.setattr(sample_order, "ANY_WINDOW", 100)
    assert len(order_of([400], 2, window=2**63 - 1).block(0, 0)) == 400
    assert len(order_of([40], 2, chunk_samples=2, window=100).block(0, 0)) == 100


def test_neighbours_in_a_shard_are_read_far_apart() -> None:
    block = order_of([10_000], 2, chunk_samples=16, window=256).block(0, 0)
    assert (np.abs(np.diff(block)) == 1).mean() < 0.02


def test_evaluation_reads_in_the_order_of_the_index() -> None:
    order = SequentialOrder(corpus([300, 5]))
    read = np.concatenate([order.block(0, number) for number in range(2)])
    np.testing.assert_array_equal(read, np.arange(305))
    assert order.block(0, 2) is None
