"""What records hold that is no text, is not there, or is there twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from metalm.errors import ConfigError, DataError
from metalm.tasks.questions import Asked, Asker
from metalm.tasks.records import Tally, TaskData
from metalm.tasks.showing import check_task
from metalm.tasks.task_file import load_task, load_tasks

TASK: dict[str, Any] = {
    "task": "pets",
    "cluster": "misc",
    "data": {
        "folder": "pets",
        "reader": "jsonl",
        "files": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "fields": {"question": "question", "right": "right"},
    },
    "answer": "right",
    "templates": [{"id": "asked", "plain": ["{question}"], "target": " {answer}"}],
    "metrics": ["exact_match"],
}


def written(folder: Path, records: Sequence[Any], **changes: Any) -> TaskData:
    """The task with the same records in both splits."""
    (folder / "pets").mkdir(exist_ok=True)
    for split in ("train", "validation"):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "pets" / f"{split}.jsonl").write_text(text)
    (folder / "pets.yaml").write_text(yaml.safe_dump(TASK | changes))
    return TaskData(load_task(folder / "pets.yaml"), folder)


def kept(data: TaskData) -> tuple[list[str], dict[str, list[str]]]:
    """The answers that are kept, and what is left out."""
    tally = Tally()
    return [record.answers[0] for record in data.records("validation", tally)], tally.dropped


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    answers = ["cat", {"text": ["cat"]}, float("nan"), ["a", {"b": 1}], 3, True]
    data = written(tmp_path, [{"question": "who?", "right": one} for one in answers])
    found, dropped = kept(data)
    assert found == ["cat", "3", "true"]
    assert dropped == {
        "unusable_value": [
            "validation:1: {'text': ['cat']} is no text",
            "validation:2: nan is no text",
            "validation:3: {'b': 1} is no text",
        ]
    }


def test_a_null_is_a_value_that_is_missing(tmp_path: Path) -> None:
    records = [{"question": "who?", "right": "cat"}, {"question": None, "right": "cat"}]
    assert kept(written(tmp_path, records)) == (["cat"], {"no_question": ["validation:1"]})
    fields = {"question": "question?", "right": "right"}
    assert kept(written(tmp_path, records, data=TASK["data"] | {"fields": fields}))[0] == ["cat", "cat"]


def test_options_and_keys_of_another_number_are_said(tmp_path: Path) -> None:
    records = [
        {"question": "who?", "right": "A", "texts": ["cat", "dog"]},
        {"question": "who?", "right": "A", "texts": ["cat", "dog", "hen"]},
    ]
    data = TASK["data"] | {"fields": {**TASK["data"]["fields"], "texts": "texts"}}
    _, dropped = kept(written(tmp_path, records, data=data, options={"texts": "texts", "keys": ["A", "B"]}))
    assert dropped == {"unusable_value": ["validation:1: 3 options, and 2 keys for them"]}


def test_a_field_that_no_record_has_is_named_though_the_first_is_damaged(tmp_path: Path) -> None:
    data = written(tmp_path, [["no", "object"], {"query": "who?", "right": "cat"}])
    with pytest.raises(ConfigError, match=r"the data have no 'question' .* they have query, right"):
        data.records("train")


def test_splits_that_are_held_out_of_one_share_no_record(tmp_path: Path) -> None:
    held_out = {"validation": {"of": "train", "drawn": 20}, "test": {"of": "train", "last": 20}}
    section = TASK["data"] | {"files": {"train": "train.jsonl"}, "hold_out": held_out}
    records = [{"question": f"who is {n}?", "right": "cat"} for n in range(60)]
    data = written(tmp_path, records, data=section)
    sides = [{record.key for record in data.records(split)} for split in ("train", "validation", "test")]
    assert [len(side) for side in sides] == [20, 20, 20]
    assert len(set.union(*sides)) == 60


def test_no_demonstration_is_the_question_itself(tmp_path: Path) -> None:
    records = [{"question": f"who is {n % 4}?", "right": "cat"} for n in range(8)]  # each of them twice
    icl = {"plain": ["{question}"], "target": " {answer}", "score": "generation"}
    data = written(tmp_path, records, icl=icl)
    asked = Asked(data.task.icl.template, 3, "train")  # type: ignore[union-attr]
    asker = Asker(data, "validation", asked, seed=0, tally=Tally())
    for record in asker.records:
        shown = [part.content for part in asker.question(record).prompt.parts]
        assert sum(str(record.fields["question"]) in str(content) for content in shown) == 1


def test_columns_of_one_name_and_files_in_another_encoding_are_refused(tmp_path: Path) -> None:
    section = TASK["data"] | {"reader": "csv", "files": {"validation": "v.csv"}}
    data = written(tmp_path, [], data=section)
    (tmp_path / "pets/v.csv").write_text("question,right,right\nwho?,cat,dog\n")
    with pytest.raises(DataError, match="columns of different names, not question, right, right"):
        data.records("validation")
    (tmp_path / "pets/v.csv").write_bytes("question,right\nwho?,ä\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"v\.csv is not in utf-8-sig .*`settings: \{encoding: latin-1\}`"):
        data.records("validation")


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    written(tmp_path, [])
    (tmp_path / "other.yaml").write_text((tmp_path / "pets.yaml").read_text())
    with pytest.raises(ConfigError, match=r"other\.yaml: another of these tasks is called pets"):
        load_tasks([tmp_path / "pets.yaml", tmp_path / "other.yaml"])


def test_a_task_of_which_nothing_can_be_worded_is_no_good_one(tmp_path: Path) -> None:
    template = {"id": "asked", "plain": ["{question|last}"], "target": " {answer}"}
    written(tmp_path, [{"question": "who?", "right": "cat"}], templates=[template], maps={"last": {"x": "y"}})
    with pytest.raises(DataError, match="pets: no record of train can be worded"):
        list(check_task(str(tmp_path / "pets.yaml"), tmp_path))
