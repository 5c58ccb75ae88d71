"""`metalm status RUN`: how a run is doing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from metalm.checkpoint.names import list_checkpoints
from metalm.errors import ConfigError
from metalm.operations.history import Attempt, newest_metrics, read_attempts
from metalm.run_folder import STOP_NAME

CONFIG_NAME = "config.yaml"
QUIET_S = 300.0
"""A run without a sign of life for so long, and for many times its usual pace, is called silent."""
_SHOWN_RESTARTS = 5


@dataclass(frozen=True)
class Pace:
    """How fast the run goes over its last lines, evaluation and saving included."""

    step: int
    time: float
    seconds_per_step: float | None
    seconds_per_line: float | None


def status(run_folder: Path) -> int:
    """Print the state of a run.

    Raises:
        ConfigError: there is no run in this folder.
    """
    print(describe_run(run_folder, time.time()))
    return 0


def describe_run(run_folder: Path, now: float) -> str:
    """The state of a run at a time, in lines of a name and a value.

    Raises:
        ConfigError: there is no run in this folder.
    """
    config_path = run_folder / CONFIG_NAME
    attempts = read_attempts(run_folder)
    if not config_path.is_file() and not attempts:
        raise ConfigError(
            f"{run_folder} is no run folder: it has neither {CONFIG_NAME} nor a start on record"
        )
    total = _total_steps(config_path)
    lines = newest_metrics(run_folder)
    trained = next((line for line in lines if "loss/all" in line), None)
    pace = _pace(lines, attempts)
    checkpoint = next(reversed(list_checkpoints(run_folder / "checkpoints")), None)
    saved_step = None if checkpoint is None else int(checkpoint.name.removeprefix("step_"))
    state, going_on = _state(run_folder, attempts, pace, total, saved_step, now)
    shown = {"run": str(run_folder), "state": state}
    if trained:
        shown |= _progress(trained, pace, total, going_on)
    if held_out := next((line for line in lines if any(k.startswith("held_out/") for k in line)), None):
        shown["held out"] = _named(held_out, "held_out/") + f" at step {held_out['step']:,}"
    shown["checkpoint"] = "none"
    if checkpoint is not None:
        shown["checkpoint"] = f"step {saved_step:,}, {_span(now - checkpoint.stat().st_mtime)} old"
    counted = next((int(line["run/restarts"]) for line in lines if "run/restarts" in line), 0)
    shown["restarts"] = _restarts(attempts, counted)
    if trained:
        shown["skipped"] = _skipped(trained)
    return "\n".join(f"{name:<11} {value}" for name, value in shown.items())


def _total_steps(config_path: Path) -> int | None:
    if not config_path.is_file():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return int(yaml.load(config_path.read_text(), loader)["training"]["steps"])


def _pace(lines: list[dict[str, Any]], attempts: list[Attempt]) -> Pace | None:
    """From the lines of the current start alone: between starts a run waits in the queue."""
    if not lines:
        return None
    newest = lines[0]
    began = attempts[-1].began if attempts else 0.0
    current = [line for line in lines if line["time"] >= began and "loss/all" in line]
    if len(current) < 2 or current[0]["step"] <= current[-1]["step"]:
        return Pace(newest["step"], newest["time"], None, None)
    seconds = current[0]["time"] - current[-1]["time"]
    return Pace(
        newest["step"],
        newest["time"],
        seconds / (current[0]["step"] - current[-1]["step"]),
        seconds / (len(current) - 1),
    )


def _state(
    run_folder: Path,
    attempts: list[Attempt],
    pace: Pace | None,
    total: int | None,
    saved_step: int | None,
    now: float,
) -> tuple[str, bool]:
    """The state in words, and whether the run goes on by itself."""
    last = attempts[-1] if attempts else None
    if total is not None and saved_step is not None and saved_step >= total:
        return "done", False
    asked = ", asked to stop" if (run_folder / STOP_NAME).exists() else ""
    if last is not None and last.ended is not None:
        ago = f"{_span(now - last.ended)} ago, job {last.job}: {last.cause}"
        if last.comes_back:
            return f"waiting to start again{asked} (ended {ago})", True
        return f"ended {ago} (exit code {last.code})", False
    where = "" if last is None else f" (job {last.job} on {last.nodes}, {last.ranks} ranks)"
    signs = [pace.time] if pace else []
    if last is not None:
        signs.append(last.began)
    if saved_step is not None:
        signs.append((run_folder / "checkpoints").stat().st_mtime)
    quiet_s = now - max(signs, default=0.0)
    patience_s = max(QUIET_S, 10 * (pace.seconds_per_line or 0.0) if pace else QUIET_S)
    if not signs:
        return f"started, no step yet{asked}{where}", True
    if quiet_s > patience_s:
        return f"silent for {_span(quiet_s)}: hung, killed, or waiting in the queue{asked}{where}", False
    return f"running{asked}{where}", True


def _progress(
    trained: dict[str, Any], pace: Pace | None, total: int | None, going_on: bool
) -> dict[str, str]:
    step = trained["step"]
    shown = {
        "step": f"{step:,}" if total is None else f"{step:,} of {total:,} ({step / total:.1%})",
        "loss": f"{trained['loss/all']:.4f} ({_named(trained, 'loss/', but='loss/all')})",
        "speed": f"{trained['speed/tokens_per_second']:,.0f} tokens/s, "
        f"{trained['speed/step_seconds']:.2f} s per step, data wait {trained['speed/data_wait_share']:.0%}",
    }
    if going_on and total is not None and pace is not None and pace.seconds_per_step is not None:
        shown["time left"] = _span(pace.seconds_per_step * (total - step))
    return shown


def _restarts(attempts: list[Attempt], counted: int) -> str:
    """As the batch scripts have recorded them with their causes, else as the run itself has counted them."""
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


def _span(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
