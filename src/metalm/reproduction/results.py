"""What was measured: scores, curves and verdicts of a claim, read from the runs' folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metalm.reproduction.arms import Arm, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Series
from metalm.reproduction.intervals import Interval, Verdict, interval, is_at_chance, judge, judge_all
from metalm.training.monitor.json_lines import read_metrics

HELD_OUT = "held_out/tasks"
"""The figure of a run that its curve is of: the loss of the answers of validation."""


@dataclass(frozen=True)
class Measured:
    """A series."""

    scores: Interval
    by_seed: Mapping[int, float]
    questions: int


@dataclass(frozen=True)
class Judged:
    """A comparison."""

    comparison: Comparison
    verdict: Verdict


@dataclass(frozen=True)
class LossCurve:
    """Of an arm: at each step, the mean over seeds."""

    arm: str
    """Its name."""
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class ArmFacts:
    """What an arm has taken."""

    rate: float
    """Learning rate that was chosen."""
    tokens: int
    """Positions of the rows that one run was trained on."""
    examples: int
    """Of training that one run has seen, repeated ones included."""


@dataclass(frozen=True)
class ClaimResults:
    """All that is there of a claim; what is not done yet is left out."""

    claim: Claim
    measured: Mapping[Series, Measured]
    judged: Sequence[Judged]
    verdict: Verdict | Literal["not done"]
    at_chance: Mapping[ChanceCheck, bool]
    curves: Sequence[LossCurve]
    arms: Mapping[str, ArmFacts]


def results_of(claim: Claim, setting: Setting) -> ClaimResults:
    """Read a claim's runs."""
    measured = {series: found for series in claim.series() if (found := measure(series, setting)) is not None}
    judged = judgements(claim, measured, setting.seeds)
    whole = len(judged) == len(claim.comparisons)
    return ClaimResults(
        claim,
        measured,
        judged,
        judge_all(one.verdict for one in judged) if whole else "not done",
        {
            check: is_at_chance(found.scores, check.chance, found.questions)
            for check in claim.chance
            if (found := measured.get(check.series)) is not None
        },
        [curve for arm in claim.arms if (curve := loss_curve(arm, setting)) is not None],
        {arm.name: facts for arm in claim.arms if (facts := _facts(arm, setting)) is not None},
    )


def judgements(claim: Claim, measured: Mapping[Series, Measured], seeds: int) -> list[Judged]:
    """The comparisons of which both sides are there, with all seeds."""
    whole = {series for series, found in measured.items() if len(found.by_seed) == seeds}
    return [
        Judged(one, judge(measured[one.better].scores, measured[one.worse].scores))
        for one in claim.comparisons
        if one.better in whole and one.worse in whole
    ]


def measure(series: Series, setting: Setting) -> Measured | None:
    """The scores of a series; None where no seed is done."""
    scores = series.arm.scores(setting, series.scoring)
    if not scores:
        return None
    by_seed = {seed: score.value for seed, score in scores.items()}
    questions = next(iter(scores.values())).questions
    return Measured(interval(list(by_seed.values())), by_seed, questions)


def loss_curve(arm: Arm, setting: Setting) -> LossCurve | None:
    """The held-out losses of an arm's seeds at the steps that all of them have; None where there are none."""
    runs = []
    for folder in _seeds(arm, setting):
        runs.append({entry["step"]: entry[HELD_OUT] for entry in read_metrics(folder) if HELD_OUT in entry})
    if not runs:
        return None
    steps = sorted(set.intersection(*map(set, runs)))
    losses = tuple(sum(run[step] for run in runs) / len(runs) for step in steps)
    return LossCurve(arm.name, tuple(steps), losses) if steps else None


def _facts(arm: Arm, setting: Setting) -> ArmFacts | None:
    folders = _seeds(arm, setting)
    if not folders:
        return None
    seen = [entry for entry in read_metrics(folders[0]) if "data/tasks/samples" in entry]
    if not seen:
        return None
    return ArmFacts(
        arm.chosen_rate(setting), int(seen[-1]["data/tasks/tokens"]), int(seen[-1]["data/tasks/samples"])
    )


def _seeds(arm: Arm, setting: Setting) -> list[Path]:
    folders = [setting.out / arm.name / f"seed_{seed}" for seed in range(1, setting.seeds + 1)]
    return [folder for folder in folders if folder.is_dir()]
