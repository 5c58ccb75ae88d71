"""What `metalm status` calls a run after every kind of end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from metalm.errors import EXIT_DATA, EXIT_DONE, EXIT_FAULT, EXIT_RESTART, ConfigError
from metalm.operations.status import describe_run, describe_runs, status
from metalm.operations.stop import stop
from metalm.run_ends import record_end
from metalm.run_lock import Holder, RunLock

CONFIG = "training: {steps: 1000}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 1,000 steps that has saved step 80."""
    return make_run(tmp_path / "run")


def make_run(folder: Path) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "checkpoints/step_00000080").mkdir(parents=True)
    return folder


def state(folder: Path) -> str:
    (line,) = (line for line in describe_run(folder, time.time()).splitlines() if line.startswith("state"))
    return line.removeprefix("state").strip()


def leave_lock(folder: Path, *, host: str = "gpu7", pid: int = 99, **changes: str | None) -> None:
    """The lock of a process that is gone."""
    lock = RunLock(folder)
    holder = Holder(**json.loads((folder / "lock").read_text()))
    lock.release()
    (folder / "lock").write_text(json.dumps(asdict(replace(holder, pid=pid, host=host, **changes))))


def begin_job(folder: Path, at: float) -> None:
    entry = {"event": "start", "time": at, "job": "7", "restart": 0, "nodes": "gpu[1-2]", "ranks": 16}
    with (folder / "logs/attempts.jsonl").open("a") as handle:
        handle.write(json.dumps(entry | {"chain": "7", "step": 80}) + "\n")


def end_job(folder: Path, at: float, code: int, cause: str, comes_back: bool = False) -> None:
    entry = {"event": "end", "time": at, "job": "7", "restart": 0, "code": code, "cause": cause}
    with (folder / "logs/attempts.jsonl").open("a") as handle:
        handle.write(json.dumps(entry | {"comes_back": comes_back, "step": 80}) + "\n")


def test_who_holds_the_lock_is_at_work(run: Path) -> None:
    record_end(run, 90, EXIT_RESTART, "stopped by SIGTERM")  # of an earlier start
    lock = RunLock(run)
    try:
        assert state(run).startswith(f"running (process {os.getpid()} on ")
        (run / "stop").touch()
        assert state(run).startswith("running, asked to stop (process ")
    finally:
        lock.accept()
        lock.release()
    assert state(run).startswith("stopped 0 s ago at step 90 by SIGTERM")


@pytest.mark.parametrize(
    ("code", "cause", "told"),
    [
        (EXIT_DONE, "done", "done 0 s ago at step 90, of fewer steps than the config has now"),
        (EXIT_RESTART, "stopped by the stop file (ann)", "stopped 0 s ago at step 90 by the stop file (ann)"),
        (EXIT_DATA, "shards are gone", "failed 0 s ago at step 90: shards are gone (exit code 65)"),
        (EXIT_FAULT, "OSError: no", "failed 0 s ago at step 90: OSError: no (exit code 70)"),
    ],
)
def test_an_end_that_the_trainer_has_recorded(run: Path, code: int, cause: str, told: str) -> None:
    record_end(run, 90, code, f"{cause}\nand more lines")
    once = " once that is mended" if code == EXIT_DATA else ""
    assert state(run) == f"{told}; started again, it goes on from step 80{once}"


def test_an_end_that_was_recorded_without_letting_go_of_the_lock(run: Path) -> None:
    """As where a run hangs: its process ends itself."""
    leave_lock(run, host=socket.gethostname(), pid=os.getpid())
    record_end(run, None, EXIT_FAULT, "rank 0 has hung for 15 s while step 7")
    assert state(run).startswith("failed 0 s ago: rank 0 has hung for 15 s while step 7 (exit code 70)")


def test_a_run_that_was_killed_is_told_by_its_lock(run: Path) -> None:
    record_end(run, 40, EXIT_RESTART, "stopped by SIGTERM")
    set_back = {"time": time.time() + 3600, "step": 40, "code": EXIT_RESTART, "cause": "stopped by SIGTERM"}
    with (run / "logs/ends.jsonl").open("a") as handle:  # the clock was set back after that
        handle.write(json.dumps(set_back) + "\n")
    leave_lock(run)
    assert state(run).startswith("killed: process 99 on gpu7, since 20")
    assert state(run).endswith("is gone without a word; started again, it goes on from step 80")


def test_a_holder_on_another_node_lives_while_its_heart_beats(run: Path) -> None:
    leave_lock(run, boot="another")
    assert state(run).startswith("running (process 99 on gpu7")
    os.utime(run / "lock", (time.time() - 60, time.time() - 60))
    assert state(run).startswith("killed: process 99 on gpu7")


@pytest.mark.parametrize("cause", ["cancelled", "asked to stop: ann 2026-01-01 00:00:00"])
def test_the_batch_scripts_word_counts_more_than_the_trainers(run: Path, cause: str) -> None:
    now = time.time()
    begin_job(run, now - 100)
    record_end(run, 80, EXIT_RESTART, "stopped by SIGTERM")
    end_job(run, now + 1, EXIT_RESTART, cause)
    assert state(run) == (
        f"ended 0 s ago, job 7: {cause} (exit code 75); started again, it goes on from step 80"
    )


@pytest.mark.parametrize("name", ["logs/metrics.jsonl", "logs/ends.jsonl", "logs/attempts.jsonl"])
def test_a_named_pipe_is_not_waited_for(run: Path, name: str) -> None:
    os.mkfifo(run / name)
    with pytest.raises(ConfigError, match=rf"cannot be read: it is no regular file \(.*{name}\)"):
        state(run)


@pytest.mark.parametrize("name", ["lock", "stop"])
def test_a_named_pipe_that_is_no_lock_or_stop_file_is_nobodys(run: Path, name: str) -> None:
    record_end(run, 90, EXIT_RESTART, "stopped by SIGTERM")
    os.mkfifo(run / name)
    assert state(run).startswith("stopped 0 s ago at step 90 by SIGTERM")
    assert stop(run) == 0
    assert (run / "stop").is_file()


def test_records_that_are_none_are_left_out(run: Path) -> None:
    now = time.time()
    record_end(run, 90, EXIT_RESTART, "stopped by SIGTERM")
    end = {"time": now + 5, "step": 99, "code": EXIT_DATA, "cause": "no"}
    attempt = {"event": "start", "time": now + 5, "job": "7", "nodes": "gpu1", "ranks": 1, "step": 9}
    for name, whole, wrong in (
        ("ends", end, {"time": "5"}),
        ("ends", end, {"step": "99"}),
        ("ends", end, {"cause": None}),
        ("attempts", attempt, {"time": None}),
        ("attempts", attempt, {"ranks": "1"}),
        ("attempts", attempt, {"event": ["start"]}),
    ):
        with (run / f"logs/{name}.jsonl").open("a") as handle:
            handle.write(json.dumps(whole | wrong) + "\n")
    assert state(run).startswith("stopped 0 s ago at step 90 by SIGTERM")


def test_a_lock_without_a_time_is_read(run: Path) -> None:
    record_end(run, 90, EXIT_RESTART, "stopped by SIGTERM")
    leave_lock(run, since=None)
    assert state(run).startswith("killed: process 99 on gpu7, since None is gone without a word")


def test_a_job_that_is_queued_again_waits(run: Path) -> None:
    now = time.time()
    begin_job(run, now - 100)
    leave_lock(run)  # its ranks were killed
    end_job(run, now + 1, 128 + signal.SIGKILL, "queued again by Slurm: lost node2", comes_back=True)
    assert state(run).startswith("waiting to start again (ended 0 s ago, job 7: queued again by Slurm")


def test_a_job_that_ended_before_it_began_is_told(run: Path) -> None:
    now = time.time()
    begin_job(run, now - 100)
    end_job(run, now - 50, EXIT_RESTART, "time limit", comes_back=True)
    end_job(run, now, EXIT_DATA, "refused before it started: see the job's log")
    assert state(run).startswith("ended 0 s ago, job 7: refused before it started")
    assert "restarts    0" in describe_run(run, now)


def test_a_job_that_began_after_an_end_is_at_work(run: Path) -> None:
    record_end(run, 80, EXIT_RESTART, "stopped by SIGTERM")
    begin_job(run, time.time() + 1)
    assert state(run) == "running (job 7 on gpu[1-2], 16 ranks)"


def test_a_table_of_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a"):
        make_run(tmp_path / name)
    (tmp_path / "no run").mkdir()
    record_end(tmp_path / "a", 90, EXIT_RESTART, "stopped by SIGTERM")
    (tmp_path / "b/checkpoints/step_00001000").mkdir()
    figures = {"step": 1000, "time": time.time(), "loss/all": 2.5}
    (tmp_path / "b/logs/metrics.jsonl").write_text(json.dumps(figures) + "\n")
    assert status(tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed == describe_runs([tmp_path / "a", tmp_path / "b"], time.time()) + "\n"
    header, first, second = printed.splitlines()
    assert header.split() == ["run", "step", "loss", "left", "saved", "state"]
    assert first.startswith("a    -/1,000      -       -     80     stopped 0 s ago at step 90 by SIGTERM;")
    assert second.split() == ["b", "1,000/1,000", "2.5000", "-", "1,000", "done"]


def test_a_stop_of_a_run_that_is_not_at_work_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_end(run, 90, EXIT_RESTART, "stopped by SIGTERM")
    assert stop(run) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{run} is not at work: stopped 0 s ago at step 90 by SIGTERM; started again,")
    assert told.endswith(f"Its next start will end at once, unless {run}/stop is removed\n")


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nor does it hold any"):
        status(tmp_path)
