"""A claim of the paper: what is said, the arms that try it, and what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from metalm.errors import DataError
from metalm.reproduction.arms import Arm, Setting
from metalm.reproduction.data.set_folder import SOURCE_NAME
from metalm.reproduction.jobs import Job, with_needs


class Series(NamedTuple):
    """Scores of an arm on one set of questions, over seeds."""

    arm: Arm
    scoring: str

    @property
    def key(self) -> str:
        """For people and files."""
        return f"{self.arm.name}, {self.scoring}"


@dataclass(frozen=True)
class Comparison:
    """A statement that one series is above another."""

    about: str
    better: Series
    worse: Series
    paper: str = ""
    """The paper's own figures, where they are not those of the whole claim."""


@dataclass(frozen=True)
class ChanceCheck:
    """A series that may know nothing: one of shuffled labels."""

    series: Series
    chance: float
    """Share of the most frequent answer among the questions."""


@dataclass(frozen=True)
class Curve:
    """Scores by the number of examples that were trained on."""

    about: str
    points: tuple[tuple[int, Series], ...]


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims in small."""

    letter: str
    title: str
    says: str
    """What the paper claims."""
    how: str
    """How it is tried here."""
    paper: tuple[tuple[str, str], ...]
    """The paper's own figures, by what they are of."""
    sets: tuple[str, ...]
    """Data sets, as tools/fetch_data.py names them."""
    shared: tuple[Job, ...]
    """Data and pretraining, each job behind those that it needs."""
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    chance: tuple[ChanceCheck, ...] = ()
    curves: tuple[Curve, ...] = ()
    metric: str = "accuracy"
    tried: str = ""
    """Where it was not shown: what was tried, and what that suggests."""
    reported: tuple[Series, ...] = field(default=())
    """Further series of the table, which are compared to none."""

    def series(self) -> list[Series]:
        """All of the table, each once."""
        found: list[Series] = []
        for comparison in self.comparisons:
            found += [comparison.better, comparison.worse]
        found += [check.series for check in self.chance]
        found += [series for curve in self.curves for _, series in curve.points]
        found += self.reported
        return list(dict.fromkeys(found))

    def jobs(self, setting: Setting) -> Iterator[Job]:
        """All, each behind what it needs; what is shared not before an arm needs it."""
        waiting = {job.name: job for job in self.shared}

        def taken(names: Sequence[str]) -> Iterator[Job]:
            for name in names:
                if (job := waiting.pop(name, None)) is not None:
                    yield from taken(job.needs)
                    yield job

        for arm in self.arms:
            for job in arm.jobs(setting):
                yield from taken(job.needs)
                yield job
        assert not waiting, f"no arm needs {', '.join(waiting)}"


def sets_of(claims: Iterable[Claim]) -> list[str]:
    """The data sets that claims need, each once."""
    return list(dict.fromkeys(name for claim in claims for name in claim.sets))


def check_data(claims: Iterable[Claim], data: Path) -> None:
    """
    Raises:
        DataError: a claim's data sets are not there.
    """
    if missing := [name for name in sets_of(claims) if not (data / name / SOURCE_NAME).is_file()]:
        raise DataError(
            f"there is no {', '.join(missing)} in {data}: get it by "
            f"`python tools/fetch_data.py {' '.join(missing)} --output {data}`, or give --data"
        )


def jobs_for(names: Sequence[str], claims: Sequence[Claim], setting: Setting) -> tuple[Job, ...]:
    """Jobs of other claims, by name, with all that they need, each behind what it needs."""
    return with_needs(names, (job for claim in claims for job in claim.jobs(setting)))


def jobs_of(claims: Iterable[tuple[Claim, Setting]]) -> list[Job]:
    """Of several claims; what they share is there once."""
    found: dict[str, Job] = {}
    for claim, setting in claims:
        for job in claim.jobs(setting):
            found.setdefault(job.name, job)
    return list(found.values())
