"""What the step guard refuses."""

from __future__ import annotations

import math

import pytest
import torch

from metalm.config import GuardConfig
from metalm.parallel.topology import Topology
from metalm.training.guards import FINE, NOT_FINITE, SPIKE, StepGuard

CONFIG = GuardConfig(spike_sigma=3.0, spike_window=8)
CPU = torch.device("cpu")


def judge(guard: StepGuard, loss: float, norm: float = 1.0) -> int:
    return int(guard.judge(torch.tensor([100 * loss]), torch.tensor([100.0]), torch.tensor(norm)))


@pytest.fixture
def settled(topology: Topology) -> StepGuard:
    """Losses of mean 2 and deviation 0.107, norms of mean 1 and deviation 0."""
    guard = StepGuard(CONFIG, ["text"], CPU)
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
    assert judge(StepGuard(CONFIG, ["text"], CPU), 1e6) == FINE
    settled.go_back(None)
    assert [judge(settled, loss) for loss in (1.0, 1e6, 1.0)] == [FINE] * 3


def test_refused_steps_stay_counted_where_the_run_goes_back(settled: StepGuard) -> None:
    saved = settled.state()
    assert [judge(settled, loss) for loss in (2.0, math.nan, 4.0)] == [FINE, NOT_FINITE, SPIKE]
    settled.go_back(saved)
    assert settled.skipped.tolist() == [8, 1, 1]


def test_a_guard_without_sigma_refuses_only_what_is_not_finite(topology: Topology) -> None:
    guard = StepGuard(GuardConfig(spike_sigma=None, spike_window=2), ["text"], CPU)
    assert [judge(guard, loss) for loss in (1.0, 1.0, 1e9, math.nan)] == [FINE, FINE, FINE, NOT_FINITE]


def test_a_restored_guard_judges_alike(settled: StepGuard) -> None:
    judge(settled, math.nan)
    again = StepGuard(CONFIG, ["text"], CPU)
    again.load(settled.state())
    assert again.state() == settled.state()
    assert judge(again, 2.4) == judge(settled, 2.4) == SPIKE
    other = StepGuard(CONFIG.model_copy(update={"spike_window": 4}), ["text"], CPU)
    other.load(settled.state())
    assert judge(other, 1e6) == FINE  # its window starts empty
    assert other.skipped.tolist() == [9, 1, 1]


def mixed(guard: StepGuard, text: float, scenes: float, text_share: float) -> int:
    """The verdict on a batch of 1,000 positions."""
    counts = torch.tensor([1000 * text_share, 1000 * (1 - text_share)])
    return int(guard.judge(torch.tensor([text, scenes]) * counts, counts, torch.tensor(1.0)))


@pytest.fixture
def mixing(topology: Topology) -> StepGuard:
    """Used to losses of text about 5, and of scenes about 1, half of each."""
    guard = StepGuard(CONFIG, ["text", "scenes"], CPU)
    for number in range(8):
        noise = 0.1 * (-1) ** number
        assert mixed(guard, 5.0 + noise, 1.0 + noise, 0.5) == FINE
    return guard


@pytest.mark.parametrize(
    ("text", "scenes", "text_share", "verdict"),
    [
        (5.0, 1.0, 1.0, FINE),  # a loss of 5, where 3 is usual
        (5.0, 1.0, 0.0, FINE),
        (5.0, 1.5, 0.1, SPIKE),  # a loss of 1.85
        (5.6, 1.0, 1.0, SPIKE),
    ],
)
def test_a_loss_is_judged_by_its_sources(
    mixing: StepGuard, text: float, scenes: float, text_share: float, verdict: int
) -> None:
    assert mixed(mixing, text, scenes, text_share) == verdict


def test_a_source_that_was_not_there_is_no_spike(topology: Topology) -> None:
    guard = StepGuard(CONFIG, ["text", "scenes"], CPU)
    for number in range(8):
        assert mixed(guard, 5.0 + 0.1 * (-1) ** number, 0.0, 1.0) == FINE
    assert mixed(guard, 5.0, 90.0, 0.5) == FINE
    assert mixed(guard, 7.0, 90.0, 0.5) == SPIKE


def test_a_refusal_is_explained(mixing: StepGuard) -> None:
    mixed(mixing, 9.0, 1.0, 0.5)
    assert mixing.explain() == (
        "its loss is 2 above the usual, where 0.3207 is the limit; "
        "loss of text 9 (usual: 5), scenes 1 (usual: 1)"
    )
    mixed(mixing, math.nan, 1.0, 0.5)
    assert mixing.explain().startswith(
        "its loss or its gradients are not finite; loss of text nan (usual: 5)"
    )


def test_a_window_of_other_sources_starts_empty(mixing: StepGuard) -> None:
    other = StepGuard(CONFIG, ["scenes", "text"], CPU)
    other.load(mixing.state())
    assert mixed(other, 1e6, 1e6, 0.5) == FINE
    again = StepGuard(CONFIG, ["text", "scenes"], CPU)
    again.load(mixing.state())
    assert mixed(again, 9.0, 1.0, 0.5) == SPIKE
