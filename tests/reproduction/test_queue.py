"""The queue of jobs: what is done is passed over, what was killed goes on, what fails stops what needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from metalm.errors import ConfigError, FaultError
from metalm.progress import Phase
from metalm.reproduction.jobs import Job, Marks, by_longest_path, in_order
from metalm.reproduction.queue import Queue, run_alone

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


def job(name: str, folder: Path, *needs: str, code: str = APPEND, more: str = "") -> Job:
    command = (sys.executable, "-c", code, str(folder / "said"), name + more)
    return Job(name, lambda: [command], needs)


def run(jobs: list[Job], out: Path, num_parallel: int = 2) -> list[str]:
    said: list[str] = []
    Queue(jobs, out, said.append).run(num_parallel)
    return said


def said(folder: Path) -> str:
    return (folder / "said").read_text()


def test_jobs_run_behind_what_they_need_and_once(tmp_path: Path) -> None:
    jobs = [job("c", tmp_path, "b"), job("b", tmp_path, "a"), job("a", tmp_path)]
    run(jobs, tmp_path)
    assert said(tmp_path) == "abc"
    assert run(jobs, tmp_path) == []
    assert said(tmp_path) == "abc"
    done = Marks(tmp_path).read(jobs[0])
    assert done is not None
    assert done.commands == [tuple(jobs[0].commands()[0])]


def test_a_mark_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"jobs/a\.json does not say how a was done .*remove it"):
        Marks(tmp_path).read(job("a", tmp_path))


def test_what_all_wait_for_in_the_end_begins_first(tmp_path: Path) -> None:
    short, first, long = job("short", tmp_path), job("first", tmp_path), job("long", tmp_path, "first")
    long = replace(long, minutes=9.0)
    assert by_longest_path([short, first, long]) == [first, long, short]
    run([short, first, long], tmp_path, num_parallel=1)
    assert said(tmp_path) == "firstlongshort"


@pytest.fixture
def of_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What each run of a queue has told as done, piece by piece."""
    told: list[list[float]] = []

    class Noted(Phase):
        def __enter__(self) -> Phase:
            told.append([])
            return super().__enter__()

        def advance(self, amount: float = 1.0) -> None:
            told[-1].append(amount)

    monkeypatch.setattr("metalm.reproduction.queue.Phase", Noted)
    return told


def test_progress_is_told_in_expected_minutes_of_what_is_left(
    tmp_path: Path, of_runs: list[list[float]]
) -> None:
    jobs = [replace(job(name, tmp_path), minutes=minutes) for name, minutes in (("a", 0.3), ("b", 20.0))]
    run(jobs[:1], tmp_path)
    run(jobs, tmp_path)
    assert [sum(one) for one in of_runs] == pytest.approx([0.3, 20.0])


def test_a_job_that_runs_counts_until_it_takes_longer_than_expected(
    tmp_path: Path, of_runs: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metalm.reproduction.queue._TICK_S", 0.1)
    slow = job("slow", tmp_path, code="import time; time.sleep(1.5)")
    run([replace(slow, minutes=0.005)], tmp_path / "over")
    run([replace(slow, minutes=10.0)], tmp_path / "under")
    over, under = of_runs
    assert len(over) > 5
    assert sum(over) == pytest.approx(0.005)
    assert over[-5:] == [0.0] * 5
    assert sum(under) == pytest.approx(10.0)
    assert 0 < sum(under[:-1]) < 0.2


def test_a_job_that_fails_stops_what_needs_it_and_no_more(tmp_path: Path) -> None:
    broken = job("broken", tmp_path, code="raise SystemExit('out of paper')")
    jobs = [broken, job("behind", tmp_path, "broken"), job("other", tmp_path)]
    with pytest.raises(FaultError, match=r"1 job\(s\) failed, 1 that need them(?s:.*)out of paper"):
        run(jobs, tmp_path)
    assert said(tmp_path) == "other"
    run([job("broken", tmp_path), *jobs[1:]], tmp_path)
    assert said(tmp_path) == "otherbrokenbehind"


def test_what_was_made_with_other_settings_is_refused(tmp_path: Path) -> None:
    run([job("a", tmp_path)], tmp_path)
    with pytest.raises(ConfigError, match="a was made with other settings"):
        run([job("a", tmp_path, more="!")], tmp_path)


def test_commands_are_made_when_what_they_need_is_done(tmp_path: Path) -> None:
    later = Job(
        "later", lambda: [(sys.executable, "-c", APPEND, str(tmp_path / "said"), said(tmp_path))], ("a",)
    )
    run([job("a", tmp_path), later], tmp_path)
    assert said(tmp_path) == "aa"


def test_a_job_of_an_array_needs_what_came_before(tmp_path: Path) -> None:
    jobs = [job("a", tmp_path), job("b", tmp_path, "a")]
    with pytest.raises(FaultError, match="b needs a, which is not done"):
        run_alone(jobs, "b", tmp_path, print)
    with pytest.raises(ConfigError, match="there is no job c"):
        run_alone(jobs, "c", tmp_path, print)
    run_alone(jobs, "a", tmp_path, print)
    run_alone(jobs, "b", tmp_path, print)
    assert said(tmp_path) == "ab"


def test_stages_are_as_early_as_may_be(tmp_path: Path) -> None:
    jobs = [job("a", tmp_path), job("b", tmp_path), job("c", tmp_path, "a"), job("d", tmp_path, "c", "b")]
    assert [[one.name for one in stage] for stage in in_order(jobs)] == [["a", "b"], ["c"], ["d"]]


COUNTED = """
import sys, time
from pathlib import Path
count, go = map(Path, sys.argv[1:])
reached = int(count.read_text()) if count.exists() else 0
while reached < 3:
    reached += 1
    count.write_text(str(reached))
    time.sleep(0 if reached != 2 or go.exists() else 60)
"""
"""Goes on from the step that it had reached, and is stuck at the second until it is allowed to go on."""

KILLED = """
import sys
from pathlib import Path
from metalm.reproduction.jobs import Job
from metalm.reproduction.queue import Queue
folder, counted = Path(sys.argv[1]), sys.argv[2]
jobs = [
    Job("first", lambda: [(sys.executable, "-c", "", "first")]),
    Job(
        "counted",
        lambda: [(sys.executable, "-c", counted, str(folder / "count"), str(folder / "go"))],
        ("first",),
    ),
]
Queue(jobs, folder, lambda line: print(line, flush=True)).run(1)
"""


def test_a_queue_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The first job is not done again, and the second begins at the step that it had reached."""
    words = [sys.executable, "-c", KILLED, str(tmp_path), COUNTED]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "count").exists() or (tmp_path / "count").read_text() != "2":
        assert time.monotonic() < deadline
        time.sleep(0.02)

    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "go").touch()
    again = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert [line.split(" in ")[0] for line in again.stdout.splitlines()] == [
        "start counted (0 more)",
        "done counted",
    ]
    assert (tmp_path / "count").read_text() == "3"


SAVING = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def save(*_):
    time.sleep(0.3)
    (folder / "saved").touch()
    raise SystemExit(75)
signal.signal(signal.SIGTERM, save)
(folder / "begun").touch()
time.sleep(60)
"""

STOPPED = """
import signal, sys
from pathlib import Path
from metalm.reproduction.jobs import Job
from metalm.reproduction.queue import Queue, run_alone
folder, way, saving = Path(sys.argv[1]), *sys.argv[2:]
signal.signal(signal.SIGTERM, signal.default_int_handler)
jobs = [Job("saving", lambda: [(sys.executable, "-c", saving, str(folder))])]
if way == "queue":
    Queue(jobs, folder, print).run(1)
else:
    run_alone(jobs, "saving", folder, print)
"""


@pytest.mark.parametrize("way", ["queue", "alone"])
def test_a_queue_or_job_that_is_stopped_ends_when_its_command_has_saved(way: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", STOPPED, str(tmp_path), way, SAVING]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) != 0
    assert (tmp_path / "saved").exists()


def test_where_the_project_is_makes_no_difference_but_a_folder_beside_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = Marks(tmp_path)
    (tmp_path / "jobs").mkdir()

    def fingerprint(root: str, out: str) -> str:
        monkeypatch.setattr("metalm.reproduction.jobs.project_root", lambda: tmp_path / root)
        command = (sys.executable, str(tmp_path / root / "tools/any.py"), str(tmp_path / out))
        marks.write(Job("a", lambda: [command]), 1.0)
        done = marks.read(Job("a", list))
        assert done is not None
        return done.fingerprint

    assert fingerprint("one", "one-out") == fingerprint("other", "one-out") != fingerprint("one", "-out")
