"""The scores of a model on tasks: by the likelihood of options, or by what it generates.

Answers are written as they come, so that an evaluation that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from metalm.data.documents.example import Example
from metalm.data.documents.examples import ExampleMaker
from metalm.document import Document
from metalm.errors import BadSample, DataError, MetaLMError
from metalm.evaluation.answering import Answerer
from metalm.evaluation.answers_file import ELSEWHERE, AnswersFile
from metalm.evaluation.likelihoods import Likelihood
from metalm.evaluation.task_results import TaskResult, rows_of, table
from metalm.file_lock import taking_turns
from metalm.outputs import require_folder_place, writing
from metalm.progress import Phase
from metalm.regular_files import read_regular, replace_file
from metalm.tasks.metrics import Answered, measure
from metalm.tasks.questions import Asked, Asker, Question, drawn
from metalm.tasks.records import Tally, TaskData, TaskRecord
from metalm.tasks.rendering import PARAGRAPH, UnusableRecord
from metalm.tasks.task_file import IN_CONTEXT, TaskFile
from metalm.tasks.ways import TaskSettings, Way

RESULTS_NAME = "results.json"
LOCK_NAME = ".results.lock"
QUESTIONS_AT_ONCE = 64
_NOT_ASKED = {"version", "cluster", "held_out_with", "metrics", "drawn_together", "evaluated_on"}
"""Keys of a task that no answer depends on."""
Value = TypeVar("Value")


class Evaluated(NamedTuple):
    """What is asked."""

    name: str
    """For people, such as a checkpoint's folder."""
    fingerprint: str
    """Tells it from what was in the same place at other times."""


def evaluate_tasks(
    answerer: Answerer,
    tasks: Sequence[TaskFile],
    settings: TaskSettings,
    model: Evaluated,
    out: Path,
    report: Callable[[str], None],
    beat: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Ask all of the tasks in all ways; write `answers/*.jsonl`, `results.json` and `results.md` to a folder.

    Results of the same model that are in the folder stay, but those which are asked for again.

    Args:
        model: what is evaluated: answers of another are refused.
        report: is told of progress, by the first process.
        beat: is called after every group of questions, in all.

    Raises:
        ConfigError: a task cannot be asked so, or the folder holds answers of something else, or cannot be
            written.
        BusyError: another evaluation is asking the same.
        DataError: a task's data cannot be used, or an answer's likelihood is nan.
    """
    for task in tasks:
        settings.check(task)
    evaluation = _Evaluation(answerer, settings, model, out, report, beat)
    results = []
    asked = [(task, way) for task in tasks for way in settings.ways(task)]
    for task, way in asked:
        result = evaluation.ask(task, way)
        results.append(result)
        if answerer.is_first:
            report(next(iter(rows_of([result]))))
        _by_first(answerer, partial(_add_result, out, result, model))
    return results


def _read_results(path: Path, model: Evaluated) -> list[TaskResult]:
    """What an earlier evaluation of the same model has written, in its order; of another, nothing counts."""
    try:
        entries = json.loads(read_regular(path))
        return [TaskResult.from_json(entry) for entry in entries if _of_model(entry) == model]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []  # none, or a damaged one: the answers are what counts, and give it again


def _of_model(entry: Mapping[str, Any]) -> Evaluated:
    return Evaluated(entry.get("model", ""), entry.get("weights", ""))


def _add_result(out: Path, result: TaskResult, model: Evaluated) -> None:
    """Write a result to those that are there, which another evaluation may have written just now."""
    about = {"model": model.name, "weights": model.fingerprint}
    with writing(out, ELSEWHERE), taking_turns(out / LOCK_NAME):
        others = [one for one in _read_results(out / RESULTS_NAME, model) if one.way != result.way]
        results = [*others, result]
        entries = [about | one.as_json() for one in results]
        replace_file(out / RESULTS_NAME, json.dumps(entries, indent=1) + "\n")
        replace_file(out / "results.md", table(results, model.name))


def require_out(answerer: Answerer, out: Path) -> None:
    """Whether answers and results can be written to a folder, before any task is asked.

    Raises:
        ConfigError: they cannot.

    Collective: all processes that answer.
    """
    _by_first(answerer, partial(require_folder_place, out, ELSEWHERE))


def _by_first(answerer: Answerer, do: Callable[[], Value]) -> Value:
    """What the first process makes, in all; what it cannot go on from, none does."""
    made: Value | MetaLMError | None = None
    if answerer.is_first:
        try:
            made = do()
        except MetaLMError as error:
            made = error
    made = answerer.agreed(made)
    if isinstance(made, MetaLMError):
        raise made
    return cast(Value, made)


def _alike(answerer: Answerer, make: Callable[[], Value], mark: Callable[[Value], object]) -> Value:
    """What every process makes for itself of files that all read; what one cannot go on from, none does.

    Args:
        mark: what of it must be the same in all processes for them to go on together, as JSON.

    Raises:
        MetaLMError: of the first process that has one.
        DataError: the processes have read different things.

    Collective: all processes that answer.
    """
    made: Value | None = None
    own: str | MetaLMError
    try:
        made = make()
        own = hashlib.sha256(json.dumps(mark(made)).encode()).hexdigest()
    except MetaLMError as error:
        own = error
    marks = answerer.from_each(own)
    for number, one in enumerate(marks):
        if isinstance(one, MetaLMError):
            raise one
        if one != marks[0]:
            raise DataError(
                f"process {number} reads other data of the tasks than the first one: see that all nodes have "
                "the same files"
            )
    return cast(Value, made)


class _Read(NamedTuple):
    """What is read of a task before it is asked."""

    asker: Asker
    records: list[TaskRecord]
    digests: dict[str, dict[str, str]]
    """Of the files, by split and pattern."""
    maker: ExampleMaker


@dataclass(frozen=True)
class _Evaluation:
    """A model that is asked into one folder."""

    answerer: Answerer
    settings: TaskSettings
    model: Evaluated
    out: Path
    report: Callable[[str], None]
    beat: Callable[[], None]

    def ask(self, task: TaskFile, way: Way) -> TaskResult:
        """The scores of a task in one way; what its file of answers has is not asked again."""
        split, tally = self.settings.split or task.evaluated_on, Tally()
        with Phase(f"reading {task.task}"):
            asker, records, digests, maker = _alike(
                self.answerer,
                partial(self._read, task, way, split, tally),
                lambda read: [[record.key for record in read.records], read.digests],
            )
        name = f"{task.task}-{split}-{way.template.id}-{way.num_shots}shot-{way.scored_by}"
        about = _fingerprint(task, way, self.settings, split, self.model)
        about["data"] = digests

        def ask(group: Sequence[TaskRecord]) -> dict[str, dict[str, Any]]:
            make = partial(_documents, asker, group, maker, way, task)
            if self.answerer.num_shares == 1:  # all processes answer these together
                skipped, made = _alike(self.answerer, make, _asked)
            else:
                skipped, made = make()
            return skipped | _answer(self.answerer, made, way, task, maker.read)

        with closing(AnswersFile(self.out / "answers" / f"{name}.jsonl", about)) as file:
            answers = self._answers(name, records, ask, file)
        return _scored(task, way, split, [(record, answers[record.key]) for record in records], tally)

    def _read(self, task: TaskFile, way: Way, split: str, tally: Tally) -> _Read:
        needs_alone = way.scored_by == "likelihood" and way.normalise == "answer_context"
        asked = Asked(way.template, way.num_shots, task.icl.shots_from if task.icl else None, needs_alone)
        data = TaskData(task, self.settings.data)
        asker = Asker(data, split, asked, seed=self.settings.seed, tally=tally)
        splits = {split, asked.shots_from or split} if way.num_shots else {split}
        return _Read(
            asker,
            drawn(asker.records, self.settings.limit, self.settings.seed),
            {one: data.digests(one) for one in sorted(splits)},
            self.answerer.maker(self.settings.readers, self.settings.overflow),
        )

    def _answers(
        self,
        name: str,
        records: Sequence[TaskRecord],
        ask: Callable[[Sequence[TaskRecord]], dict[str, dict[str, Any]]],
        file: AnswersFile,
    ) -> dict[str, dict[str, Any]]:
        """By key, the answers of a file, and those of the records that it lacks, which are written to it."""
        answerer = self.answerer
        answers = _by_first(answerer, file.open)
        # A group is asked as a whole wherever it is: an answer depends a little on what is in its batch.
        groups = [records[at : at + QUESTIONS_AT_ONCE] for at in range(0, len(records), QUESTIONS_AT_ONCE)]
        waiting = [[record for record in group if record.key not in answers] for group in groups]
        waiting = [group for group in waiting if group]
        with Phase(name, sum(map(len, waiting)), "questions") as phase:
            for first in range(0, len(waiting), answerer.num_shares):
                own = first + answerer.share
                for new in _of_all(answerer, partial(ask, waiting[own] if own < len(waiting) else [])):
                    answers |= new
                    phase.advance(len(new))
                    _by_first(answerer, partial(file.append, new))
                self.beat()
                if answerer.is_first and len(waiting) > 1:
                    self.report(f"{name}: {len(answers):,} of {len(records):,} questions")
        return answers


def _of_all(answerer: Answerer, ask: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of all shares; what one cannot go on from, none does."""
    new: dict[str, Any] | MetaLMError
    try:
        new = ask()
    except MetaLMError as error:
        new = error
    found: list[dict[str, Any]] = []
    for one in answerer.gathered(new):
        if isinstance(one, MetaLMError):
            raise one
        found.append(one)
    return found


@dataclass(frozen=True)
class _Made:
    """The documents of a question."""

    question: Question
    documents: tuple[Document, ...]
    cause: str | None = None
    """Why there are none."""

    @classmethod
    def of(cls, question: Question, make: Callable[..., Any], way: Way, task: TaskFile) -> _Made:
        make = partial(make, is_open=True)
        if way.scored_by == "generation":
            examples: Sequence[Example] = [question.prompt]
            make = partial(make, left_free=task.decode.max_new_tokens)
        else:
            examples = [*question.options, *question.alone]
        try:
            return cls(question, tuple(make(example).document for example in examples))
        except BadSample as failure:
            return cls(question, (), failure.cause)


def _documents(
    asker: Asker, group: Sequence[TaskRecord], maker: ExampleMaker, way: Way, task: TaskFile
) -> tuple[dict[str, dict[str, Any]], list[_Made]]:
    """The documents of records, and what stands in the file of answers for those that cannot be asked."""
    skipped: dict[str, dict[str, Any]] = {}
    made = []
    for record in group:
        try:
            question = asker.question(record)
        except UnusableRecord as unusable:
            skipped[record.key] = {"skipped": unusable.cause, "why": str(unusable)}
        else:
            made.append(_Made.of(question, maker.make, way, task))
    return skipped, made


def _asked(found: tuple[Mapping[str, Any], Sequence[_Made]]) -> object:
    """By question, how many documents are answered."""
    return [[one.question.key, len(one.documents)] for one in found[1]]


def _answer(
    answerer: Answerer, made: Sequence[_Made], way: Way, task: TaskFile, read: Any
) -> dict[str, dict[str, Any]]:
    """What stands in the file of answers, by the question's key."""
    documents = [document for one in made for document in one.documents]
    found: Iterator[Any]
    if way.scored_by == "generation":
        found = iter(answerer.continuations(documents, read, task.decode))
    else:
        found = iter(answerer.likelihoods(documents, read))
    answers: dict[str, dict[str, Any]] = {}
    for one in made:
        said = [next(found) for _ in one.documents]
        question = one.question
        answer: dict[str, Any] = {"references": list(question.references)}
        if one.cause is not None or None in said:
            answer = {"skipped": one.cause or "undecodable"}
        elif way.scored_by == "generation":
            answer["prediction"] = _before_what_follows(task.decode.answer(said[0]), way)
        else:
            scores = _normalised(said, question, way.normalise)
            if any(map(math.isnan, scores)):
                raise DataError(
                    f"{task.task}: the likelihood of an answer to {question.key} is nan: look for nan in the "
                    "model's weights, or take another precision"
                )
            best = max(range(len(scores)), key=lambda number: scores[number])
            answer["prediction"] = question.option_texts[best]
            answer["scores"] = scores
        answers[question.key] = answer
    return answers


def _before_what_follows(answer: str, way: Way) -> str:
    """In context an answer ends where the next demonstration would begin."""
    return answer.partition(PARAGRAPH)[0].strip() if way.template.id == IN_CONTEXT else answer


def _normalised(said: Sequence[Likelihood], question: Question, how: str) -> list[float]:
    """Of each option, its log-likelihood as options are compared (PAPER section 7; see `InContext`)."""
    of_options = said[: len(question.options)]
    if how == "token":
        return [one.total / max(one.num_tokens, 1) for one in of_options]
    if how == "byte":
        texts = question.option_texts
        return [one.total / max(len(text.encode()), 1) for one, text in zip(of_options, texts, strict=True)]
    if how == "answer_context":
        alone = said[len(question.options) :]
        return [one.total - other.total for one, other in zip(of_options, alone, strict=True)]
    return [one.total for one in of_options]


def _scored(
    task: TaskFile,
    way: Way,
    split: str,
    answers: Iterable[tuple[TaskRecord, Mapping[str, Any]]],
    tally: Tally,
) -> TaskResult:
    skipped = Counter({cause: len(places) for cause, places in tally.dropped.items()})
    answered = []
    for record, answer in answers:
        if "skipped" in answer:
            skipped[answer["skipped"]] += 1
        else:
            answered.append(
                Answered(answer["prediction"], tuple(answer["references"]), record.drawn_together)
            )
    if not answered:
        raise DataError(f"{task.task}: no question of {split} could be asked: {dict(skipped)}")
    return TaskResult(
        task=task.task,
        cluster=task.cluster,
        split=split,
        template=way.template.id,
        shots=way.num_shots,
        scored_by=way.scored_by,
        scores={name: measure(name, answered) for name in task.metrics},
        questions=len(answered),
        skipped=dict(sorted(skipped.items())),
    )


def _fingerprint(
    task: TaskFile, way: Way, settings: TaskSettings, split: str, model: Evaluated
) -> dict[str, Any]:
    """What answers depend on, but the data."""
    content = task.model_dump_json(exclude=_NOT_ASKED) + way.template.model_dump_json()
    return {
        "model": model.name,
        "weights": model.fingerprint,
        "task": hashlib.sha256(content.encode()).hexdigest(),
        "split": split,
        "shots": way.num_shots,
        "scored_by": way.scored_by,
        "seed": settings.seed,
        "readers": dict(settings.readers) if settings.readers is not None else None,
        "overflow": settings.overflow,
    }
