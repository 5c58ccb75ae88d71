"""The tiled backend's plan: no pair lost or seen twice, and shortcuts only where they hold."""

from collections.abc import Callable

import pytest
import torch

from metalm.kernels import IntervalMask
from metalm.kernels.tile_plan import Tile, plan_tiles, plan_whole_runs


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
        check(mask, plan_whole_runs(mask), max_queries=None)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(40, 7), (40, 300), (300, 40)])
def test_any_intervals(num_queries: int, num_keys: int, make_intervals: Callable[..., IntervalMask]) -> None:
    for seed in range(8):
        mask = make_intervals(2, num_queries, num_keys, seed)
        check(mask, plan_tiles(mask), max_queries=128)
        check(mask, plan_whole_runs(mask), max_queries=None)


def test_a_document_is_one_causal_tile_and_a_span_one_full_tile() -> None:
    edges = torch.tensor([0, 300, 550])
    start, end = (x.repeat_interleave(edges.diff())[None] for x in (edges[:-1], edges[1:]))
    documents = plan_whole_runs(IntervalMask.packed_documents(start))[0]
    assert [(tile.query_first, tile.query_last, tile.is_causal) for tile in documents] == [
        (0, 300, True),
        (300, 550, True),
    ]
    spans = plan_whole_runs(IntervalMask.packed_spans(start, end))[0]
    assert [(tile.query_first, tile.query_last, tile.is_full) for tile in spans] == [
        (0, 300, True),
        (300, 550, True),
    ]


def test_short_documents_share_a_tile() -> None:
    start = (torch.arange(512) // 4 * 4)[None]
    assert len(plan_whole_runs(IntervalMask.packed_documents(start))[0]) < 10
