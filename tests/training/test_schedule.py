from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from metalm.config import ScheduleConfig
from metalm.training.schedule import learning_rate


def test_warms_up_from_the_first_step_without_a_zero() -> None:
    schedule = ScheduleConfig(warmup_steps=4)
    rates = [learning_rate(step, 2.0, 100, schedule) for step in range(1, 5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_equals_torch(decay: str) -> None:
    schedule = ScheduleConfig(warmup_steps=0, decay=decay, final_fraction=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    peer = (
        torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=50)
        if decay == "linear"
        else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    )
    for step in range(1, 51):
        optimizer.step()
        peer.step()
        assert learning_rate(step, 0.3, 50, schedule) == pytest.approx(peer.get_last_lr()[0], abs=1e-9)


def test_ends_at_the_final_fraction_and_stays() -> None:
    for decay in ("linear", "cosine"):
        schedule = ScheduleConfig(warmup_steps=10, decay=decay, final_fraction=0.1)
        assert learning_rate(100, 1.0, 100, schedule) == pytest.approx(0.1)
        assert learning_rate(500, 1.0, 100, schedule) == pytest.approx(0.1)
    assert math.isclose(learning_rate(99, 1.0, 100, ScheduleConfig(warmup_steps=1, decay="constant")), 1.0)


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: math.cos(math.pi * done / 2) ** 2),
        ("one_minus_sqrt", lambda done: 1 - done**0.5),
    ],
)
def test_the_peak_holds_between_warmup_and_decay(decay: str, shape: Callable[[float], float]) -> None:
    schedule = ScheduleConfig(warmup_steps=5, decay=decay, decay_steps=20, final_fraction=0.1)
    rates = [learning_rate(step, 2.0, 100, schedule) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:80] == [2.0] * 75
    assert rates[80:] == pytest.approx([2 * (0.1 + 0.9 * shape(k / 20)) for k in range(1, 21)], abs=1e-12)


def test_a_stable_phase_goes_on_into_a_decay_wherever_it_is_cut() -> None:
    """The decay hangs on the last step alone: what came before is that of the run without an end."""
    endless = ScheduleConfig(warmup_steps=5, decay="constant")
    ending = ScheduleConfig(warmup_steps=5, decay="one_minus_sqrt", decay_steps=10)
    for last in (40, 70):
        before = range(1, last - 9)
        assert [learning_rate(s, 1.0, last, ending) for s in before] == [
            learning_rate(s, 1.0, 1000, endless) for s in before
        ]
        assert learning_rate(last, 1.0, last, ending) == 0.0
