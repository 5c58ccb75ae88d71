"""One run folder, one run: who may take it, and when."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metalm import run_lock
from metalm.errors import EXIT_RESTART, EXIT_USAGE, BusyError, ConfigError
from metalm.run_lock import RunLock, find_holder

HOLD = """
import sys, time
from pathlib import Path
from metalm.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.accept()
print("held", flush=True)
time.sleep(1000)
"""
ELSEWHERE = {
    "host": "node7",
    "pid": 4711,
    "boot": "another boot",
    "job": "81",
    "chain": "80",
    "restart": None,
    "since": "yesterday",
}


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "METALM_CHAIN"):
        monkeypatch.delenv(name, raising=False)


def hold(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Another process that holds a folder until it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def left_behind(folder: Path, **changes: Any) -> Path:
    """The file of a holder on another node."""
    path = folder / "lock"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(ELSEWHERE | changes))
    return path


def test_the_second_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    process = hold(tmp_path / "run", SLURM_JOB_ID="17")
    content = (tmp_path / "run" / "lock").read_bytes()
    with pytest.raises(ConfigError) as refusal:
        RunLock(tmp_path / "run")
    assert refusal.value.exit_code == EXIT_USAGE
    for part in (f"process {process.pid}", f"on {os.uname().nodename}", "Slurm job 17", "metalm stop"):
        assert part in str(refusal.value)
    assert (tmp_path / "run" / "lock").read_bytes() == content
    process.kill()
    process.wait()


def test_a_killed_holder_is_no_obstacle(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / "lock").exists()
    began = time.monotonic()
    RunLock(tmp_path / "run").release()
    assert time.monotonic() - began < 5


def test_a_child_of_the_holder_does_not_hold_on(tmp_path: Path) -> None:
    """Data workers and compilers outlive a killed rank for a moment."""
    lock = RunLock(tmp_path / "run")
    lock.accept()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], close_fds=False)
    lock.release()
    RunLock(tmp_path / "run").release()
    child.kill()
    child.wait()


def test_a_refused_start_leaves_no_trace(tmp_path: Path) -> None:
    RunLock(tmp_path / "runs" / "new").release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").touch()
    RunLock(tmp_path / "old").release()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["config.yaml"]
    path = left_behind(tmp_path / "crashed")
    content = path.read_bytes()
    RunLock(tmp_path / "crashed", silence_s=0.2).release()
    assert path.read_bytes() == content


def test_a_run_that_ends_in_order_leaves_no_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    lock.accept()
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_silent_holder_elsewhere_is_dead_once_its_lock_is_free(tmp_path: Path) -> None:
    left_behind(tmp_path / "run")
    lock = RunLock(tmp_path / "run", silence_s=0.3)
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    lock.release()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_heartbeat_elsewhere_is_respected(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.1)
    first = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"is held by process {os.getpid()}"):
        RunLock(tmp_path / "run", silence_s=5)
    first._released.set()  # it is killed
    time.sleep(0.3)
    RunLock(tmp_path / "run", silence_s=0.5).release()


def test_a_lock_that_a_lost_node_still_holds_asks_to_come_back_later(tmp_path: Path) -> None:
    path = left_behind(tmp_path / "run")
    with path.open("r+") as held_by_the_server:
        fcntl.flock(held_by_the_server, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match=r"process 4711 on node7, Slurm job 81.*start again") as refusal:
            RunLock(tmp_path / "run", silence_s=0.3)
    assert refusal.value.exit_code == EXIT_RESTART


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"job": "80", "chain": "80"}, {"SLURM_JOB_ID": "80", "SLURM_RESTART_COUNT": "1"}),
        ({"job": "80", "chain": "80", "restart": "1"}, {"SLURM_JOB_ID": "80", "SLURM_RESTART_COUNT": "2"}),
        ({"job": "81", "chain": "80"}, {"SLURM_JOB_ID": "82", "METALM_CHAIN": "80"}),
    ],
    ids=["queued again", "queued again twice", "successor"],
)
def test_a_job_that_comes_back_is_let_in_at_once(
    tmp_path: Path, before: dict[str, str], now: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left_behind(tmp_path / "run", **before)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    with path.open("r+") as held_by_the_server:
        fcntl.flock(held_by_the_server, fcntl.LOCK_EX)
        began = time.monotonic()
        lock = RunLock(tmp_path / "run")
        assert time.monotonic() - began < 5
    assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(ConfigError, match="is held by"):
        RunLock(tmp_path / "run")
    lock.release()


def test_a_second_start_inside_one_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    lock = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match="Slurm job 80"):
        RunLock(tmp_path / "run")
    lock.release()


def test_who_has_lost_the_folder_learns_of_it_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    first = RunLock(tmp_path / "run")
    first.accept()
    assert not first.is_lost()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = RunLock(tmp_path / "run")
    second.accept()
    time.sleep(0.5)
    assert first.is_lost() and not second.is_lost()
    first.release()
    assert json.loads((tmp_path / "run" / "lock").read_text())["restart"] == "1"
    second.release()
    assert not (tmp_path / "run" / "lock").exists()


def test_a_run_whose_folder_is_moved_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    run = tmp_path / "run"
    lock = RunLock(run)
    lock.accept()
    run.rename(tmp_path / "moved")
    wait_until(lambda: "lock is gone: was the run's folder moved?" in caplog.text)
    assert not lock.is_lost()
    run.mkdir()  # as the next save does
    wait_until((run / "lock").exists)
    assert not lock.is_lost()
    assert find_holder(run) is not None and find_holder(tmp_path / "moved") is not None
    lock.release()
    assert not list(run.iterdir())
    assert caplog.text.count("is gone") == 1


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lock_file_of_nonsense_is_nobodys(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[" * 100_000, b'{"host": 3}', b"\xff\xfe"):
        (tmp_path / "lock").write_bytes(content)
        RunLock(tmp_path).release()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to the run folder"):
        RunLock(tmp_path / "file" / "run")


def test_the_holder_is_found_without_taking_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_holder(tmp_path / "run") is None
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    lock = RunLock(tmp_path / "run")
    lock.accept()
    holder = find_holder(tmp_path / "run")
    assert holder is not None and (holder.pid, holder.job) == (os.getpid(), "80")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert find_holder(tmp_path / "run") is None  # it would be let in
    lock.release()
    left_behind(tmp_path / "run")
    assert find_holder(tmp_path / "run") is None
    assert (tmp_path / "run" / "lock").exists()
