"""A job of the queue: public commands that make one thing, and the mark that says it is done."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from metalm.commit import git_commit
from metalm.errors import ConfigError
from metalm.project_files import project_root
from metalm.reproduction.this_machine import Precision, machine

Command = tuple[str, ...]
PIPELINES = "pipelines/reproduce"
PRECISION = "training.precision="
"""How the word of a command begins that tells a training's precision."""


@dataclass(frozen=True)
class Job:
    """One entry of the queue."""

    name: str
    """Its folder below that of all: `b_metalm/seed_1`, `shared/b_pretrained`."""
    commands: Callable[[], Sequence[Command]]
    """Run one after another; asked for when all that it needs is done. Each goes on where it was killed."""
    needs: tuple[str, ...] = ()
    minutes: float = 1.0
    """Expected, on one core of a CPU."""


def shared_job(name: str, commands: Sequence[Command], *needs: str, minutes: float = 0.1) -> Job:
    """A job of data or pretraining that several arms share.

    Args:
        name, needs: below `shared/`.
    """
    return Job(f"shared/{name}", lambda: commands, tuple(f"shared/{one}" for one in needs), minutes)


@dataclass(frozen=True)
class Done:
    """What is kept of a job that is done."""

    commands: list[Command]
    fingerprint: str
    """Of the commands and of the pipelines that they name."""
    seconds: float
    """Of wall time, since its last start."""
    commit: str | None
    machine: str

    @property
    def precisions(self) -> set[str]:
        """Of its trainings."""
        words = (word for command in self.commands for word in command)
        return {word.removeprefix(PRECISION) for word in words if word.startswith(PRECISION)}


_DONE = TypeAdapter(Done)


class Marks:
    """Which jobs are done, by files in `jobs/`, beside what the jobs have said."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "jobs"

    def log_of(self, job: Job) -> Path:
        """Where the output of its commands goes."""
        return self._path(job, ".log")

    def is_done(self, job: Job) -> bool:
        """
        Raises:
            ConfigError: it was done by other commands or pipelines than those of today.
        """
        done = self.read(job)
        if done is None:
            return False
        if done.fingerprint != _fingerprint(job.commands()):
            raise ConfigError(
                f"{job.name} was made with other settings or pipelines than today's (see "
                f"{self._path(job, '.json')}): choose another --out, or remove that file and "
                f"{self._folder.parent / job.name}"
            )
        return True

    def read(self, job: Job) -> Done | None:
        """What was kept when it was done.

        Raises:
            ConfigError: the file that says so is damaged.
        """
        path = self._path(job, ".json")
        if not path.is_file():
            return None
        try:
            return _DONE.validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"{path} does not say how {job.name} was done ({first['msg']}): remove it to run it again"
            ) from None

    def precision(self, jobs: Iterable[Job]) -> Precision | None:
        """What the trainings of those that are done were run in; None: there are none."""
        words = {word for one in filter(None, map(self.read, jobs)) for word in one.precisions}
        return next((precision for precision in get_args(Precision) if precision in words), None)

    def write(self, job: Job, seconds: float) -> None:
        """It is done."""
        commands = list(job.commands())
        done = Done(commands, _fingerprint(commands), round(seconds, 1), git_commit(), machine())
        path = self._path(job, ".json")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(done), indent=1) + "\n")
        partial.replace(path)

    def _path(self, job: Job, suffix: str) -> Path:
        return self._folder / (job.name.replace("/", "--") + suffix)


def with_needs(names: Sequence[str], jobs: Iterable[Job]) -> tuple[Job, ...]:
    """Those of the jobs that have these names, and all that they need, in the order that is given."""
    known = {job.name: job for job in jobs}
    waiting, needed = list(names), set[str]()
    while waiting:
        needed.add(name := waiting.pop())
        waiting += known[name].needs
    return tuple(job for name, job in known.items() if name in needed)


def in_order(jobs: Sequence[Job]) -> list[list[Job]]:
    """Stages: each job is behind all that it needs, in the first stage where that is so."""
    stage_of: dict[str, int] = {}
    stages: list[list[Job]] = []
    for job in jobs:  # those that are needed stand before
        stage = max((stage_of[name] + 1 for name in job.needs), default=0)
        stage_of[job.name] = stage
        stages += [[] for _ in range(stage + 1 - len(stages))]
        stages[stage].append(job)
    return stages


def by_longest_path(jobs: Sequence[Job]) -> list[Job]:
    """First the jobs that take longest together with what comes behind them.

    Args:
        jobs: each behind all that it needs.
    """
    following: dict[str, float] = {}
    for job in reversed(jobs):  # those that need a job stand behind it
        path = job.minutes + following.get(job.name, 0.0)
        for name in job.needs:
            following[name] = max(following.get(name, 0.0), path)
    return sorted(jobs, key=lambda job: -job.minutes - following.get(job.name, 0.0))


def tool(name: str, *words: object) -> Command:
    """The command of a tool that comes with MetaLM."""
    return (sys.executable, str(project_root() / "tools" / f"{name}.py"), *map(str, words))


def metalm(*words: object) -> Command:
    """A `metalm` command."""
    return (sys.executable, "-m", "metalm", *map(str, words))


def pipeline(name: str) -> Path:
    """A pipeline of this folder's."""
    return project_root() / PIPELINES / f"{name}.yaml"


def _fingerprint(commands: Sequence[Command]) -> str:
    digest = hashlib.sha256()
    for command in commands:
        # Where Python and the project are makes no difference; a folder beside it may begin with its name.
        words = [word.replace(sys.executable, "").replace(f"{project_root()}/", "/") for word in command]
        digest.update(json.dumps(words).encode())
        for word in command:
            if word.endswith(".yaml") and Path(word).parent == project_root() / PIPELINES:
                for content in _with_bases(Path(word)):
                    digest.update(content)
    return digest.hexdigest()


def _with_bases(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    yield content
    if (base := yaml.safe_load(content).get("extends")) is not None:
        yield from _with_bases(path.parent / base)
