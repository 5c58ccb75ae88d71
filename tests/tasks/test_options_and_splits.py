"""Options and held-out splits of task files: what they are taken for, and what is said of mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from metalm.errors import EXIT_USAGE, ConfigError, DataError
from metalm.tasks.records import Tally, TaskData
from metalm.tasks.task_file import OwnOptions, find_tasks, load_task
from metalm.tasks.ways import TaskSettings
from tiny_pipeline import REPOSITORY

TASK: dict[str, Any] = {
    "task": "sums",
    "cluster": "misc",
    "data": {
        "folder": "sums",
        "reader": "csv",
        "files": {"train": "train.csv", "validation": "validation.csv"},
        "fields": {"sum": "sum", "right": "right", "wrong": "wrong", "best": "best"},
    },
    "answer": "best",
    "templates": [{"id": "plain", "span": ["{sum}"], "target": " {answer}"}],
    "metrics": ["exact_match"],
}


def written(folder: Path, **changes: Any) -> Path:
    """A task file with some keys changed; those of `data` one by one."""
    content = {**TASK, **changes, "data": {**TASK["data"], **changes.get("data", {})}}
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def data_of(folder: Path, count: int) -> Path:
    (folder / "sums").mkdir()
    rows = "".join(f"{n} + 1,{n + 1},{n},{n + 1}\n" for n in range(count))
    (folder / "sums" / "train.csv").write_text(f"sum,right,wrong,best\n{rows}")
    return folder


def test_two_texts_of_options_are_fields_and_no_mapping(tmp_path: Path) -> None:
    options = {"texts": "right", "keys": "wrong"}
    assert load_task(written(tmp_path, options=options)).options == OwnOptions(texts="right", keys="wrong")


def test_one_field_of_options_is_enough(tmp_path: Path) -> None:
    assert load_task(written(tmp_path, options={"texts": "right"})).options == OwnOptions(texts="right")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "right", "key": "wrong"}, "key: unknown key; did you mean 'keys'?"),
        ({"a": "one", "b": True}, "True is no text; put keys and texts into quotes"),
        ({0: "one", 1: "two"}, "0 is no text; put keys and texts into quotes"),
    ],
)
def test_mistakes_in_options_are_named(options: dict[Any, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_task(written(tmp_path, options=options))
    assert message in str(error.value)


@pytest.mark.parametrize("amount", [{}, {"last": 2, "drawn": 2}])
def test_a_split_is_the_last_or_drawn(amount: dict[str, int], tmp_path: Path) -> None:
    hold_out = {"tuning": {"of": "train", **amount}}
    with pytest.raises(ConfigError, match="give last or drawn"):
        load_task(written(tmp_path, data={"hold_out": hold_out}))


@pytest.mark.parametrize("amount", ["last", "drawn"])
def test_splits_share_no_record_and_lose_none(amount: str, tmp_path: Path) -> None:
    path = written(tmp_path, data={"hold_out": {"tuning": {"of": "train", amount: 10}}})
    data = TaskData(load_task(path), data_of(tmp_path, 40))
    tuning = [record.fields["sum"] for record in data.records("tuning")]
    training = [record.fields["sum"] for record in data.records("train")]
    everything = [f"{n} + 1" for n in range(40)]
    assert len(tuning) == 10
    assert sorted(tuning + training) == sorted(everything)
    assert (tuning == everything[-10:]) == (amount == "last")


def test_the_seed_changes_what_is_taken_but_not_what_is_held_out(tmp_path: Path) -> None:
    path = written(
        tmp_path, data={"hold_out": {"tuning": {"of": "train", "drawn": 10}}, "take": {"train": 8}}
    )
    data_of(tmp_path, 40)
    splits = [
        [
            [record.key for record in TaskData(load_task(path), tmp_path, seed=seed).records(split)]
            for seed in (0, 1)
        ]
        for split in ("tuning", "train")
    ]
    assert splits[0][0] == splits[0][1]
    assert splits[1][0] != splits[1][1]


def test_a_split_of_which_nothing_is_left_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, data={"hold_out": {"tuning": {"of": "train", "last": 200}}})
    with pytest.raises(DataError, match="(?s)no record of train can be used.*40 held out for other splits"):
        TaskData(load_task(path), data_of(tmp_path, 40)).records("train")


def test_an_empty_option_leaves_the_others_their_keys(tmp_path: Path) -> None:
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "train.csv").write_text(
        "sum,right,wrong,third,best\n0 + 1,,0,1,2\n1 + 1,2,,1,0\n2 + 1,3,,,0\n3 + 1,,3,5,0\n"
    )
    fields = {**TASK["data"]["fields"], "third": "third"}
    path = written(
        tmp_path, options={"texts": ["right", "wrong", "third"]}, data={"fields": fields}, answer="best"
    )
    tally = Tally()
    records = list(TaskData(load_task(path), tmp_path).records("train", tally))
    assert [(record.options, record.answers) for record in records] == [
        (("0", "1"), ("1",)),
        (("2", "1"), ("2",)),
    ]
    assert {cause: len(places) for cause, places in tally.dropped.items()} == {
        "fewer_than_two_options": 1,
        "unknown_best": 1,
    }


def test_other_data_are_not_taken_for_those_that_were_prepared(tmp_path: Path) -> None:
    task = written(tmp_path, data={"files": {"train": "train.csv"}}, evaluated_on="train")
    folders = [tmp_path / name for name in ("one", "other")]
    for folder, count in zip(folders, (3, 4), strict=True):
        folder.mkdir()
        data_of(folder, count)
    command = [sys.executable, str(REPOSITORY / "tools/prepare_tasks.py"), "--tasks", str(task)]

    def prepare(data: Path) -> tuple[int, str]:
        words = [*command, "--data", str(data), "--out", str(tmp_path / "out"), "--processes", "1"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    assert prepare(folders[0])[0] == 0
    assert prepare(folders[0])[0] == 0
    code, output = prepare(folders[1])
    assert code == EXIT_USAGE, output
    assert "Traceback" not in output
    file = folders[0] / "sums/train.csv"
    file.write_text(file.read_text().replace("0 + 1,1,0,1", "0 + 1,1,0,0"))  # as long, another answer
    assert prepare(folders[0])[0] == EXIT_USAGE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "nocaps"), "nocaps has no split train (it has validation)"),
        (("--tasks", "boolq", "--split", "foo"), "boolq has no split foo (it has train, validation)"),
        (
            ("--tasks", "nocaps", "--split", "validation", "--wordings", "drawn"),
            "nocaps has no wording for instruction_tuning",
        ),
    ],
)
def test_tasks_that_are_named_and_lack_what_is_trained_on_are_refused(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    code, output = prepare_tasks(*words, "--out", str(tmp_path / "out"))
    assert (code, message in output, "Traceback" in output) == (EXIT_USAGE, True, False), output
    assert not (tmp_path / "out").exists()


def test_tasks_of_a_cluster_that_are_for_evaluation_alone_are_left_out(tmp_path: Path) -> None:
    code, output = prepare_tasks("--clusters", "vl", "--out", str(tmp_path / "out"))
    assert code == 0, output
    assert "left out: esnli_ve_explanations has no split train" in output
    assert "vqav2" in output


def prepare_tasks(*words: str) -> tuple[int, str]:
    command = [sys.executable, str(REPOSITORY / "tools/prepare_tasks.py"), *words]
    data = ["--data", str(REPOSITORY / "tests/tasks/data"), "--processes", "1"]
    done = subprocess.run([*command, *data], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("winogrande", {"shots": (0,), "scored_by": "generation"}, "for comparing options by likelihood"),
        ("copa", {"shots": (0,), "scored_by": "generation"}, "for comparing options by likelihood"),
        ("boolq", {"shots": (0,), "templates": 2}, "--shots asks in the in-context wording"),
        ("boolq", {"split": "test"}, "boolq has no split test; it has train, validation"),
    ],
)
def test_ways_in_which_a_task_cannot_be_asked_are_refused(
    task: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskSettings(data=Path("data"), **settings).check(load_task(task))


def test_all_tasks_can_be_asked_as_they_usually_are() -> None:
    for name in find_tasks():
        task = load_task(name)
        assert TaskSettings(data=Path("data")).ways(task)
        if task.icl is not None:
            assert TaskSettings(data=Path("data"), shots=(0, 4)).ways(task)
