"""Spans have the paper's lengths and the wanted share of the tokens, and stay in the documents' bodies."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from metalm.config.schema import SpanConfig
from metalm.data.documents.spans import SpanSampler
from metalm.data.order.streams import Stream

PAPER = SpanConfig(fraction=0.25, min_length=64, max_length=128)
NUM_ROWS = 4000


def sampled(config: SpanConfig, bodies: list[tuple[int, int]], num_tokens: int) -> list[np.ndarray]:
    sampler = SpanSampler(config, Stream(1, "spans"))
    rows = (sampler.sample(bodies, num_tokens, row) for row in range(NUM_ROWS))
    return [np.array(spans, np.int64).reshape(-1, 2) for spans in rows]


def test_a_quarter_of_the_tokens_in_expectation() -> None:
    # Bodies of a row of 2048: a long document, one shorter than a window, one too short for any span.
    bodies = [(1, 1500), (1502, 1610), (1612, 1650), (1652, 2048)]
    totals = np.array([(spans[:, 1] - spans[:, 0]).sum() for spans in sampled(PAPER, bodies, 2048)])
    standard_error = totals.std() / np.sqrt(NUM_ROWS)
    assert abs(totals.mean() - 0.25 * 2048) < 4 * standard_error
    assert standard_error < 0.01 * 0.25 * 2048


def test_lengths_are_uniform_from_65_to_128_with_mean_96_5() -> None:
    lengths = np.concatenate([s[:, 1] - s[:, 0] for s in sampled(PAPER, [(1, 2047)], 2048)])
    assert lengths.min() == 65
    assert lengths.max() == 128
    counts = np.bincount(lengths - 65)
    expected = len(lengths) / 64
    assert abs(lengths.mean() - 96.5) < 4 * lengths.std() / np.sqrt(len(lengths))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 5 * np.sqrt(2 * 63)


def test_no_place_of_a_body_is_preferred() -> None:
    covered = np.zeros(1000)
    for spans in sampled(PAPER, [(0, 1000)], 1000):
        for start, end in spans:
            covered[start:end] += 1
    inner = covered[250:750].reshape(10, 50).mean(axis=1) / NUM_ROWS
    assert np.all(np.abs(inner / inner.mean() - 1) < 0.15)
    assert np.all(covered > 0)


def test_short_bodies_are_taken_whole_rather_than_left_out() -> None:
    spans = sampled(PAPER, [(1, 80), (82, 100)], 2048)
    assert all(len(row) == 1 and row[0, 0] >= 1 and row[0, 1] <= 80 for row in spans)


def test_no_fraction_no_spans() -> None:
    assert all(len(s) == 0 for s in sampled(SpanConfig(fraction=0.0), [(0, 2000)], 2000))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    smallest=st.integers(1, 10),
    extra=st.integers(1, 12),
    fraction=st.floats(0.01, 0.99),
    row=st.integers(0, 2**40),
)
def test_spans_are_ordered_disjoint_and_inside_one_body(
    lengths: list[int], smallest: int, extra: int, fraction: float, row: int
) -> None:
    ends = np.cumsum(np.array(lengths) + 2)
    bodies = [(int(end) - length - 1, int(end) - 1) for end, length in zip(ends, lengths, strict=True)]
    config = SpanConfig(fraction=fraction, min_length=smallest, max_length=smallest + extra)
    spans = np.array(SpanSampler(config, Stream(5, "spans")).sample(bodies, int(ends[-1]), row))
    spans = spans.reshape(-1, 2)
    assert np.all(spans[1:, 0] >= spans[:-1, 1])
    for start, end in spans:
        assert smallest < end - start <= smallest + extra
        assert any(first <= start and end <= last for first, last in bodies)


def test_limits_that_are_one_give_spans_of_that_length() -> None:
    config = SpanConfig(fraction=0.9, min_length=32, max_length=32)
    spans = np.concatenate(rows := sampled(config, [(1, 97), (99, 131), (133, 160)], 192))
    assert set((spans[:, 1] - spans[:, 0]).tolist()) == {32}
    assert all((row[1:, 0] >= row[:-1, 1]).all() and row[-1, 1] <= 131 for row in rows if len(row))
