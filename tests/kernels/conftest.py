"""Random interval masks, and memory that starts as NaN."""

from collections.abc import Callable, Iterator

import pytest
import torch

from metalm.kernels import IntervalMask


def random_documents(batch_size: int, num_queries: int, seed: int) -> IntervalMask:
    """Documents of random lengths, some of one token, with bidirectional spans, and padding at the end.

    The first document of even rows begins with a span, the documents of odd rows end with one.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, max(high, low + 1), (), generator=generator))

    document_start = torch.full((batch_size, num_queries), -1)
    span_end = torch.zeros(batch_size, num_queries, dtype=torch.int64)
    for row in range(batch_size):
        used = num_queries if row % 2 else num_queries - draw(0, num_queries // 4 + 1)
        first = 0
        while first < used:
            last = min(first + (1 if draw(0, 4) == 0 else draw(1, num_queries // 2 + 2)), used)
            document_start[row, first:last] = first
            span_first = first if row % 2 == 0 else draw(first, last)
            span_last = last if row % 2 else draw(span_first + 1, last + 1)
            span_end[row, span_first:span_last] = span_last
            first = last
    return IntervalMask.semi_causal(document_start, span_end, bidirectional_spans=True).validate()


def random_intervals(batch_size: int, num_queries: int, num_keys: int, seed: int) -> IntervalMask:
    """Any sorted starts and ends, with empty rows where an end meets its start and at both edges."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(0, num_keys + 1, (2, batch_size, num_queries), generator=generator)
    start, end = bounds.sort(-1).values.to(torch.int32)
    start = torch.minimum(start, end)
    start[:, :2], end[:, :2] = 0, 0
    start[:, -1:], end[:, -1:] = 0, 0
    return IntervalMask(start, end, num_keys).validate()


@pytest.fixture
def make_documents() -> Callable[[int, int, int], IntervalMask]:
    return random_documents


@pytest.fixture
def make_intervals() -> Callable[[int, int, int, int], IntervalMask]:
    return random_intervals


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that an output that nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
