"""What a model is asked: demonstrations, prompts and options, as they are laid out in tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metalm.config.model_schema import EncoderConfig
from metalm.data.documents.examples import ExampleMaker
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError
from metalm.tasks.questions import Asked, Asker, Question, drawn
from metalm.tasks.records import Tally, TaskData
from metalm.tasks.rendering import render
from metalm.tasks.task_file import TaskFile, load_task

DATA = Path(__file__).parent / "data"


def asker(task: TaskFile, shots: int, *, split: str = "validation", source: str = "train") -> Asker:
    assert task.icl is not None
    asked = Asked(task.icl.template, shots, source)
    return Asker(TaskData(task, DATA), split, asked, seed=0, tally=Tally())


def questions(asking: Asker) -> list[Question]:
    return [asking.question(record) for record in asking.records]


@pytest.fixture
def maker(tokenizer: Tokenizer, encoders: dict[str, EncoderConfig]) -> ExampleMaker:
    return ExampleMaker(
        tokenizer,
        {},  # the decoder reads all, so that tokens tell all
        media_readers={},
        encoders=encoders,
        retokenizer=lambda name: None,
        sequence_length=4096,
        overflow="split",
    )


def tokens(maker: ExampleMaker, example: object, *, is_open: bool = False) -> list[int]:
    document = maker.make(example, is_open=is_open).document  # type: ignore[arg-type]
    return np.concatenate([part.tokens for part in document.parts]).tolist()


def test_a_prompt_of_k_shots_is_what_training_rows_hold_with_ends_of_paragraphs_between(
    maker: ExampleMaker, tokenizer: Tokenizer
) -> None:
    task = load_task("qnli")
    assert task.icl is not None
    asking = asker(task, 2)
    (record, *_), (question, *_) = asking.records, questions(asking)
    pool = {one.key: one for one in TaskData(task, DATA).records("train")}
    template = task.icl.template
    trained = {key: tokens(maker, render(task, template, one, one.answers[0])) for key, one in pool.items()}
    own = tokens(maker, render(task, template, record, record.answers[0]).prompt())
    found = tokens(maker, question.prompt, is_open=True)
    possible = [
        [*trained[a], tokenizer.paragraph_id, *trained[b], tokenizer.paragraph_id, *own]
        for a in trained
        for b in trained
        if a != b
    ]
    assert found in possible


def test_every_option_is_the_prompt_with_that_option_behind_it(maker: ExampleMaker) -> None:
    task = load_task("qnli")
    for question in questions(asker(task, 1)):
        prompt = tokens(maker, question.prompt, is_open=True)
        for option, text in zip(question.options, question.option_texts, strict=True):
            whole = tokens(maker, option, is_open=True)
            assert whole[: len(prompt)] == prompt
            (learnt,) = [part for part in option.parts if part.is_trained]
            assert learnt.content == f" {text}"
        right = [text for text in question.option_texts if text in question.references]
        assert right == list(question.references)


def test_demonstrations_depend_on_the_record_and_not_on_what_else_is_asked() -> None:
    task = load_task("qnli")
    alone, together = asker(task, 2), asker(task, 2)
    assert questions(together)[-1] == alone.question(alone.records[-1])
    assert len({question.prompt for question in questions(together)}) == len(together.records)


def test_a_record_is_no_demonstration_of_itself() -> None:
    task = load_task("winograd")
    asking = asker(task, 2, split="test", source="test")
    for record, question in zip(asking.records, questions(asking), strict=True):
        assert task.icl is not None
        own = [render(task, task.icl.template, record, text).parts[-1].content for text in record.options]
        shown = [part.content for part in question.prompt.parts]
        assert not set(own) & set(shown)


def test_too_few_demonstrations_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 demonstrations are wanted, but train has"):
        asker(load_task("qnli"), 7)


def test_records_of_one_group_are_one_question_with_all_of_their_answers() -> None:
    task = load_task("e2e_nlg")
    data = TaskData(task, DATA)
    asking = Asker(data, "validation", Asked(task.templates[0]), seed=0, tally=Tally())
    records = data.records("validation")
    assert len(asking.records) < len(records)
    for record in asking.records:
        of_group = [one.answers[0] for one in records if one.group == record.group]
        assert list(record.references) == list(dict.fromkeys(of_group))


def test_a_limit_draws_the_same_records_each_time() -> None:
    records = TaskData(load_task("qnli"), DATA).records("validation")
    assert drawn(records, 2, 3) == drawn(records, 2, 3)
    assert len(drawn(records, 2, 3)) == 2
    assert drawn(records, 99, 3) == records
