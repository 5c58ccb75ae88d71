"""The next step is fetched early, and nothing of it shows before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distributed.tiny import global_batch, micro_batches, tiny_config
from metalm.errors import DataError, MetaLMError
from metalm.parallel.agreement import Verdict
from metalm.training.fingerprint import fingerprint
from metalm.training.upcoming import Feed

CONFIG = tiny_config("unused", micro_batch_size=4)


class CountedData:
    """Two steps of data that count themselves, and then a fault."""

    wait_s = 0.5
    encoder_costs = np.zeros((2, 2, 0))

    def __init__(self) -> None:
        self.steps = 0

    def __next__(self) -> Any:
        if self.steps == 2:
            raise DataError("the third step cannot be read")
        self.steps += 1
        return micro_batches(global_batch(self.steps), CONFIG, 0, 1)

    def lane_states(self) -> dict[int, int]:
        return {0: self.steps}

    def counters(self) -> dict[str, int]:
        return {"text/rows": 8 * self.steps}

    def epochs(self) -> dict[str, int]:
        return {}

    def skipped_samples(self) -> int:
        return 0

    def tensor_imbalances(self) -> dict[str, float]:
        return {}


def as_asked(error: MetaLMError | None) -> tuple[Verdict, MetaLMError | None]:
    return (Verdict.FAIL if error else Verdict.GO_ON), error


@pytest.fixture
def feed(topology: Any) -> Iterator[Feed]:
    feed = Feed(CountedData(), topology, CONFIG.model, as_asked, has_failed=lambda: False)
    yield feed
    feed.close()


def test_what_is_known_of_a_step_stays_with_it(feed: Feed) -> None:
    first, second = feed.fetch(is_logged=True), feed.fetch(is_logged=False)
    assert (first.lane_states, second.lane_states) == ({0: 1}, {0: 2})
    assert first.figures is not None and first.figures["data/text/rows"].value == 8
    assert first.fingerprint is not None and first.fingerprint.result() == fingerprint(first.batches)
    assert (second.figures, second.fingerprint) == (None, None)
    shown = feed.described(second)
    assert shown.figures is not None and shown.figures["data/text/rows"].value == 16
    assert shown.fingerprint is not None and shown.fingerprint.result() != first.fingerprint.result()
    assert first.counts is not None and first.counts.result().rows == 8


def test_a_fault_that_is_met_early_is_not_raised(feed: Feed) -> None:
    for _ in range(2):
        assert feed.fetch(is_logged=False).verdict is Verdict.GO_ON
    third = feed.fetch(is_logged=True)
    assert third.verdict is Verdict.FAIL and third.batches == []
    assert isinstance(third.error, DataError)
