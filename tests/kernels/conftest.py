"""Random interval masks, the settings of Triton's interpreter, and the comparison with a float64 reference."""

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: kernels then run on CPU, in NumPy.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from metalm.kernels import IntervalMask

LENGTHS = (1, 17, 63, 111, 128, 1000)


def random_mask(batch_size: int, num_queries: int, seed: int) -> IntervalMask:
    """Rows of documents of random lengths (some of one token), bidirectional spans, and padding at the end.

    Row 0 begins with a span, row 1 ends with one, and queries of a padding tail see nothing.
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


@pytest.fixture
def make_mask() -> Callable[[int, int, int], IntervalMask]:
    return random_mask
