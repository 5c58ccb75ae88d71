"""The file of answers: what was written before a kill is kept, and what is no such file is refused."""

from __future__ import annotations

import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from metalm.errors import BusyError, ConfigError, DataError
from metalm.evaluation.answers_file import AnswersFile
from metalm.evaluation.task_scores import _of_all
from metalm.tasks.rendering import UnusableRecord

ABOUT = {"model": "one"}


def answers_in(path: Path) -> dict[str, Any]:
    with closing(AnswersFile(path, ABOUT)) as file:
        return file.open()


@pytest.mark.parametrize("torn", [b"", b'{"mod', b'{"model": "one"}\n["b", {"pre'])
def test_a_torn_last_line_is_written_anew(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(torn)
    with closing(AnswersFile(path, ABOUT)) as file:
        assert file.open() == {}
        file.append({"a": {"prediction": "x"}})
        file.append({"b": {"prediction": "y"}})
    assert answers_in(path) == {"a": {"prediction": "x"}, "b": {"prediction": "y"}}


@pytest.mark.parametrize("content", [b'{"model": "other"}\n', b"\xff\n", b'{"model": "one"}\n3\n', b"junk\n"])
def test_what_holds_other_answers_or_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="name another folder with --out"):
        answers_in(path)
    assert path.read_bytes() == content


def test_one_process_has_the_file_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(AnswersFile(path, ABOUT)) as file:
        file.open()
        file.append({"a": {"prediction": "x"}})
        with pytest.raises(
            BusyError, match="another evaluation is writing .*answers.jsonl: wait for its end"
        ):
            answers_in(path)
        file.append({"b": {"prediction": "y"}})
    assert list(answers_in(path)) == ["a", "b"]


def test_what_could_not_be_asked_is_no_answer(tmp_path: Path) -> None:
    with closing(AnswersFile(tmp_path / "answers.jsonl", ABOUT)) as file:
        file.open()
        file.append({"a": {"skipped": "missing_media"}, "b": {"prediction": "y"}})
    assert list(answers_in(tmp_path / "answers.jsonl")) == ["b"]


def test_what_one_share_cannot_go_on_from_none_does() -> None:
    class Second:
        """The second of two shares, beside one that fails."""

        def gathered(self, value: Any) -> list[Any]:
            return [DataError("the first share found it"), value]

    with pytest.raises(DataError, match="the first share found it"):
        _of_all(Second(), lambda: {"a": {"prediction": "x"}})

    class Alone:
        def gathered(self, value: Any) -> list[Any]:
            return [pickle.loads(pickle.dumps(value))]

    def fails() -> dict[str, Any]:
        raise UnusableRecord("missing_media", "no such clip")

    with pytest.raises(DataError, match="no such clip"):
        _of_all(Alone(), fails)
