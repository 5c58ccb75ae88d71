"""IntervalMask: what the constructors see, the transpose, block ranges, and refused intervals."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metalm.kernels import IntervalMask


@st.composite
def valid_masks(draw: st.DrawFn) -> IntervalMask:
    """Any valid mask: sorted intervals, with runs of empty rows only where no key is seen on both sides."""
    num_queries = draw(st.integers(1, 40))
    num_keys = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        bounds = st.lists(st.integers(0, num_keys), min_size=num_queries, max_size=num_queries)
        starts, ends = sorted(draw(bounds)), sorted(draw(bounds))
        starts = [min(start, end) for start, end in zip(starts, ends, strict=True)]
        if draw(st.booleans()):
            # A cut: rows before it see keys below it, those after it keys above, those of the gap nothing.
            cut, gap, key = (
                draw(st.integers(0, num_queries)),
                draw(st.integers(0, 3)),
                draw(st.integers(0, num_keys)),
            )
            for query in range(num_queries):
                if query < cut:
                    starts[query], ends[query] = min(starts[query], key), min(ends[query], key)
                elif query < cut + gap:
                    starts[query], ends[query] = 0, 0
                else:
                    starts[query], ends[query] = max(starts[query], key), max(ends[query], key)
        rows.append((starts, ends))
    start, end = (torch.tensor([row[i] for row in rows], dtype=torch.int32) for i in (0, 1))
    return IntervalMask(start, end, num_keys)


def is_valid(mask: IntervalMask) -> bool:
    """The definition itself, on the dense matrix: both views of every row and key are intervals in order."""
    for row in mask.to_dense():
        for view in (row, row.T):
            edges = [(int(line.nonzero()[0]), int(line.nonzero()[-1])) for line in view if line.any()]
            contiguous = all(
                line.sum() == line.nonzero().max() - line.nonzero().min() + 1 for line in view if line.any()
            )
            if (
                not contiguous
                or edges != sorted(edges)
                or [b for _, b in edges] != sorted(b for _, b in edges)
            ):
                return False
    return True


@given(valid_masks())
@settings(deadline=None, max_examples=150)
def test_validate_agrees_with_the_definition(mask: IntervalMask) -> None:
    if is_valid(mask):
        mask.validate()
    else:
        with pytest.raises(ValueError, match="interval mask: row"):
            mask.validate()


@given(valid_masks())
@settings(deadline=None, max_examples=150)
def test_transpose_is_the_transposed_matrix_and_its_own_inverse(mask: IntervalMask) -> None:
    if not is_valid(mask):
        return
    transposed = mask.transpose()
    assert torch.equal(transposed.to_dense(), mask.to_dense().mT)
    twice = transposed.transpose()
    visible = mask.end > mask.start
    assert torch.equal(twice.start, mask.start.where(visible, 0))
    assert torch.equal(twice.end, mask.end.where(visible, 0))


@given(valid_masks())
@settings(deadline=None, max_examples=100)
def test_visible_pairs_is_the_sum_of_the_dense_mask(mask: IntervalMask) -> None:
    assert torch.equal(mask.visible_pairs(), mask.to_dense().sum((1, 2)))


@given(valid_masks(), st.sampled_from((1, 2, 8, 16)), st.sampled_from((1, 4, 16)))
@settings(deadline=None, max_examples=200)
def test_block_ranges_lose_no_pair_and_call_no_partial_block_full(
    mask: IntervalMask, block_q: int, block_k: int
) -> None:
    ranges, dense = mask.block_ranges(block_q, block_k), mask.to_dense()
    for row in range(mask.batch_size):
        for block in range(ranges.first.shape[1]):
            queries = dense[row, block * block_q : (block + 1) * block_q]
            first, full_first, full_last, last = (
                int(bound[row, block])
                for bound in (ranges.first, ranges.full_first, ranges.full_last, ranges.last)
            )
            assert 0 <= first <= full_first <= full_last <= last
            assert not queries[:, : first * block_k].any()
            assert not queries[:, last * block_k :].any()
            full = queries[:, full_first * block_k : full_last * block_k]
            assert full.shape[1] == (full_last - full_first) * block_k
            assert full.all()


@given(valid_masks(), st.sampled_from((2, 8, 16)), st.sampled_from((4, 16)))
@settings(deadline=None, max_examples=40)
def test_the_kernel_that_tells_blocks_tells_those_ranges(
    mask: IntervalMask, block_q: int, block_k: int
) -> None:
    pytest.importorskip("triton")
    from metalm.kernels.triton_blocks import block_ranges

    expected, found = mask.block_ranges(block_q, block_k), block_ranges(mask, block_q, block_k)
    assert found is block_ranges(mask, block_q, block_k)
    for row, block in itertools.product(range(mask.batch_size), range(found.shape[1])):
        first, full_first, full_last, last = (
            int(bound[row, block])
            for bound in (expected.first, expected.full_first, expected.full_last, expected.last)
        )
        begin, full_begin, full_end, end = found[row, block].tolist()
        assert range(begin, end, block_k) == range(first * block_k, last * block_k, block_k)
        assert range(full_begin, full_end, block_k) == range(
            full_first * block_k, full_last * block_k, block_k
        )


def test_causal_is_lower_triangular() -> None:
    assert torch.equal(IntervalMask.causal(7).to_dense()[0], torch.ones(7, 7, dtype=torch.bool).tril())


def test_causal_with_more_keys_lets_the_last_query_see_all() -> None:
    expected = torch.ones(3, 8, dtype=torch.bool).tril(5)
    assert torch.equal(IntervalMask.causal(3, 8).to_dense()[0], expected)


def test_causal_refuses_fewer_keys_than_queries() -> None:
    with pytest.raises(ValueError, match="3 keys for 5 queries"):
        IntervalMask.causal(5, 3)


def test_padded_rows_see_their_length() -> None:
    dense = IntervalMask.padded(torch.tensor([2, 0, 3]), 3).to_dense()
    for row, length in zip(dense, (2, 0, 3), strict=True):
        expected = torch.zeros(3, 3, dtype=torch.bool)
        expected[:length, :length] = True
        assert torch.equal(row, expected)


def test_packed_documents_are_causal_blocks_and_padding_sees_nothing() -> None:
    mask = IntervalMask.packed_documents(torch.tensor([[0, 0, 0, 3, 4, 4, -1, -1]]))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    for first, last in ((0, 3), (3, 4), (4, 6)):
        expected[first:last, first:last] = torch.ones(last - first, last - first, dtype=torch.bool).tril()
    assert torch.equal(mask.validate().to_dense()[0], expected)


def test_packed_spans_are_full_blocks() -> None:
    mask = IntervalMask.packed_spans(torch.tensor([[0, 0, 2, 2, 2, 0]]), torch.tensor([[2, 2, 5, 5, 5, 0]]))
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:2, :2] = True
    expected[2:5, 2:5] = True
    assert torch.equal(mask.validate().to_dense()[0], expected)


def test_semi_causal_spans_are_bidirectional_only_on_request() -> None:
    document_start = torch.tensor([[0, 0, 0, 0, 4, 4, 4]])
    span_end = torch.tensor([[0, 3, 3, 0, 6, 6, 0]])
    causal = IntervalMask.semi_causal(document_start, span_end, bidirectional_spans=False)
    assert torch.equal(causal.to_dense(), IntervalMask.packed_documents(document_start).to_dense())
    expected = causal.to_dense()[0].clone()
    expected[1:3, 0:3] = True
    expected[4:6, 4:6] = True
    both = IntervalMask.semi_causal(document_start, span_end, bidirectional_spans=True)
    assert torch.equal(both.validate().to_dense()[0], expected)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ([0, -1], [1, 2], r"row 0, query 1: \[-1, 2\) of 4 keys leaves the keys"),
        ([0, 0], [1, 5], r"query 1: \[0, 5\) of 4 keys leaves the keys"),
        ([0, 3], [1, 2], "query 1: .* ends before it starts"),
        ([1, 0], [2, 3], "query 1: .* starts before an earlier query's"),
        ([0, 0], [3, 2], "query 1: .* ends before an earlier query's"),
        ([0, 0, 0], [3, 0, 3], "query 1: .* is empty between queries of one key"),
    ],
)
def test_invalid_intervals_are_refused_by_name(start: list[int], end: list[int], message: str) -> None:
    mask = IntervalMask(torch.tensor([start]).int(), torch.tensor([end]).int(), num_keys=4)
    with pytest.raises(ValueError, match=message):
        mask.validate()


def test_constructor_refuses_other_dtypes_and_shapes() -> None:
    row = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"end is torch\.int64"):
        IntervalMask(row, row.long(), 4)
    with pytest.raises(ValueError, match=r"start is \[1, 4\].*end is \[1, 3\]"):
        IntervalMask(row, row[:, :3], 4)
