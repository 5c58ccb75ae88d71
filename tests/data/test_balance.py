"""Encoder work is spread evenly over shares, micro-batches and ranks, and nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.steps import opened
from metalm.config.model_schema import EncoderConfig, ImageConfig
from metalm.config.schema import RunConfig
from metalm.data.balance import assign_spans, group_rows, imbalance_over_ranks, row_costs, span_costs
from metalm.data.row import Row, RowSpans
from reference.rows import loss_weights

SHAPE = {"num_layers": 3, "hidden_size": 16, "num_heads": 2, "max_text_positions": 16}
TEXT = EncoderConfig.model_validate(SHAPE)
VISION = EncoderConfig.model_validate({**SHAPE, "image": ImageConfig(image_size=16, patch_size=8)})


def test_spans_are_spread_evenly_by_cost() -> None:
    lengths = np.random.default_rng(0).integers(65, 129, 40)
    costs = span_costs(lengths, TEXT)
    for shares in (2, 4, 8):
        owners = assign_spans(costs, shares)
        loads = np.bincount(owners, costs, minlength=shares)
        assert loads.max() / loads.mean() < 1.06
        np.testing.assert_array_equal(owners, assign_spans(costs, shares))


def test_cost_of_a_span_is_that_of_its_multiplications() -> None:
    n, h, f = 50, TEXT.hidden_size, TEXT.feed_forward_size
    # Four projections h x h, two of the feed-forward, scores and their use, per element.
    multiplications = n * (4 * h * h + 2 * h * f) + 2 * n * n * h
    assert span_costs(np.array([n]), TEXT)[0] == 3 * multiplications


def test_a_row_costs_what_its_spans_cost() -> None:
    spans = RowSpans(np.array([[1, 6], [8, 20]]), np.array([4, 4]))
    tokens = np.zeros(30, np.int32)
    rows = [
        Row(tokens, loss_weights(30, [30], spans.bounds.tolist()), [30], spans={"vision": spans}),
        Row(tokens, loss_weights(30, [30], []), [30]),
    ]
    costs = row_costs(rows, {"text": TEXT, "vision": VISION})
    np.testing.assert_array_equal(costs, [[0, span_costs(np.array([5, 12]), VISION).sum()], [0, 0]])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_every_row_is_in_one_group(num_groups: int, size: int, num_encoders: int, seed: int) -> None:
    costs = np.random.default_rng(seed).integers(0, 4, (num_groups * size, num_encoders)).astype(float)
    groups = group_rows(costs, size)
    assert [len(group) for group in groups] == [size] * num_groups
    assert sorted(row for group in groups for row in group) == list(range(num_groups * size))


def test_groups_have_about_one_cost_in_each_encoder() -> None:
    random = np.random.default_rng(1)
    costs = np.zeros((64, 2))
    vision = random.random(64) < 0.4
    costs[vision, 1] = random.uniform(80, 120, vision.sum())
    costs[~vision, 0] = random.uniform(20, 30, (~vision).sum())
    loads = costs[np.array(group_rows(costs, 8))].sum(axis=1)
    spread = loads.max(axis=0) / loads.mean(axis=0)
    unspread = costs.reshape(8, 8, 2).sum(axis=1)
    assert np.all(spread < 1.35)
    assert np.all(spread < 0.6 * (unspread.max(axis=0) / unspread.mean(axis=0)) + 0.4)


def test_imbalance_is_the_time_lost_to_waiting() -> None:
    # Two ranks, two micro-batches: in each, one rank has twice the work of the other.
    costs = np.array([[[2.0, 0], [1, 0]], [[1, 0], [2, 0]]])
    np.testing.assert_allclose(imbalance_over_ranks(costs), [4 / 3 - 1, 0])
    np.testing.assert_allclose(imbalance_over_ranks(np.full((2, 2, 2), 1.5)), [0, 0])


@pytest.fixture(scope="module")
def mixed(
    make_config: Callable[..., RunConfig], text_source: Callable[..., Path], pair_source: Callable[..., Path]
) -> RunConfig:
    return make_config(
        {
            "prose": {"path": text_source([60]), "readers": {"text": "text"}, "weight": 2},
            "scenes": {"path": pair_source([40]), "readers": {"image": "vision", "text": "vision"}},
        },
        data={"lanes": 16},
        training={"global_batch_size": 64, "micro_batch_size": 2},
    )


def test_ranks_wait_less_for_each_other(mixed: RunConfig) -> None:
    steps, costs = 30, []
    for rank in range(4):
        with opened(mixed, dp_rank=rank, dp_size=4) as data:
            found = []
            for _ in range(steps):
                next(data)
                found.append(data.encoder_costs)
            costs.append(found)
    # [ranks, steps, arrangement, micro-batches, encoders] to one long row of micro-batches
    whole = np.moveaxis(np.array(costs), 2, 0)
    before, after = (imbalance_over_ranks(part.reshape(4, -1, 2)) for part in whole)
    print(f"waiting, in the order of the lanes {before.round(2)}, as grouped {after.round(2)}")
    np.testing.assert_allclose(whole[0].sum(axis=(0, 2)), whole[1].sum(axis=(0, 2)))
    assert np.all(after < 0.8 * before)


def test_the_costs_are_those_of_the_batches(mixed: RunConfig) -> None:
    with opened(mixed) as data:
        batches = next(data)
        for number, (name, config) in enumerate(mixed.model.encoders.items()):
            for costs, batch in zip(data.encoder_costs[1], batches, strict=True):
                (share,) = batch.encoders[name].shares
                element = np.arange(len(share.token_ids))
                docked = len(batch.encoders[name].dock_vectors)
                first = (share.attention_start.numpy() == element) & (element < docked)
                lengths = (share.attention_end - share.attention_start).numpy()[first]
                assert costs[number] == pytest.approx(span_costs(lengths.astype(np.int64), config).sum())
