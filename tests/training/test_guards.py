"""What the step guard refuses."""

from __future__ import annotations

import math

import pytest
import torch

from metalm.config import GuardConfig
from metalm.parallel.topology import Topology
from metalm.training.guards import FINE, NOT_FINITE, SPIKE, StepGuard

CONFIG = GuardConfig(spike_sigma=3.0, spike_window=8)


def judge(guard: StepGuard, loss: float, norm: float = 1.0) -> int:
    return int(guard.judge(torch.tensor(loss), torch.tensor(norm)))


@pytest.fixture
def settled(topology: Topology) -> StepGuard:
    """Losses of mean 2 and deviation 0.107, norms of mean 1 and deviation 0."""
    guard = StepGuard(CONFIG, torch.device("cpu"))
    for number in range(8):
        assert judge(guard, 2.0 + 0.1 * (-1) ** number) == FINE
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "verdict"),
    [
        (2.3, 1.0, FINE),
        (2.4, 1.0, SPIKE),
        (-5.0, 1.0, FINE),
        (2.0, 1.1, SPIKE),
        (math.nan, 1.0, NOT_FINITE),
        (math.inf, 1.0, NOT_FINITE),
        (2.0, -1.0, NOT_FINITE),
        (2.0, math.nan, NOT_FINITE),
    ],
)
def test_steps_are_judged_by_those_before(settled: StepGuard, loss: float, norm: float, verdict: int) -> None:
    assert judge(settled, loss, norm) == verdict
    assert settled.skipped.tolist() == [8 + (verdict == FINE), verdict == NOT_FINITE, verdict == SPIKE]


def test_refused_steps_do_not_become_usual(settled: StepGuard) -> None:
    assert [judge(settled, 4.0) for _ in range(20)] == [SPIKE] * 20
    assert judge(settled, 2.0) == FINE


def test_nothing_is_a_spike_before_the_window_is_full_or_after_a_reset(settled: StepGuard) -> None:
    assert judge(StepGuard(CONFIG, torch.device("cpu")), 1e6) == FINE
    settled.reset()
    assert [judge(settled, loss) for loss in (1.0, 1e6, 1.0)] == [FINE] * 3


def test_a_guard_without_sigma_refuses_only_what_is_not_finite(topology: Topology) -> None:
    guard = StepGuard(GuardConfig(spike_sigma=None, spike_window=2), torch.device("cpu"))
    assert [judge(guard, loss) for loss in (1.0, 1.0, 1e9, math.nan)] == [FINE, FINE, FINE, NOT_FINITE]


def test_a_restored_guard_judges_alike(settled: StepGuard) -> None:
    judge(settled, math.nan)
    again = StepGuard(CONFIG, torch.device("cpu"))
    again.load(settled.state())
    assert again.state() == settled.state()
    assert judge(again, 2.4) == judge(settled, 2.4) == SPIKE
    other = StepGuard(CONFIG.model_copy(update={"spike_window": 4}), torch.device("cpu"))
    other.load(settled.state())
    assert judge(other, 1e6) == FINE  # its window starts empty
    assert other.skipped.tolist() == [9, 1, 1]
