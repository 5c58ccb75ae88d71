"""Whether a run is at work, and if not, how it has ended: from what its starts have left in its folder, and
of one that waits, from Slurm's queue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metalm.checkpoint.names import CHECKPOINTS_NAME
from metalm.errors import EXIT_DATA, EXIT_DONE, EXIT_RESTART, EXIT_USAGE
from metalm.operations.history import Attempt
from metalm.operations.slurm_queue import SlurmQueue
from metalm.run_ends import RunEnd, last_end
from metalm.run_folder import LOGS_NAME, STOP_NAME, SUBMITTED_NAME, TEMPLATE_NAME, TRAINING_TEMPLATES
from metalm.run_lock import Holder, last_holder

QUIET_S = 300.0
"""A run without a sign of life for so long, and for many times its usual pace, is called silent."""


@dataclass(frozen=True)
class RunState:
    """The state of a run, in words."""

    name: str
    """The first word."""
    details: str = ""
    goes_on: bool = False
    """Whether it needs nobody's help to go on."""

    def __str__(self) -> str:
        return f"{self.name}{self.details}"


@dataclass(frozen=True)
class Pace:
    """How fast the run goes over its last lines, evaluation and saving included."""

    step: int
    time: float
    seconds_per_step: float | None
    seconds_per_line: float | None


def pace_of(lines: list[dict[str, Any]]) -> Pace | None:
    """From the lines of the newest start that has made a step: between starts nothing is trained.

    Args:
        lines: newest first.
    """
    if not lines:
        return None
    newest = lines[0]
    trained = [line for line in lines if "loss/all" in line]
    current = [line for line in trained if line.get("run/restarts") == trained[0].get("run/restarts")]
    if len(current) < 2 or current[0]["step"] <= current[-1]["step"]:
        return Pace(newest["step"], newest["time"], None, None)
    seconds = current[0]["time"] - current[-1]["time"]
    return Pace(
        newest["step"],
        newest["time"],
        seconds / (current[0]["step"] - current[-1]["step"]),
        seconds / (len(current) - 1),
    )


def state_of(
    run_folder: Path,
    attempts: list[Attempt],
    pace: Pace | None,
    total: int | None,
    saved_step: int | None,
    now: float,
    queue: SlurmQueue,
) -> RunState:
    """The state of a run at a time.

    A live holder of the run's lock means that it is at work. Else the newest counts of: the end that the
    batch script recorded, which knows whether the job comes back; that which the trainer recorded or, where a
    lock is left of another process that is gone, that; and a submission. Where a job has begun after these,
    or there are none, the run's signs of life count.

    Args:
        total: steps of the whole run.
        saved_step: of its newest checkpoint.
        queue: is asked about a run that waits.
    """
    last = attempts[-1] if attempts else None
    held = last_holder(run_folder, now)
    asked = ", asked to stop" if (run_folder / STOP_NAME).exists() else ""
    where = "" if last is None else f" (job {last.job} on {last.nodes}, {last.ranks} ranks)"
    if held is not None and held[1]:
        return RunState("running", f"{asked}{where or f' ({held[0]})'}", goes_on=True)
    if total is not None and saved_step is not None and saved_step >= total:
        return RunState("done")
    again = (
        "; nothing is saved"
        if saved_step is None
        else f"; started again, it goes on from step {saved_step:,}"
    )
    found: list[tuple[float, RunState]] = []
    end = last_end(run_folder)
    if held is not None and (end is None or (end.host, end.pid) != (held[0].host, held[0].pid)):
        found.append((held[0].began, _killed(held[0], where, again)))
    elif end is not None:
        found.append((end.time, _of_trainer(end, again, now)))
    if last is not None and last.ended is None:
        found.append((last.began, _guessed(run_folder, last, pace, saved_step, f"{asked}{where}", now)))
    elif last is not None and last.ended is not None:
        found.append((last.ended, _of_job(last, last.ended, asked, again, now)))
    if (submission := last_submission(run_folder)) is not None:
        submitted = submission.stat().st_mtime
        if pace is None or pace.time < submitted:
            which = "next" if found or pace or saved_step is not None else "first"
            found.append((submitted, _submitted(run_folder, submitted, which, asked, now)))
    if not found:
        return _guessed(run_folder, last, pace, saved_step, f"{asked}{where}", now)
    state = max(found, key=lambda entry: entry[0])[1]
    return _in_queue(state, run_folder, last, again, queue)


def last_submission(run_folder: Path) -> Path | None:
    """The config of the last job of the run that was submitted to Slurm to train it; None: there is none."""
    configs = (run_folder / SUBMITTED_NAME).glob("*/config.yaml")
    return max((config for config in configs if _trains(config.with_name(TEMPLATE_NAME))), default=None)


def _trains(template: Path) -> bool:
    """Whether a submission is of a job that trains; those of older versions do not tell."""
    return not template.is_file() or template.read_text().strip() in TRAINING_TEMPLATES


def _submitted(run_folder: Path, submitted: float, which: str, asked: str, now: float) -> RunState:
    """Of a run whose job has put nothing on record; one that is refused at its start says so in its log."""
    ago = f"submitted {span(now - submitted)} ago"
    logs = (run_folder / LOGS_NAME).glob("job-*.log")
    if (log := max((log for log in logs if log.stat().st_mtime >= submitted), default=None)) is not None:
        return RunState("started", f", nothing on record yet{asked} ({ago}): see {log}", goes_on=True)
    return RunState("waiting", f" for its {which} start{asked} ({ago})", goes_on=True)


def _of_job(last: Attempt, ended: float, asked: str, again: str, now: float) -> RunState:
    """As the batch script has recorded the end."""
    ago = f"{span(now - ended)} ago, job {last.job}: {last.cause}"
    if last.comes_back:
        return RunState("waiting", f" to start again{asked} (ended {ago})", goes_on=True)
    return RunState("ended", f" {ago} (exit code {last.code}){again}")


def _in_queue(
    state: RunState, run_folder: Path, last: Attempt | None, again: str, queue: SlurmQueue
) -> RunState:
    """A state with what Slurm says of the job, where the run waits for one.

    A job that was never submitted by `metalm submit` may have a successor that is not known here.
    """
    if state.name != "waiting":
        return state
    submission = last_submission(run_folder)
    try:
        user = (submission or run_folder).owner()
        job = queue.job_of(run_folder, user, () if last is None else (last.job,))
    except LookupError:  # also where the user has no name
        return state
    if job is not None:
        return replace(state, details=f"{state.details}; {job}")
    if submission is None:
        return state
    was = f"was waiting{state.details}, and no job of `metalm submit` for it is in Slurm's queue"
    return RunState("gone", f": it {was}{again}")


def _of_trainer(end: RunEnd, again: str, now: float) -> RunState:
    at = "" if end.step is None else f" at step {end.step:,}"
    ago = f"{span(now - end.time)} ago"
    if end.code == EXIT_DONE:
        return RunState("done", f" {ago}{at}, of fewer steps than the config has now{again}")
    if end.code == EXIT_RESTART:
        return RunState("stopped", f" {ago}{at} by {end.cause.removeprefix('stopped by ')}{again}")
    once = " once that is mended" if end.code in (EXIT_USAGE, EXIT_DATA) else ""
    return RunState("failed", f" {ago}{at}: {end.cause} (exit code {end.code}){again}{once}")


def _killed(holder: Holder, where: str, again: str) -> RunState:
    """By a lock that nobody holds: whoever took it could neither let go of it nor say how it ended."""
    return RunState("killed", f": {holder} is gone without a word{where}{again}")


def _guessed(
    run_folder: Path, last: Attempt | None, pace: Pace | None, saved_step: int | None, about: str, now: float
) -> RunState:
    signs = [pace.time] if pace else []
    if last is not None:
        signs.append(last.began)
    if saved_step is not None:
        signs.append((run_folder / CHECKPOINTS_NAME).stat().st_mtime)
    quiet_s = now - max(signs, default=0.0)
    patience_s = max(QUIET_S, 10 * (pace.seconds_per_line or 0.0) if pace else QUIET_S)
    if not signs:
        return RunState("started", f", no step yet{about}", goes_on=True)
    if quiet_s > patience_s:
        return RunState("silent", f" for {span(quiet_s)}: hung, killed, or waiting in the queue{about}")
    return RunState("running", about, goes_on=True)


def span(seconds: float) -> str:
    """A time as people say it, in its two largest units."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
