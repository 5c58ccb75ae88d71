"""The terminal: a line per logged step with the time left, a line per evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping

from metalm.training.monitor.sink import About, Sink


class Terminal(Sink):
    """Prints to standard output."""

    def __init__(self, total_steps: int) -> None:
        """Stand by for a run of so many steps."""
        self._total_steps = total_steps
        self._began, self._first_step = time.perf_counter(), 0

    def begin(self, first_step: int) -> None:
        self._began, self._first_step = time.perf_counter(), first_step

    def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
        if about is About.STEPS:
            self.say(self._line(step, figures))
        elif about is About.HELD_OUT:
            losses = "  ".join(f"{n.removeprefix('held_out/')} {v:.4f}" for n, v in figures.items())
            self.say(f"held out at step {step}: {losses}")
        elif about is About.TASKS:
            scores = "  ".join(f"{n.removeprefix('tasks/')} {v:.4f}" for n, v in figures.items())
            self.say(f"tasks at step {step}: {scores}")

    def say(self, line: str) -> None:
        print(line, flush=True)

    def _line(self, step: int, figures: Mapping[str, float]) -> str:
        elapsed = time.perf_counter() - self._began
        left_s = elapsed / (step - self._first_step + 1) * (self._total_steps - step)
        by_source = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in figures.items()
            if name.startswith("loss/") and name != "loss/all"
        )
        return (
            f"step {step}/{self._total_steps}  loss {figures['loss/all']:.4f} ({by_source})  "
            f"rate {figures['optimizer/learning_rate']:.2e}  norm {figures['optimizer/gradient_norm']:.2f}  "
            f"{figures['speed/tokens_per_second']:.0f} tokens/s  "
            f"data wait {figures['speed/data_wait_share']:.0%}  left {_clock(left_s)}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
