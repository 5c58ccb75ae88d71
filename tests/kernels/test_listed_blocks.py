"""Lists of blocks say what the mask says: no visible pair is left out, and full blocks are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from metalm.kernels import IntervalMask
from metalm.kernels.flash4 import blocks_of
from metalm.kernels.listed_blocks import ListedBlocks, list_blocks


@st.composite
def masks(draw: st.DrawFn) -> IntervalMask:
    """Documents seen causally or whole, of random lengths, with padding between and behind them."""
    rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    start = torch.full((rows, length), -1)
    span_end = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        first = 0
        while first < length:
            last = min(first + draw(st.integers(1, 20)), length)
            if draw(st.integers(0, 3)):
                start[row, first:last] = first
                span_end[row, first : draw(st.integers(first, last))] = last
            first = last
    return IntervalMask.semi_causal(start, span_end, bidirectional_spans=True)


def blocks_seen(mask: IntervalMask, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block pair, whether any of its pairs is visible, and whether all of a whole block are."""
    padding = (0, -mask.num_keys % block_k, 0, -mask.num_queries % block_q)
    dense = mask.to_dense()

    def blocks(pairs: torch.Tensor) -> torch.Tensor:
        size = (mask.batch_size, pairs.shape[1] // block_q, block_q, pairs.shape[2] // block_k, block_k)
        return pairs.view(size).transpose(2, 3)

    # Queries beyond the last one decide nothing; keys beyond it are never visible.
    hidden_keys = functional.pad(dense, (0, padding[1]), value=False)
    some = blocks(functional.pad(dense, padding, value=False)).flatten(3).any(-1)
    return some, blocks(functional.pad(hidden_keys, (0, 0, 0, padding[3]), value=True)).flatten(3).all(-1)


def as_dense(count: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Bool `[B, M, N]`; each number counts once."""
    found = torch.zeros(*numbers.shape, dtype=torch.int64)[:, 0]
    listed = torch.arange(numbers.shape[-1]) < count[..., None]
    found.scatter_add_(-1, numbers[:, 0].long(), listed[:, 0].long())
    assert int(found.max()) <= 1
    return found > 0


def check(blocks: ListedBlocks, some: torch.Tensor, every: torch.Tensor) -> None:
    partial = as_dense(blocks.partial_count, blocks.partial)
    full = as_dense(blocks.full_count, blocks.full)
    assert not (partial & full).any()
    assert not (some & ~(partial | full)).any()
    assert torch.equal(full, every & some)
    for numbers in (blocks.partial, blocks.full):
        assert numbers.dtype == torch.int32
        assert int(numbers.min()) >= 0
        assert int(numbers.max()) < numbers.shape[-1]


@given(masks(), st.integers(1, 8), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_every_visible_pair_is_in_a_listed_block_and_full_blocks_are_full(
    mask: IntervalMask, block_q: int, block_k: int
) -> None:
    blocks = list_blocks(mask.block_ranges(block_q, block_k), -(-mask.num_keys // block_k))
    check(blocks, *blocks_seen(mask, block_q, block_k))


@pytest.mark.parametrize("query_block", [128, 256])
def test_what_flash4_reads_holds_for_each_row_and_both_directions(query_block: int) -> None:
    start = torch.cat([torch.zeros(300), torch.full((200,), 300), torch.full((40,), -1)]).int()
    span_end = torch.where(torch.arange(540) < 270, 270, 0)
    mask = IntervalMask.semi_causal(start[None], span_end[None], bidirectional_spans=True).validate()
    rows = IntervalMask(mask.start.repeat(3, 1), mask.end.repeat(3, 1), 540)
    for source in (mask, rows):
        forward, backward = blocks_of(source, 3, query_block)
        check(forward.listed, *blocks_seen(rows, query_block, 128))
        check(backward.listed, *blocks_seen(rows.transpose(), 128, query_block))
        for (firsts, lengths), owners in ((forward.intervals, rows), (backward.intervals, rows.transpose())):
            place = torch.arange(540)
            inside = (place >= firsts[..., None]) & (place < (firsts + lengths)[..., None])
            assert torch.equal(inside[:, :540], owners.to_dense())
            # Read for whole blocks, and seeing nothing beyond the last one.
            assert firsts.shape == lengths.shape == (3, 768 if owners is rows and query_block > 128 else 640)
            assert not inside[:, 540:].any()


def test_lists_have_one_layout_whatever_the_mask() -> None:
    """Kernels are compiled for the layout of arguments: of one row that holds for all, or of a row each."""
    shared = blocks_of(IntervalMask.causal(300), 2, 128)
    own = blocks_of(IntervalMask.causal(300, batch_size=2), 2, 128)
    for one, other in zip(shared, own, strict=True):
        for left, right in zip((*one.intervals, *one.listed), (*other.intervals, *other.listed), strict=True):
            assert torch.equal(left, right)
            assert left.stride() == right.stride()
            assert left.is_contiguous()
