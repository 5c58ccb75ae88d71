"""Mixtures of tasks for training: which tasks, how many examples of each, and in which wordings."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metalm.data.preparation.example_shards import TaskExample
from metalm.data.preparation.tally import Place
from metalm.errors import ConfigError
from metalm.tasks.records import Tally, TaskData
from metalm.tasks.rendering import UnusableRecord, render
from metalm.tasks.task_file import TaskFile, Template

Wordings = Literal["first", "drawn", "all"]
"""Of each record: the first template of finetuning; one of those for instruction tuning, drawn; or all."""
OTHER_FORMS = ("icl_only", "vl")
"""Clusters that are no part of the mixture of text tasks, unless they are named."""


@dataclass(frozen=True)
class TaskExamples:
    """The examples of one task, for `prepare_examples`: made where they are written."""

    number: int
    """Of the task, in the mixture."""
    task: TaskFile
    data: Path
    split: str
    wordings: Wordings
    most: int | None
    seed: int

    @property
    def unit(self) -> str:
        """Name of its shards."""
        return f"{self.number:04d}-00000"

    @property
    def source(self) -> str:
        """What its examples are counted under."""
        return self.task.task

    def examples(self) -> Iterator[TaskExample]:
        """Each example or the cause of its absence, with its record.

        Raises:
            ConfigError, DataError: the task's data cannot be used.
        """
        task, tally = self.task, Tally()
        records = TaskData(task, self.data, seed=self.seed).records(self.split, tally, most=self.most)
        for cause, places in tally.dropped.items():
            yield from (TaskExample(0.0, cause, {"task": task.task, "place": place}) for place in places)
        for number, record in enumerate(records):
            share = number / len(records)
            where: Place = {"task": task.task, "record": record.key}
            for template in self._templates(record.key):
                answers = record.answers if task.train_on == "each" else record.answers[:1]
                for answer in answers:
                    try:
                        yield TaskExample(share, render(task, template, record, answer), where)
                    except UnusableRecord as unusable:
                        yield TaskExample(share, unusable.cause, where)

    def _templates(self, key: str) -> Sequence[Template]:
        fitting = self.task.templates_for(_use(self.wordings))
        if self.wordings == "drawn":
            return [random.Random(f"{self.seed} {self.task.task} {key}").choice(fitting)]
        return fitting[:1] if self.wordings == "first" else fitting


def lacking(task: TaskFile, split: str, wordings: Wordings) -> str | None:
    """What a task lacks to be trained on so, in words; None: nothing."""
    if split not in task.data.splits:
        return f"no split {split} (it has {', '.join(task.data.splits)})"
    use = _use(wordings)
    return None if task.templates_for(use) else f"no wording for {use}"


def choose_tasks(
    tasks: Sequence[TaskFile], clusters: Sequence[str] = (), hold_out: Sequence[str] = ()
) -> list[TaskFile]:
    """The tasks of some clusters, without those that are held out and what is too close to them.

    Args:
        clusters: those wanted; none: all but those of other forms than text (`OTHER_FORMS`).
        hold_out: clusters that are left out, with all that their tasks name in `held_out_with`.

    Raises:
        ConfigError: there is no such cluster, or no task is left.
    """
    known = {task.cluster for task in tasks}
    if unknown := sorted((set(clusters) | set(hold_out)) - known):
        raise ConfigError(f"there is no cluster {unknown[0]}; there are {', '.join(sorted(known))}")
    out = set(hold_out)
    out |= {name for task in tasks if task.cluster in hold_out for name in task.held_out_with}
    wanted = set(clusters) or known - set(OTHER_FORMS)
    chosen = [task for task in tasks if task.cluster in wanted - out]
    if not chosen:
        raise ConfigError("no task is left: all clusters are held out")
    return chosen


def _use(wordings: Wordings) -> str:
    """What the templates are for that examples are worded in."""
    return "finetuning" if wordings == "first" else "instruction_tuning"
