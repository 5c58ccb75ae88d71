"""Segments stand for the mask they were found in, and are found in no other."""

from collections.abc import Callable

import pytest
import torch

from metalm.kernels import IntervalMask, Segments, find_segments


def dense(segments: Segments, num_rows: int, length: int) -> torch.Tensor:
    """Who sees whom, bool [B * S, B * S], if no run were padding."""
    place = torch.arange(num_rows * length)
    run = torch.searchsorted(segments.bounds.long(), place, right=True)
    seen = run[:, None] == run[None, :]
    return seen & (place[:, None] >= place[None, :]) if segments.is_causal else seen


def packed(lengths: list[list[int]], num_positions: int, *, spans: bool) -> IntervalMask:
    start = torch.full((len(lengths), num_positions), 0 if spans else -1)
    end = torch.zeros(len(lengths), num_positions, dtype=torch.int64)
    for row, runs in enumerate(lengths):
        first = 0
        for size in runs:
            start[row, first : first + size] = first
            end[row, first : first + size] = first + size
            first += size
    return IntervalMask.packed_spans(start, end) if spans else IntervalMask.packed_documents(start)


@pytest.mark.parametrize("spans", [False, True], ids=["causal", "whole"])
@pytest.mark.parametrize("lengths", [[[3, 1, 6], [2, 5]], [[10], [10]], [[1], []]])
def test_segments_are_the_mask(lengths: list[list[int]], spans: bool) -> None:
    mask = packed(lengths, 10, spans=spans).validate()
    segments = find_segments(mask.start.numpy(), mask.end.numpy())
    assert segments is not None
    joined = IntervalMask.joined(mask.start, mask.end, segments).validate()
    visible = joined.end[0] > joined.start[0]
    expected = dense(segments, 2, 10) & visible[:, None] & visible[None, :]
    assert torch.equal(joined.to_dense()[0], expected)
    assert torch.equal(joined.to_dense()[0, :10, :10], mask.to_dense()[0])
    assert torch.equal(joined.to_dense()[0, 10:, 10:], mask.to_dense()[1])
    assert segments.longest == int(segments.bounds.diff().max())
    assert segments.has_padding == (not bool(visible.all()))


def test_a_row_that_holds_for_a_batch_is_repeated() -> None:
    mask = packed([[3, 7]], 10, spans=True)
    segments = find_segments(mask.start.numpy(), mask.end.numpy())
    assert segments is not None
    assert segments.repeated(3, 10).bounds.tolist() == [0, 3, 10, 13, 20, 23, 30]


def test_bidirectional_spans_in_causal_documents_have_none(
    make_documents: Callable[..., IntervalMask], make_intervals: Callable[..., IntervalMask]
) -> None:
    for mask in (make_documents(2, 60, 0), make_intervals(1, 40, 40, 0)):
        assert find_segments(mask.start.numpy(), mask.end.numpy()) is None
        assert mask.to("cpu").segments is None


def test_constructors_know_their_segments() -> None:
    for mask in (IntervalMask.causal(6, batch_size=2), IntervalMask.whole(6, 6)):
        found = find_segments(mask.start.numpy(), mask.end.numpy())
        assert mask.segments is not None and found is not None
        assert torch.equal(mask.segments.bounds, found.bounds)
        assert (mask.segments.longest, mask.segments.is_causal) == (found.longest, found.is_causal)
    assert IntervalMask.causal(3, 6).segments is None
    assert IntervalMask.whole(3, 6).segments is None
