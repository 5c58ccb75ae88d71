"""`metalm status FOLDER`: how a run is doing, or all runs of a folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from metalm.checkpoint.best import read_best
from metalm.checkpoint.names import CHECKPOINTS_NAME, CONFIG_NAME, list_checkpoints, step_of
from metalm.errors import ConfigError, MetaLMError
from metalm.operations.history import ATTEMPTS_NAME, Attempt, read_attempts
from metalm.operations.run_state import Pace, RunState, last_submission, pace_of, span, state_of
from metalm.operations.slurm_queue import SlurmQueue
from metalm.run_folder import LOGS_NAME
from metalm.run_metrics import newest_metrics

_SHOWN_RESTARTS = 5
_CLEAR = "\033[H\033[2J"
_GREEN, _YELLOW, _RED = 32, 33, 31
_COLOURS = {
    **dict.fromkeys(("running", "done"), _GREEN),
    **dict.fromkeys(("waiting", "started", "stopped"), _YELLOW),
    **dict.fromkeys(("failed", "killed", "gone", "silent", "ended", "cannot"), _RED),
}
"""Of a terminal, by the first word of a state."""


@dataclass(frozen=True)
class Run:
    """What a run's folder tells of it."""

    folder: Path
    attempts: list[Attempt]
    total: int | None
    """Steps of the whole run."""
    lines: list[dict[str, Any]]
    """Newest figures, the last first."""
    checkpoint: Path | None
    pace: Pace | None
    state: RunState

    @property
    def trained(self) -> dict[str, Any] | None:
        """The last figures of a step."""
        return next((line for line in self.lines if "loss/all" in line), None)

    @property
    def saved_step(self) -> int | None:
        """Of the newest checkpoint."""
        return None if self.checkpoint is None else step_of(self.checkpoint)


class UnreadableRun(ConfigError):
    """A run's folder, or a file in it, cannot be read or is not what a run writes."""

    def __init__(self, folder: Path, cause: str) -> None:
        super().__init__(f"the run {folder} cannot be read: {cause}")
        self.cause = cause


def status(folder: Path, watch_s: float | None = None) -> int:
    """Print the state of a run, or a table of all runs in a folder.

    Args:
        folder: a run's, or one that holds runs.
        watch_s: print it anew after so many seconds, until the user interrupts; None: once.

    Raises:
        ConfigError: there is no run in this folder, or the one that it is cannot be read.
    """
    coloured = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed before the start
    while True:
        text = describe(folder, time.time(), coloured=coloured)
        print(f"{_CLEAR if watch_s is not None and coloured else ''}{text}", flush=True)
        if watch_s is None:
            return 0
        time.sleep(watch_s)


def describe(folder: Path, now: float, *, coloured: bool = False) -> str:
    """The state of a run, or a table of all runs in a folder.

    In the table, a run that cannot be read says so in its line; so does a folder that does not show whether
    it is one.

    Raises:
        ConfigError: there is no run in this folder, or the one that it is cannot be read.
    """
    with _reading(folder):
        if is_run(folder):
            return describe_run(folder, now, coloured=coloured)
        runs = sorted(filter(_may_be_run, folder.iterdir())) if folder.is_dir() else []
    if not runs:
        raise ConfigError(
            f"{folder} is no run folder, nor does it hold any: a run's has {CONFIG_NAME} or a start on record"
        )
    return describe_runs(runs, now, coloured=coloured)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that was ever started, or submitted to Slurm."""
    started = (folder / CONFIG_NAME).is_file() or (folder / LOGS_NAME / ATTEMPTS_NAME).is_file()
    return started or last_submission(folder) is not None


def _may_be_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except OSError:  # it cannot be looked into
        return True


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Make of whatever a run's files cannot be read for an error that names the run.

    Raises:
        UnreadableRun: they cannot be.
    """
    try:
        yield
    except MetaLMError:
        raise
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        raise UnreadableRun(folder, f"{error.strerror or error}{where}") from error
    except Exception as error:  # of files that are not what a run writes: anything
        raise UnreadableRun(folder, f"{type(error).__name__}: {error}".replace("\n", " ")) from error


def read_run(folder: Path, now: float, queue: SlurmQueue | None = None) -> Run:
    """What a run's folder tells at a time.

    Args:
        queue: where it is asked for several runs.

    Raises:
        ConfigError: there is no run in this folder, or it cannot be read.
    """
    with _reading(folder):
        return _read_run(folder, now, queue or SlurmQueue())


def _read_run(folder: Path, now: float, queue: SlurmQueue) -> Run:
    if not is_run(folder):
        raise ConfigError(f"{folder} is no run folder: it has neither {CONFIG_NAME} nor a start on record")
    attempts, lines = read_attempts(folder), newest_metrics(folder)
    config = folder / CONFIG_NAME
    if not config.is_file():
        config = last_submission(folder) or config
    total, pace = _total_steps(config), pace_of(lines)
    checkpoint = next(reversed(list_checkpoints(folder / CHECKPOINTS_NAME)), None)
    saved = None if checkpoint is None else step_of(checkpoint)
    state = state_of(folder, attempts, pace, total, saved, now, queue)
    return Run(folder, attempts, total, lines, checkpoint, pace, state)


def describe_run(run_folder: Path, now: float, *, coloured: bool = False) -> str:
    """The state of a run at a time, in lines of a name and a value.

    Raises:
        ConfigError: there is no run in this folder, or it cannot be read.
    """
    shown = fields_of(run_folder, now)
    shown["state"] = _coloured(shown["state"], coloured)
    return "\n".join(f"{name:<11} {value}" for name, value in shown.items())


def fields_of(run_folder: Path, now: float) -> dict[str, str]:
    """The state of a run at a time, in words, by name.

    Raises:
        ConfigError: there is no run in this folder, or it cannot be read.
    """
    with _reading(run_folder):
        return _fields_of(run_folder, now)


def _fields_of(run_folder: Path, now: float) -> dict[str, str]:
    run = read_run(run_folder, now)
    shown = {"run": str(run_folder), "state": str(run.state)}
    if run.trained:
        shown |= _progress(run.trained, run)
    if held_out := next((line for line in run.lines if any(k.startswith("held_out/") for k in line)), None):
        shown["held out"] = _named(held_out, "held_out/") + f" at step {held_out['step']:,}"
    shown["checkpoint"] = "none"
    if run.checkpoint is not None:
        age = span(now - run.checkpoint.stat().st_mtime)
        shown["checkpoint"] = f"step {run.saved_step:,}, {age} old"
    if best := read_best(run_folder / CHECKPOINTS_NAME):
        shown["best"] = f"step {best.step:,}, {best.figure} {best.value:.4f}"
    counted = next((int(line["run/restarts"]) for line in run.lines if "run/restarts" in line), 0)
    shown["restarts"] = _restarts(run.attempts, counted)
    if run.trained:
        shown["skipped"] = _skipped(run.trained)
    return shown


def describe_runs(folders: Sequence[Path], now: float, *, coloured: bool = False) -> str:
    """A table of runs, a line each: step, loss, time left, checkpoint and state."""
    queue = SlurmQueue()
    rows = [("run", "step", "loss", "left", "saved", "state")]
    for folder in folders:
        try:
            with _reading(folder):
                rows.append(_row(read_run(folder, now, queue)))
        except UnreadableRun as unreadable:
            rows.append((folder.name, "-", "-", "-", "-", f"cannot be read: {unreadable.cause}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row[:-1], widths)) for row in rows]
    states = [rows[0][-1], *(_coloured(row[-1], coloured) for row in rows[1:])]
    return "\n".join(f"{line}  {state}" for line, state in zip(lines, states, strict=True))


def _row(run: Run) -> tuple[str, str, str, str, str, str]:
    step = "-" if run.trained is None else f"{run.trained['step']:,}"
    return (
        run.folder.name,
        step if run.total is None else f"{step}/{run.total:,}",
        "-" if run.trained is None else f"{run.trained['loss/all']:.4f}",
        _time_left(run) or "-",
        "-" if run.saved_step is None else f"{run.saved_step:,}",
        str(run.state),
    )


def _coloured(state: str, coloured: bool) -> str:
    """A state whose first word is in the colour of a terminal that belongs to it."""
    word = state.split()[0].rstrip(",:;")
    colour = _COLOURS.get(word)
    return f"\033[{colour}m{word}\033[0m{state[len(word) :]}" if coloured and colour else state


def _total_steps(config_path: Path) -> int | None:
    if not config_path.is_file():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return int(yaml.load(config_path.read_text(), loader)["training"]["steps"])
    except (LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UnreadableRun(config_path.parent, f"{CONFIG_NAME} names no training.steps") from error


def _progress(trained: dict[str, Any], run: Run) -> dict[str, str]:
    step, total = trained["step"], run.total
    shown = {
        "step": f"{step:,}" if total is None else f"{step:,} of {total:,} ({step / total:.1%})",
        "loss": f"{trained['loss/all']:.4f} ({_named(trained, 'loss/', but='loss/all')})",
        "speed": f"{trained['speed/tokens_per_second']:,.0f} tokens/s, "
        f"{trained['speed/step_seconds']:.2f} s per step, data wait {trained['speed/data_wait_share']:.0%}",
    }
    if left := _time_left(run):
        shown["time left"] = left
    return shown


def _time_left(run: Run) -> str | None:
    """None where the run does not go on by itself, or nothing can be said."""
    pace = run.pace
    if not run.state.goes_on or run.total is None or pace is None or pace.seconds_per_step is None:
        return None
    return None if run.trained is None else span(pace.seconds_per_step * (run.total - run.trained["step"]))


def _restarts(attempts: list[Attempt], counted: int) -> str:
    """As the batch scripts have recorded them with their causes, else as the run itself has counted them."""
    attempts = [attempt for attempt in attempts if attempt.ranks]
    if len(attempts) < 2:
        return "0" if attempts else str(counted)
    starts = [
        f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(before.ended or after.began))}  "
        f"from step {after.first_step:,}  {before.cause or 'lost: its node failed, or it was queued again'}"
        for before, after in pairwise(attempts)
    ]
    shown = starts[-_SHOWN_RESTARTS:]
    return "\n".join([f"{len(starts)}", *(" " * 12 + line for line in shown)])


def _skipped(trained: dict[str, Any]) -> str:
    samples = {name.removeprefix("data/"): n for name, n in trained.items() if "/skipped/" in name and n}
    causes = "".join(f", {name.replace('/skipped/', ' ')} {count:,}" for name, count in samples.items())
    steps = int(trained.get("optimizer/skipped_steps", 0))
    rewinds = int(trained.get("guards/rewinds", 0))
    back = f"; {rewinds:,} times back to a checkpoint" if rewinds else ""
    return f"{sum(samples.values()):,} samples{causes}; {steps:,} steps{back}"


def _named(figures: dict[str, Any], prefix: str, but: str = "") -> str:
    return "  ".join(
        f"{name.removeprefix(prefix)} {value:.4f}"
        for name, value in figures.items()
        if name.startswith(prefix) and name != but
    )
