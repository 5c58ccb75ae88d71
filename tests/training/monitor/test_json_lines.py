from __future__ import annotations

import json
from pathlib import Path

import pytest

from metalm.training.monitor.json_lines import (
    RESTARTS,
    append_metrics,
    count_starts,
    drop_superseded,
    read_metrics,
)


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for step in range(1, 6):
        append_metrics(tmp_path, step, {"loss": float(step)})
    with (tmp_path / "logs" / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "lo')  # the run was killed here
    drop_superseded(tmp_path, 4)
    append_metrics(tmp_path, 4, {"loss": 40.0})
    assert [(e["step"], e["loss"]) for e in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_figures_that_cannot_be_replaced_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    append_metrics(tmp_path, 1, {"loss": 1.0})

    def refuse(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        drop_superseded(tmp_path, 1)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["metrics.jsonl"]
    assert len(read_metrics(tmp_path)) == 1


def test_a_run_without_figures_has_none(tmp_path: Path) -> None:
    drop_superseded(tmp_path, 1)
    assert read_metrics(tmp_path) == []


def test_starts_are_counted_with_those_that_are_superseded(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for start, first_step in enumerate((0, 0, 5)):  # the second found no checkpoint of the first
        assert count_starts(tmp_path) == start
        drop_superseded(tmp_path, first_step)
        append_metrics(tmp_path, max(0, first_step - 1), {RESTARTS: start})
        append_metrics(tmp_path, first_step + 7, {"loss": 1.0, RESTARTS: start})
    assert [(e["step"], e[RESTARTS]) for e in read_metrics(tmp_path)] == [(0, 1), (4, 2), (12, 2)]


def test_torn_lines_anywhere_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for step in (1, 2, 3):
        append_metrics(tmp_path, step, {"loss/all": float(step)})
    path = tmp_path / "logs" / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    torn = (
        b"\0" * 600 + b"\n",
        b"\n",
        second[:9] + second,
        b"[1]}\n",
        b'{"loss/all": 3}\n',
        b'{"step": "}\n',
    )
    path.write_bytes(first + b"".join(torn) + b"\xff\xfe{}\n" + third + third[:-5])
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 3]
    drop_superseded(tmp_path, 3)
    append_metrics(tmp_path, 3, {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
