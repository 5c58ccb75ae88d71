"""A run goes on with more lanes: every sample is read once per epoch, and none is lost or read twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.order.test_sample_order import corpus, order_of
from data.steps import data_of, global_rows, with_data
from metalm.config.schema import RunConfig
from metalm.data.order.sample_order import SampleOrder, ShardOrder
from metalm.data.sample_stream import SampleStream
from metalm.errors import ConfigError

DEALT = 2
"""Lanes that a run begins with."""


@pytest.fixture(scope="module")
def config(
    make_config: Callable[..., RunConfig],
    text_source: Callable[..., Path],
    pair_source: Callable[..., Path],
) -> RunConfig:
    config = make_config(
        {
            "prose": {"path": text_source([17, 40, 3]), "readers": {"text": "text"}, "weight": 2},
            "scenes": {"path": pair_source([20, 11]), "readers": {"image": "vision", "text": "vision"}},
        }
    )
    return with_data(config, lanes=DEALT)


def test_no_sample_is_lost_or_read_twice_however_often_the_lanes_are_split(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that streams read is written down, by the lane to which it was dealt, over two splits."""
    read: Counter[tuple[str, int, int, int]] = Counter()
    blocks: dict[tuple[str, int, int], int] = {}
    original = SampleStream.read_next

    def read_next(self: SampleStream[Any]) -> Any:
        place, location, decoded = original(self)
        lane = self._lane % DEALT
        read[self._source.name, lane, place.block, place.position] += 1
        blocks[self._source.name, lane, place.block] = len(self._order.block(self._lane, place.block))
        return place, location, decoded

    monkeypatch.setattr(SampleStream, "read_next", read_next)
    states: dict[int, Any] | None = None
    for lanes, steps in ((2, 23), (4, 31), (8, 40)):
        _, states = global_rows(with_data(config, lanes=lanes), steps, dp_size=2, states=states)
    assert states is not None and states.keys() == set(range(8))
    assert set(read.values()) == {1}
    places: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    for name, lane, block, position in read:
        places[name, lane, block].add(position)
    for name in ("prose", "scenes"):
        # Of every block before the first that some lane is still in, all is read; lanes are not far apart.
        for dealt in range(DEALT):
            heirs = [state for lane, state in states.items() if lane % DEALT == dealt]
            behind = min(state["sources"][name]["packer"]["place"][0] for state in heirs)
            assert behind > 0
            for block in range(behind):
                assert places[name, dealt, block] == set(range(blocks[name, dealt, block])), (name, block)
        packers = [state["sources"][name]["packer"] for state in states.values()]
        waiting = sum(len(packer.get("waiting", ())) for packer in packers)
        counters = [packer["counters"] for packer in packers]
        used = sum(count["samples"] + sum(count["skipped"].values()) for count in counters)
        assert used + waiting == sum(place[0] == name for place in read)


def test_rows_after_a_split_depend_on_neither_ranks_nor_workers_nor_resumes(config: RunConfig) -> None:
    _, states = global_rows(config, 9, dp_size=1)
    more = with_data(config, lanes=8)
    rows, _ = global_rows(more, 12, dp_size=1, states=states)
    assert global_rows(more, 12, dp_size=4, states=states)[0] == rows
    assert global_rows(with_data(more, workers=2), 4, dp_size=1, states=states)[0] == rows[:4]
    first, between = global_rows(more, 5, dp_size=1, states=states)
    assert first + global_rows(more, 7, dp_size=2, states=between)[0] == rows
    kept, _ = global_rows(config, 12, dp_size=1, states=states)
    assert kept != rows


def test_lanes_that_cannot_be_split_evenly_are_refused(config: RunConfig) -> None:
    _, states = global_rows(with_data(config, lanes=4), 1, dp_size=1)
    for lanes in (2, 1):
        with pytest.raises(ConfigError, match=f"data.lanes is {lanes}, but the run was saved with 4"):
            data_of(with_data(config, lanes=lanes), dp_rank=0, dp_size=1, tp_size=1, lane_states=states)


def orders(split: int) -> list[SampleOrder | ShardOrder]:
    samples = [30, 1, 5, 17] * 5
    chunks = order_of(samples, 3, split=split)
    shards = ShardOrder(
        corpus(samples), seed=1, source_name="prose", num_lanes=3, shuffle_window=8, split=split
    )
    return [chunks, shards]


@pytest.mark.parametrize("number", [0, 1], ids=["chunks", "whole shards"])
@pytest.mark.parametrize("split", [2, 5])
def test_lanes_that_share_take_the_blocks_of_one_in_turns(number: int, split: int) -> None:
    """Also of a source that comes later, where all of them begin."""
    shared, alone = orders(split)[number], orders(1)[number]
    length = 4 * split * shared.blocks_per_turn
    for lane in range(3):
        found: list[int] = []
        for heir in range(lane, 3 * split, 3):
            block = shared.first_block(heir)
            while block < length:
                found.append(block)
                assert (shared.block(heir, block) == alone.block(lane, block)).all()
                assert shared.epoch(heir, block) == alone.epoch(lane, block)
                block = shared.following(block)
        assert sorted(found) == list(range(length))
