from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metalm import progress
from metalm.progress import Phase, say
from metalm.reproduction.data import getting
from metalm.reproduction.data.packages import Package


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a command in a hundredth of one."""
    for name in ("FIRST_S", "TOLD_S", "LOG_EVERY_S", "LONG_LOG_EVERY_S", "TERMINAL_EVERY_S"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 100)
    monkeypatch.delenv("RANK", raising=False)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def told_meanwhile(capsys: pytest.CaptureFixture[str]) -> str:
    """The first line, however long a busy machine takes to write it."""
    found = ""
    while not found.endswith("\n"):
        time.sleep(0.001)
        found += capsys.readouterr().err
    return found.splitlines()[0]


def test_a_log_gets_plain_lines(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Phase("reading"):
        time.sleep(0.4)
    *meanwhile, last = lines_of(capsys)
    assert 2 <= len(meanwhile) <= 6  # the first after 2 s, then every 10
    assert all(line.startswith("metalm: reading: ") and line.endswith(" s so far") for line in meanwhile)
    assert last == f"metalm: reading: {last.split()[-2]} s"


def test_an_amount_has_a_rate_and_an_end(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Phase("hashing", 8e6, "MB", 1e6) as phase:
        phase.advance(2e6)
        first = told_meanwhile(capsys)
        phase.advance(1e9)
    assert re.fullmatch(r"metalm: hashing: 2\.0 of 8\.0 MB \(25%\), [\d,]+\.\d MB/s, 0:00:0\d left", first)
    assert lines_of(capsys)[-1].startswith("metalm: hashing: 8.0 MB, ")


def test_what_is_slow_is_counted_by_the_minute(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SLOW", float("inf"))
    with Phase("running jobs", 9, "jobs") as phase:
        phase.advance(3)
        time.sleep(0.05)
    first, _ = lines_of(capsys)
    assert re.fullmatch(
        r"metalm: running jobs: 3 of 9 jobs \(33%\), [\d,]+\.\d jobs/min, 0:00:00 left", first
    )


def test_what_is_short_is_not_told_unless_it_is_asked_for(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Phase("reading"):
        pass
    assert list(Phase.over("reading", range(3), "lines")) == [0, 1, 2]
    with Phase("loading", told=True):
        pass
    say("here")
    assert lines_of(capsys) == ["metalm: loading: 0.0 s", "metalm: here"]


def test_the_innermost_is_shown(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Phase("outside"), Phase("inside"):
        time.sleep(0.05)
    lines = lines_of(capsys)
    assert "inside" in lines[0] and not any("outside" in line and "so far" in line for line in lines)


def test_a_terminal_has_one_line_that_goes(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Phase("reading"):
        time.sleep(0.04)
    shown, _, told = terminal.getvalue().rpartition("\r\x1b[K")
    assert shown.startswith("\rmetalm: reading: 0 s so far |\x1b[K") and "\n" not in shown
    assert told == f"metalm: reading: {told.split()[-2]} s\n"


def test_what_fails_is_not_told_as_done(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ValueError), Phase("hashing", 4, "files") as phase:
        phase.advance()
        time.sleep(0.04)
        raise ValueError
    shown, _, told = terminal.getvalue().rpartition("\r\x1b[K")
    assert "[#####...............] metalm: hashing: 1 of 4 files (25%)" in shown and told == ""


def test_other_ranks_and_workers_are_silent(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in (("RANK", "1"), ("SLURM_PROCID", "3")):
        with monkeypatch.context() as patched:
            patched.setenv(*change)
            with Phase("reading", told=True):
                time.sleep(0.03)
    monkeypatch.setattr(progress, "parent_process", lambda: object())
    say("here")
    assert lines_of(capsys) == []


def test_a_long_operation_is_told_at_its_usual_pace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package manager that takes longer than 2 s, with nobody at a terminal."""
    monkeypatch.delenv("RANK", raising=False)
    package = Package("pip", "set", "1", "set.zip", 4_000_000, "", "", "")
    getting._call(package, [sys.executable, "-c", "import time; time.sleep(2.3)"], tmp_path, {})
    assert lines_of(capsys)[0].startswith("metalm: fetching set.zip: 0.0 of 4.0 MB (0%), ")


def test_train_speaks_before_it_loads_anything(tmp_path: Path) -> None:
    """Within a second of typing, of which an idle machine needs a tenth."""
    command = [sys.executable, "-m", "metalm", "train", str(tmp_path / "none.yaml"), "run.name=one"]
    process = subprocess.Popen(
        [*command[:1], "-X", "importtime", *command[1:]], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    before = []
    for line in process.stderr:
        if line.startswith("metalm: "):
            break
        before.append(line.rpartition("|")[2].strip())
    process.communicate()
    assert line == f"metalm: train {tmp_path / 'none.yaml'} run.name=one\n"
    assert not {"torch", "numpy", "pydantic", "yaml", "transformers"} & set(before)
