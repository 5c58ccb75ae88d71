"""Records to questions: what a model is asked, behind demonstrations or none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from metalm.data.documents.example import Example
from metalm.errors import ConfigError
from metalm.tasks.records import Tally, TaskData, TaskRecord
from metalm.tasks.rendering import answer_alone, behind_demonstrations, render
from metalm.tasks.task_file import TaskFile, Template


@dataclass(frozen=True)
class Question:
    """One example of evaluation."""

    key: str
    """The record's."""
    prompt: Example
    """To be continued."""
    options: tuple[Example, ...]
    """Answered by each option; none where the answer is free."""
    alone: tuple[Example, ...]
    """Each option without the question, if that is wanted."""
    option_texts: tuple[str, ...]
    references: tuple[str, ...]
    """Answers that count as right."""


@dataclass(frozen=True)
class Asked:
    """How a task is asked."""

    template: Template
    num_shots: int = 0
    shots_from: str | None = None
    with_alone: bool = False
    """Also each option without the question."""


class Asker:
    """Makes the questions of a split, each with demonstrations drawn for it alone.

    The draw depends on the seed and the record, and not on which others are asked.
    """

    def __init__(self, data: TaskData, split: str, asked: Asked, *, seed: int, tally: Tally) -> None:
        """
        Raises:
            ConfigError: there are fewer demonstrations than are wanted.
            DataError: the data cannot be used.
        """
        self._task, self._asked, self._seed = data.task, asked, seed
        self.records = _grouped(data.task, data.records(split, tally))
        self._pool: list[TaskRecord] = []
        if asked.num_shots:
            pool_split = asked.shots_from or "train"
            self._pool = data.records(pool_split)
            available = len(self._pool) - (pool_split == split)
            if available < asked.num_shots:
                raise ConfigError(
                    f"{data.task.task}: {asked.num_shots} demonstrations are wanted, but {pool_split} has "
                    f"{available}"
                )

    def question(self, record: TaskRecord) -> Question:
        """The question that a record makes.

        Raises:
            UnusableRecord: it cannot be worded.
        """
        task, template = self._task, self._asked.template
        demonstrations = [render(task, template, one, one.answers[0]) for one in self._demonstrations(record)]
        answered = [
            behind_demonstrations(demonstrations, render(task, template, record, text))
            for text in record.options or record.answers[:1]
        ]
        alone = record.options if self._asked.with_alone else ()
        return Question(
            key=record.key,
            prompt=answered[0].prompt(),
            options=tuple(answered) if record.options else (),
            alone=tuple(answer_alone(task, template, record, text) for text in alone),
            option_texts=record.options,
            references=record.references,
        )

    def _demonstrations(self, record: TaskRecord) -> Sequence[TaskRecord]:
        draw = random.Random(f"{self._seed} {self._task.task} {record.key}")
        drawn = draw.sample(self._pool, min(self._asked.num_shots + 1, len(self._pool)))
        # Another split, or another record of this one, may hold the same.
        others = [one for one in drawn if one.fields != record.fields]
        if len(others) < self._asked.num_shots:
            drawn = draw.sample(self._pool, len(self._pool))
            others = [one for one in drawn if one.fields != record.fields]
        return others[: self._asked.num_shots]


def drawn(records: Sequence[TaskRecord], count: int | None, seed: int) -> list[TaskRecord]:
    """All records, or `count` of them in their order, the same ones each time."""
    if count is None or count >= len(records):
        return list(records)
    kept = random.Random(seed).sample(range(len(records)), count)
    return [records[number] for number in sorted(kept)]


def _grouped(task: TaskFile, records: Sequence[TaskRecord]) -> list[TaskRecord]:
    """Records of one group become the first of them, with the references of all."""
    if task.group is None:
        return list(records)
    groups: dict[str, list[TaskRecord]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return [
        replace(one[0], references=tuple(dict.fromkeys(text for record in one for text in record.references)))
        for one in groups.values()
    ]
