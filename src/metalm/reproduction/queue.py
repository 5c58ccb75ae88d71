"""The queue: jobs on this machine, several at once, each when what it needs is done.

Jobs that are done are passed over. One that was killed starts again: its commands go on where they stopped.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from subprocess import STDOUT, Popen

from metalm.errors import ConfigError, FaultError
from metalm.progress import Phase
from metalm.reproduction.jobs import Job, Marks, by_longest_path

_TAIL = 1500
"""Characters of a failed job's output that are shown."""
_TICK_S = 10.0
"""Between two looks at how long jobs have been running."""


class Queue:
    """Runs jobs; see `run`."""

    def __init__(self, jobs: Sequence[Job], out: Path, say: Callable[[str], None]) -> None:
        """
        Args:
            jobs: each behind all that it needs.
            out: folder of all jobs.
        """
        self.marks = Marks(out)
        self._jobs, self._say = list(jobs), say
        self._environment = dict(os.environ)
        self._running: set[Popen[bytes]] = set()
        self._is_stopped = False
        self._lock = threading.Lock()
        (out / "jobs").mkdir(parents=True, exist_ok=True)

    def run(self, num_parallel: int) -> None:
        """Run all that is not done yet.

        Raises:
            ConfigError: a job was done with other settings.
            FaultError: some jobs failed; all that did not need these are done.
        """
        # Threads of small operations that wait for each other on busy cores cost more than they save.
        self._environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_parallel)))
        done: set[str] = set()
        failed: dict[str, str] = {}
        waiting = by_longest_path(self._jobs)
        minutes = sum(job.minutes for job in waiting if self.marks.read(job) is None)
        running: dict[Future[str | None], _Started] = {}
        with (
            Phase("running jobs", minutes, "core-minutes") as phase,
            ThreadPoolExecutor(num_parallel) as pool,
        ):
            try:
                while waiting or running:
                    for job in list(waiting):
                        if not done.issuperset(job.needs):
                            continue
                        if self.marks.is_done(job):
                            waiting.remove(job)
                            done.add(job.name)
                        elif len(running) < num_parallel:
                            waiting.remove(job)
                            self._say(f"start {job.name} ({len(waiting)} more)")
                            running[pool.submit(self.run_job, job)] = _Started(job)
                    if not running:
                        if any(done.issuperset(job.needs) for job in waiting):
                            continue
                        break  # what is left needs what failed
                    ended = wait(running, _TICK_S, return_when=FIRST_COMPLETED).done
                    for started in running.values():
                        phase.advance(started.advance())
                    for future in ended:
                        started = running.pop(future)
                        phase.advance(started.rest)
                        job = started.job
                        if (problem := future.result()) is None:
                            done.add(job.name)
                        else:
                            failed[job.name] = problem
                            self._say(f"FAILED {job.name}: {problem}")
            except BaseException:
                self.stop()
                raise
        if failed:
            shown = "\n".join(f"{name}: {problem}" for name, problem in failed.items())
            raise FaultError(
                f"{len(failed)} job(s) failed, {len(waiting)} that need them were not tried:\n{shown}"
            )

    def run_job(self, job: Job) -> str | None:
        """Run one job whose needs are done; what went wrong, or None."""
        began = time.monotonic()
        for command in job.commands():
            with self.marks.log_of(job).open("ab") as log:
                log.write(f"$ {' '.join(command)}\n".encode())
                log.flush()
                with self._lock:
                    if self._is_stopped:
                        return "stopped"
                    process = Popen(command, stdout=log, stderr=STDOUT, env=self._environment)
                    self._running.add(process)
                code = process.wait()
                with self._lock:
                    self._running.discard(process)
            if code:
                said = self.marks.log_of(job).read_text(errors="replace")[-_TAIL:]
                return f"exit code {code}; the end of {self.marks.log_of(job)}:\n{said}"
        self.marks.write(job, time.monotonic() - began)
        self._say(f"done {job.name} in {(time.monotonic() - began) / 60:.1f} min")
        return None

    def stop(self) -> None:
        """Ask what runs to save and end, and wait for it."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


class _Started:
    """A job that runs, and what of its expected minutes is not told as done yet."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rest = job.minutes
        self._began = time.monotonic()

    def advance(self) -> float:
        """Minutes that have gone by since the last call."""
        left = max(0.0, self.job.minutes - (time.monotonic() - self._began) / 60)
        gone, self.rest = self.rest - left, left
        return gone


def run_alone(jobs: Sequence[Job], name: str, out: Path, say: Callable[[str], None]) -> None:
    """Run one job of them, as a task of a Slurm array does.

    Raises:
        ConfigError: there is no such job, or it was done with other settings.
        FaultError: what it needs is not done, or it failed.
    """
    queue = Queue(jobs, out, say)
    by_name = {job.name: job for job in jobs}
    if name not in by_name:
        raise ConfigError(f"there is no job {name}; --list shows them")
    job = by_name[name]
    if missing := [need for need in job.needs if not queue.marks.is_done(by_name[need])]:
        raise FaultError(f"{name} needs {missing[0]}, which is not done: see {out / 'jobs'}")
    if queue.marks.is_done(job):
        say(f"{name} is done already")
        return
    try:
        problem = queue.run_job(job)
    except BaseException:
        queue.stop()
        raise
    if problem is not None:
        raise FaultError(f"{name}: {problem}")
