"""Which ranks are called slow."""

from __future__ import annotations

import pytest

from metalm.training.slow_ranks import Comparison, RankTimes


def lines(*ranks: RankTimes, seconds: float = 10.0, reports: int = 3) -> list[str]:
    """What is said in the last of some reports of 10 steps."""
    comparison = Comparison(2.0)
    said = [comparison.compare(ranks, 10, seconds)[1] for _ in range(reports)]
    assert not any(said[:2])  # once or twice, any machine is disturbed
    return said[-1]


def rank(agreeing: float = 0.1, data_wait: float | None = 0.1, probe: float = 0.001) -> RankTimes:
    return RankTimes("host", agreeing, data_wait, probe)


def test_a_rank_that_alone_reads_data_is_compared_with_nobody() -> None:
    assert lines(rank(agreeing=0.0, data_wait=8.0), rank(agreeing=8.0, data_wait=None)) == []


@pytest.mark.parametrize(
    ("slow", "what"),
    [
        (rank(agreeing=0.0), "it comes to a step late by 90 ms"),
        (rank(agreeing=0.1, data_wait=2.0), "it waits for data for 200 ms"),
        (rank(agreeing=1.0, probe=0.01), "its device takes for a fixed product 10 ms"),
    ],
)
def test_a_rank_that_stands_out_is_named_with_what_it_does(slow: RankTimes, what: str) -> None:
    others = [rank(agreeing=1.0)] * 3
    (line,) = lines(*others, slow)
    assert line.startswith(f"rank 3 on host is slow: {what}, the median rank ")


@pytest.mark.parametrize(
    ("slow", "seconds"),
    [
        (rank(data_wait=0.55), 1.0),  # 45 ms more than others
        (rank(data_wait=2.0), 50.0),  # 190 ms of steps of 5 s
        (rank(probe=0.005), 1.0),
    ],
)
def test_what_slows_nothing_down_is_not_told(slow: RankTimes, seconds: float) -> None:
    assert lines(rank(), rank(), slow, seconds=seconds) == []
