"""The tiled backend's plan: no pair lost or seen twice, and shortcuts only where they hold."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from metalm.kernels import IntervalMask
from metalm.kernels.tile_plan import RunPlan, Tile, plan_runs, plan_tiles


def check_runs(mask: IntervalMask) -> RunPlan:
    """What `check` asks, of batches and tiles together."""
    plan = plan_runs(mask)
    dense = mask.to_dense().numpy()
    missing = dense.copy()
    for batch in plan.batches:
        assert len(batch.queries) == len(batch.keys) >= 4
        for queries, keys in zip(batch.queries, batch.keys, strict=True):
            row = queries[0] // mask.num_queries
            assert keys[0] // mask.num_keys == row
            real = queries >= 0, keys >= 0
            assert all((np.diff(one.astype(int)) <= 0).all() for one in real), (
                "padding is behind what is real"
            )
            seen = np.ix_(queries[real[0]] % mask.num_queries, keys[real[1]] % mask.num_keys)
            if batch.is_causal:
                assert np.array_equal(dense[row][seen], np.tri(*dense[row][seen].shape, dtype=bool))
            assert dense[row][seen].any(-1).all()
            assert np.array_equal(missing[row][seen], dense[row][seen]), "a pair is in two runs"
            missing[row][seen] = False
    left = IntervalMask(*_without(mask, plan), mask.num_keys)
    assert np.array_equal(left.to_dense().numpy(), missing)
    check(left, plan.tiles, max_queries=None)
    return plan


def _without(mask: IntervalMask, plan: RunPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of the queries that are in no batch; the others see nothing."""
    start, end = mask.start.clone(), mask.end.clone()
    for batch in plan.batches:
        batched = torch.from_numpy(batch.queries[batch.queries >= 0])
        start.view(-1)[batched] = end.view(-1)[batched] = 0
    return start, end


def check(mask: IntervalMask, plan: list[list[Tile]], max_queries: int | None) -> None:
    for row, (tiles, dense) in enumerate(zip(plan, mask.to_dense(), strict=True)):
        missing = dense.clone()
        for tile in tiles:
            queries, keys = slice(tile.query_first, tile.query_last), slice(tile.key_first, tile.key_last)
            assert dense[queries].any(-1).all(), (row, tile)
            assert dense[queries, tile.full_first : tile.full_last].all(), (row, tile)
            if tile.is_causal:
                assert torch.equal(dense[queries, keys], torch.ones_like(dense[queries, keys]).tril())
            assert missing[queries].any(-1).all(), f"row {row}: queries of {tile} are in two tiles"
            assert max_queries is None or tile.query_last - tile.query_first <= max_queries
            missing[queries, keys] = False
        assert not missing.any()


@pytest.mark.parametrize("length", [1, 17, 130, 300])
def test_documents(length: int, make_documents: Callable[..., IntervalMask]) -> None:
    for seed in range(8):
        mask = make_documents(2, length, seed)
        check(mask, plan_tiles(mask), max_queries=128)
        check_runs(mask)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(40, 7), (40, 300), (300, 40)])
def test_any_intervals(num_queries: int, num_keys: int, make_intervals: Callable[..., IntervalMask]) -> None:
    for seed in range(8):
        mask = make_intervals(2, num_queries, num_keys, seed)
        check(mask, plan_tiles(mask), max_queries=128)
        check_runs(mask)


def test_a_document_is_one_causal_tile_and_a_span_one_full_tile() -> None:
    edges = torch.tensor([0, 300, 550])
    start, end = (x.repeat_interleave(edges.diff())[None] for x in (edges[:-1], edges[1:]))
    documents = check_runs(IntervalMask.packed_documents(start)).tiles[0]
    assert [(tile.query_first, tile.query_last, tile.is_causal) for tile in documents] == [
        (0, 300, True),
        (300, 550, True),
    ]
    spans = check_runs(IntervalMask.packed_spans(start, end)).tiles[0]
    assert [(tile.query_first, tile.query_last, tile.is_full) for tile in spans] == [
        (0, 300, True),
        (300, 550, True),
    ]


def test_short_documents_of_all_rows_are_one_batch() -> None:
    start = torch.stack([torch.arange(512) // 4 * 4, torch.arange(512) // 8 * 8])
    plan = check_runs(IntervalMask.packed_documents(start))
    assert [batch.queries.shape for batch in plan.batches] == [(512 // 4 + 512 // 8, 16)]
    assert plan.batches[0].is_causal
    assert not any(plan.tiles)


def test_few_short_documents_share_a_tile() -> None:
    start = (torch.arange(12) // 4 * 4)[None]
    plan = check_runs(IntervalMask.packed_documents(start))
    assert not plan.batches
    assert len(plan.tiles[0]) == 1
