"""What was measured of a claim, read from the runs' folders, and what it says of the claim."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from metalm.reproduction.arms import Arm, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Series
from metalm.reproduction.intervals import Chance, Interval, Verdict, chance_of, interval, judge, judge_all
from metalm.reproduction.jobs import Done, Marks
from metalm.run_metrics import read_metrics

_SEEN = re.compile(r"data/\w+/(tokens|samples)")
"""Figures of a run: what it has read of a source."""
HELD_OUT = "held_out/tasks"
"""The figure of a run that its curve is of: the loss of the answers of validation."""


@dataclass(frozen=True)
class Measured:
    """A series."""

    by_seed: Mapping[int, float]
    questions: int
    seeds: int
    """That were asked for."""

    @property
    def is_whole(self) -> bool:
        """Whether all of them are done."""
        return len(self.by_seed) == self.seeds

    @cached_property
    def scores(self) -> Interval:
        """The mean over seeds."""
        return interval(list(self.by_seed.values()))


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
class Origin:
    """What jobs were done by."""

    commit: str
    machine: str


@dataclass(frozen=True)
class Figures:
    """All that was measured of a claim; what is not done yet is left out."""

    minutes: float
    """Of all jobs that are done, what is shared with other claims included, one after another."""
    origins: tuple[Origin, ...]
    """Each once."""
    series: Mapping[str, Measured]
    """By `Series.key`."""
    curves: tuple[LossCurve, ...]
    arms: Mapping[str, ArmFacts]
    """By name."""
    precisions: tuple[str, ...] = ("fp32",)
    """That its arms were trained in."""


@dataclass(frozen=True)
class Judged:
    """A comparison."""

    comparison: Comparison
    verdict: Verdict


@dataclass(frozen=True)
class ClaimResults:
    """A claim with its figures, and what they say by the rule."""

    claim: Claim
    figures: Figures

    @cached_property
    def measured(self) -> Mapping[Series, Measured]:
        """Of all series that are there."""
        series = self.figures.series
        return {one: series[one.key] for one in self.claim.series() if one.key in series}

    @cached_property
    def judged(self) -> tuple[Judged, ...]:
        """The comparisons of which both sides are there, with all seeds."""
        measured = self.measured
        whole = {one for one, found in measured.items() if found.is_whole}
        return tuple(
            Judged(one, judge(measured[one.better].scores, measured[one.worse].scores))
            for one in self.claim.comparisons
            if one.better in whole and one.worse in whole
        )

    @property
    def verdict(self) -> Verdict | Literal["not done"]:
        """Of the whole claim."""
        if len(self.judged) < len(self.claim.comparisons):
            return "not done"
        return judge_all(one.verdict for one in self.judged)

    @property
    def at_chance(self) -> Mapping[ChanceCheck, Chance]:
        """Of the arms on shuffled answers that are there."""
        return {
            check: chance_of(found.scores, check.chance, found.questions)
            for check in self.claim.chance
            if (found := self.measured.get(check.series)) is not None
        }


def results_of(claim: Claim, setting: Setting) -> ClaimResults:
    """Read a claim's runs that are done.

    Raises:
        ConfigError: they were done with other settings or pipelines than today's.
    """
    marks = Marks(setting.out)
    done = [mark for job in claim.jobs(setting) if (mark := marks.read(job)) is not None]
    origins = {(one.commit or "unknown", one.machine) for one in done}
    figures = Figures(
        round(sum(one.seconds for one in done) / 60, 1),
        tuple(Origin(*one) for one in sorted(origins)),
        {one.key: found for one in claim.series() if (found := _measure(one, setting)) is not None},
        tuple(curve for arm in claim.arms if (curve := _loss_curve(arm, setting)) is not None),
        {arm.name: facts for arm in claim.arms if (facts := _facts(arm, setting)) is not None},
        precisions(done),
    )
    return ClaimResults(claim, figures)


def precisions(done: Sequence[Done]) -> tuple[str, ...]:
    """What the trainings of jobs that are done were run in, each once."""
    return tuple(sorted({word for one in done for word in one.precisions}))


def _measure(series: Series, setting: Setting) -> Measured | None:
    """The scores of a series; None where no seed is done."""
    scores = series.arm.scores(setting, series.scoring)
    if not scores:
        return None
    by_seed = {seed: score.value for seed, score in scores.items()}
    questions = next(iter(scores.values())).questions
    return Measured(by_seed, questions, series.arm.num_seeds(setting))


def numbers_of_seeds(results: Iterable[ClaimResults]) -> str:
    """Of their arms, such as `3 or 5 seeds`."""
    numbers = {found.seeds for one in results for found in one.measured.values()}
    return f"{' or '.join(map(str, sorted(numbers)))} seeds"


def _loss_curve(arm: Arm, setting: Setting) -> LossCurve | None:
    """The held-out losses of an arm's seeds at the steps that all of them have; None where there are none."""
    runs = []
    for folder in arm.done_runs(setting).values():
        runs.append({entry["step"]: entry[HELD_OUT] for entry in read_metrics(folder) if HELD_OUT in entry})
    if not runs:
        return None
    steps = sorted(set.intersection(*map(set, runs)))
    losses = tuple(sum(run[step] for run in runs) / len(runs) for step in steps)
    return LossCurve(arm.name, tuple(steps), losses) if steps else None


def _facts(arm: Arm, setting: Setting) -> ArmFacts | None:
    first = next(iter(arm.done_runs(setting).values()), None)
    if first is None:
        return None
    seen: Mapping[str, Any] = {}
    for entry in read_metrics(first):
        seen = entry if any(_SEEN.fullmatch(key) for key in entry) else seen
    totals = {"tokens": 0, "samples": 0}
    for key, value in seen.items():
        if found := _SEEN.fullmatch(key):
            totals[found[1]] += int(value)
    return ArmFacts(arm.chosen_rate(setting), totals["tokens"], totals["samples"])
