"""The file of answers: what was written before a kill is kept, and what is no such file is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from metalm.errors import ConfigError, DataError
from metalm.evaluation.task_scores import _append, _of_all, _read_answers
from metalm.tasks.rendering import UnusableRecord

ABOUT = {"model": "one"}


@pytest.mark.parametrize("torn", [b"", b'{"mod', b'{"model": "one"}\n["b", {"pre'])
def test_a_torn_last_line_is_written_anew(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(torn)
    assert _read_answers(path, ABOUT) == {}
    _append(path, ABOUT, {"a": {"prediction": "x"}})
    _append(path, ABOUT, {"b": {"prediction": "y"}})
    assert _read_answers(path, ABOUT) == {"a": {"prediction": "x"}, "b": {"prediction": "y"}}


@pytest.mark.parametrize("content", [b'{"model": "other"}\n', b"\xff\n", b'{"model": "one"}\n3\n', b"junk\n"])
def test_what_holds_other_answers_or_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="choose another --out"):
        _read_answers(path, ABOUT)


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
