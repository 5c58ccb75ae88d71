"""What `metalm stop` leaves for the ranks."""

from __future__ import annotations

import getpass
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from metalm.errors import ConfigError
from metalm.operations.stop import stop
from metalm.training.stopping import StopRequest
from permissions import as_users_are


def test_the_ranks_see_it(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    request = StopRequest(tmp_path)
    assert not request.is_asked()
    stop(tmp_path)
    assert request.is_asked()
    word = (tmp_path / "stop").read_text()
    request.clear()
    assert not (tmp_path / "stop").exists()
    assert (tmp_path / "logs/stop_answered").read_text() == word  # for the batch script
    request.clear()


def test_one_rank_looks_for_the_file_and_a_signal_reaches_any(tmp_path: Path) -> None:
    other = StopRequest(tmp_path, watches_file=False)
    (tmp_path / "stop").write_text("somebody\n")
    assert not other.is_asked() and other.reason() is None
    signal.raise_signal(signal.SIGUSR2)
    assert other.is_asked() and other.reason() == "SIGUSR2"


def test_the_time_limit_is_of_the_process(tmp_path: Path) -> None:
    """This one has begun before it was imported."""
    age_minutes = (time.time() - psutil.Process().create_time()) / 60
    assert StopRequest(tmp_path, age_minutes / 2).is_asked()
    assert not StopRequest(tmp_path, age_minutes + 1).is_asked()


@pytest.fixture
def _hangup() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hangup")
def test_a_closed_terminal_asks_unless_that_is_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    request = StopRequest(tmp_path)
    signal.raise_signal(signal.SIGHUP)
    assert not request.is_asked()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    request = StopRequest(tmp_path)
    signal.raise_signal(signal.SIGHUP)
    assert request.reason() == "SIGHUP"


def test_the_first_who_asked_stays_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "stop").write_text("somebody 2030-01-01\n")
    stop(tmp_path)
    assert "asked to stop before: somebody 2030-01-01" in capsys.readouterr().out


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        stop(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_jobs_own_request_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "stop").write_text("job 7\n")
    stop(tmp_path)
    assert "before" not in capsys.readouterr().out
    assert (tmp_path / "stop").read_text().startswith(f"{getpass.getuser()} 20")
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "stop"}


def test_a_user_without_a_name_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run as any number."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", nameless)
    (tmp_path / "logs").mkdir()
    stop(tmp_path)
    assert (tmp_path / "stop").read_text().startswith(f"{os.getuid()} 20")


def test_a_run_that_is_not_the_users_to_write(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    tmp_path.chmod(0o500)
    with (
        as_users_are(),
        pytest.raises(ConfigError, match="stop cannot be written: Permission denied; ask as"),
    ):
        stop(tmp_path)
    tmp_path.chmod(0o700)
    assert not (tmp_path / "stop").exists()


def test_a_full_disk_is_told_and_leaves_no_half_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nothing(path: Path, _: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(Path, "write_text", write_nothing)
    with pytest.raises(ConfigError, match="stop cannot be written: No space left on device; make room there"):
        stop(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_run_that_cannot_be_read_is_stopped_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("")
    assert stop(tmp_path) == 0
    assert (tmp_path / "stop").exists()
