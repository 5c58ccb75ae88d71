"""Arms: one way to train, at the learning rate that is best on validation, with several seeds.

The rates of an arm's grid are tried with a seed of their own (0), so that no seed that is reported has chosen
its rate. Jobs of an arm: `ARM/rate_R` for each rate, then `ARM/seed_N`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metalm.errors import ConfigError
from metalm.reproduction.jobs import PRECISION, Command, Job, Marks, metalm, pipeline, tool
from metalm.reproduction.this_machine import Precision, Scale

SEARCH_SEED = 0
USUAL_SEEDS = 3
ON_GPU = (
    "data.workers=1",
    "checkpoint.every_steps=1000",
    "monitor.evaluate_every_steps=200",
)
"""Of every run at that scale: a step takes less time there than its rows, and saving often more than both."""


@dataclass(frozen=True)
class Setting:
    """What a reproduction is run with."""

    data: Path
    """Where tools/fetch_data.py has written the data sets."""
    out: Path
    scale: Scale
    seeds: int | None = None
    """Of each arm; None: as many as it usually has."""
    precision: Precision = "fp32"
    """Of all training and scoring."""

    def shared(self, name: str) -> Path:
        """The folder of what several arms share."""
        return self.out / "shared" / name

    def train(self, name: str, folder: Path, seed: int, *overrides: str) -> Command:
        """Train, or go on with, the run of one of our pipelines in a folder.

        Args:
            name: of the pipeline, without `.yaml`.
        """
        named = (f"run.folder={folder.parent}", f"run.name={folder.name}")
        own = (*named, f"run.seed={seed}", f"{PRECISION}{self.precision}")
        return metalm("train", pipeline(name), *own, *(ON_GPU if self.scale == "gpu" else ()), *overrides)

    def steps_on_gpu(self, steps: int) -> tuple[str, ...]:
        """Overrides for another number of steps than the pipeline's, which is that of the CPU."""
        return (f"training.steps={steps}",) if self.scale == "gpu" else ()

    def examples(
        self,
        name: str,
        tasks: Sequence[Path],
        split: str,
        *,
        data: Path | None = None,
        most: int | None = None,
        wordings: str | None = None,
    ) -> Command:
        """Word examples of tasks, and write them as shards that arms share.

        Args:
            data: folder of the tasks' data; default: that of all data sets.
            most: of each task.
            wordings: as `--wordings` of tools/prepare_tasks.py.
        """
        words: list[object] = ["--tasks", ",".join(map(str, tasks)), "--split", split]
        words += ["--data", data or self.data]
        words += ["--most", most] if most is not None else []
        words += ["--wordings", wordings] if wordings is not None else []
        return tool("prepare_tasks", *words, "--processes", 1, "--out", self.shared(name))

    def shuffled_examples(
        self, name: str, folder: str, tasks: Sequence[Path], *, most: int | None = None
    ) -> tuple[Command, Command]:
        """Make tasks whose training answers are shuffled, and write their examples as shards that arms share.

        Args:
            name, folder: of examples and tasks, among what is shared.
            most: of each task.
        """
        made = self.shared(folder)
        drawn = tool("vary_task", "shuffled", *tasks, "--data", self.data, "--out", made)
        files = [made / task.name for task in tasks]
        return drawn, self.examples(name, files, "train", most=most, data=made)


@dataclass(frozen=True)
class Scoring:
    """Questions that a trained arm is asked."""

    name: str
    tasks: tuple[Path, ...]
    """Task files; the score is the mean over them."""
    split: str = "test"
    by: Literal["likelihood", "generation"] = "likelihood"
    limit: int | None = None
    data: Path | None = None
    """Folder of the task's data; default: that of all data sets."""
    readers: str | None = None
    """As `--readers`: who reads what; default: as it was trained."""
    shots: int | None = None
    """Demonstrations, in the wording for prompts; None: as finetuned."""
    overrides: tuple[str, ...] = ()
    """Of the run's config: room for longer prompts than rows of training."""
    templates: int = 1
    """As finetuned: the mean over so many wordings."""

    def command(self, run: Path, setting: Setting) -> Command:
        """Ask a run, and write to `scores/NAME` in its folder."""
        words: list[object] = [
            "--tasks",
            ",".join(map(str, self.tasks)),
            "--data",
            self.data or setting.data,
            "--split",
            self.split,
        ]
        words += ["--score-by", self.by, "--overflow", "cut_right", "--out", self.folder(run)]
        words += ["--limit", self.limit] if self.limit is not None else []
        words += ["--readers", self.readers] if self.readers is not None else []
        words += ["--shots", self.shots] if self.shots is not None else []
        words += ["--templates", self.templates] if self.templates > 1 else []
        return metalm("evaluate-tasks", run, *self.overrides, *words)

    def folder(self, run: Path) -> Path:
        """Where the answers are."""
        return run / "scores" / self.name


@dataclass(frozen=True)
class Score:
    """What one run has reached."""

    value: float
    """Between 0 and 1, of the tasks' first metrics."""
    questions: int
    """In all wordings together."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    about: str
    """For people."""
    pipeline: str
    overrides: tuple[str, ...]
    scorings: tuple[Scoring, ...]
    needs: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    """Learning rates that are tried, where there are several; none: that of another arm, `rate_of`."""
    chosen_on: Scoring | None = None
    rate_of: Arm | None = None
    minutes: float = 2.0
    """Of one run with its scores, on one core."""
    usual_seeds: int = USUAL_SEEDS

    def jobs(self, setting: Setting) -> Iterator[Job]:
        """All, each behind what it needs."""
        for rate in self.grid:
            yield self._job(setting, f"rate_{rate:g}", SEARCH_SEED, self.needs, rate)
        yield from self._seed_jobs(setting).values()

    def _seed_jobs(self, setting: Setting) -> dict[int, Job]:
        searcher = self.rate_of or self
        needs = (*self.needs, *(f"{searcher.name}/rate_{rate:g}" for rate in searcher.grid))
        seeds = range(1, self.num_seeds(setting) + 1)
        return {seed: self._job(setting, f"seed_{seed}", seed, needs, None) for seed in seeds}

    def num_seeds(self, setting: Setting) -> int:
        """How many are trained."""
        return setting.seeds or self.usual_seeds

    @property
    def grid(self) -> tuple[float, ...]:
        """Rates that are tried: of one there is nothing to choose."""
        return self.rates if len(self.rates) > 1 else ()

    def _job(self, setting: Setting, name: str, seed: int, needs: tuple[str, ...], rate: float | None) -> Job:
        run = setting.out / self.name / name

        def commands() -> list[Command]:
            chosen = self.chosen_rate(setting) if rate is None else rate
            own = f"training.optimizer.learning_rate={chosen:g}"
            made = [setting.train(self.pipeline, run, seed, *self.overrides, own)]
            asked = self.scorings if rate is None else (self._searched_on(),)
            return made + [scoring.command(run, setting) for scoring in asked]

        return Job(f"{self.name}/{name}", commands, needs, self.minutes)

    def _searched_on(self) -> Scoring:
        assert self.chosen_on is not None
        return self.chosen_on

    def chosen_rate(self, setting: Setting) -> float:
        """The rate that is best on validation; of several that are equal the first.

        Raises:
            ConfigError: not all rates are tried yet.
        """
        searcher = self.rate_of or self
        if not searcher.grid:
            return searcher.rates[0]
        found = {}
        for rate in searcher.grid:
            run = setting.out / searcher.name / f"rate_{rate:g}"
            if (score := read_score(run, searcher._searched_on())) is None:
                raise ConfigError(f"{searcher.name}: rate {rate:g} is not tried yet: run its job first")
            found[rate] = score.value
        return max(found, key=lambda rate: found[rate])

    def done_runs(self, setting: Setting) -> dict[int, Path]:
        """The folders of the seeds whose jobs are done: others may have been asked in part.

        Raises:
            ConfigError: they were done with other settings or pipelines than today's.
        """
        marks = Marks(setting.out)
        done = [seed for seed, job in self._seed_jobs(setting).items() if marks.is_done(job)]
        return {seed: setting.out / self.name / f"seed_{seed}" for seed in done}

    def scores(self, setting: Setting, scoring: str) -> dict[int, Score]:
        """Of the seeds that are done; see `done_runs`."""
        (asked,) = [one for one in self.scorings if one.name == scoring]
        found = {seed: read_score(run, asked) for seed, run in self.done_runs(setting).items()}
        return {seed: score for seed, score in found.items() if score is not None}


def read_score(run: Path, scoring: Scoring) -> Score | None:
    """What a run has reached; None where it was not asked yet."""
    path = scoring.folder(run) / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    values = [next(iter(result["scores"].values()))["value"] for result in results]
    return Score(sum(values) / len(values), sum(result["questions"] for result in results))
