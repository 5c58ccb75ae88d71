"""The file of answers: what was written before a kill is kept, and what is no such file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalm.errors import ConfigError
from metalm.evaluation.task_scores import _append, _read_answers

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
