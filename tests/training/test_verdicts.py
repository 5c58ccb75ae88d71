"""Verdicts are told one step later, but none is missed and a row of refusals is known at once."""

from __future__ import annotations

import torch

from metalm.training.guards import FINE, NOT_FINITE
from metalm.training.verdicts import Verdicts


def told(verdicts: Verdicts, step: int, verdict: int) -> list[tuple[int, bool]]:
    verdicts.add(step, torch.tensor(verdict), ())
    return [(found.step, found.is_refused) for found in verdicts.read()]


def test_after_a_refusal_steps_are_told_at_once() -> None:
    verdicts = Verdicts()
    assert told(verdicts, 1, FINE) == []
    assert told(verdicts, 2, NOT_FINITE) == [(1, False)]
    assert told(verdicts, 3, NOT_FINITE) == [(2, True), (3, True)]
    assert told(verdicts, 4, NOT_FINITE) == [(4, True)]
    assert told(verdicts, 5, FINE) == [(5, False)]
    assert told(verdicts, 6, FINE) == []
    assert [found.step for found in verdicts.read(everything=True)] == [6]


def test_a_verdict_is_that_of_its_step_whatever_becomes_of_the_tensor() -> None:
    verdicts, verdict = Verdicts(), torch.tensor(NOT_FINITE)
    verdicts.add(1, verdict, ())
    verdict.fill_(FINE)
    assert [found.is_refused for found in verdicts.read(everything=True)] == [True]


def test_a_run_that_goes_back_forgets() -> None:
    verdicts = Verdicts()
    told(verdicts, 1, NOT_FINITE)
    verdicts.forget()
    assert told(verdicts, 1, FINE) == []
