"""A progress line with a rate and the time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class ProgressLine:
    """Shows how much of `total` is done: rewritten in place on a terminal, else one line in a while.

    Args:
        total: amount of work, in `unit`s times `scale`.
        unit: what is shown, for example MB.
        scale: how much work one unit is.
    """

    def __init__(self, total: float, unit: str, scale: float = 1.0, stream: TextIO = sys.stderr) -> None:
        self._total = total
        self._done = 0.0
        self._unit = unit
        self._scale = scale
        self._stream = stream
        self._in_place = stream.isatty()
        self._interval_s = 0.5 if self._in_place else 15.0
        self._started = self._shown = time.monotonic()

    def advance(self, amount: float) -> None:
        """Adds work done, and shows the state unless it was shown a moment ago."""
        # Neighbouring stretches of a file share a line, and both have read it.
        self._done = min(self._total, self._done + amount)
        now = time.monotonic()
        if now - self._shown >= self._interval_s:
            self._shown = now
            self._show(now)

    def close(self) -> None:
        """Shows the last state and ends the line."""
        self._show(time.monotonic())
        if self._in_place:
            print(file=self._stream)

    def _show(self, now: float) -> None:
        elapsed_s = max(now - self._started, 1e-9)
        rate = self._done / elapsed_s
        left = _duration((self._total - self._done) / rate) if rate else "unknown"
        share = self._done / self._total if self._total else 1.0
        done, total, rate = self._done / self._scale, self._total / self._scale, rate / self._scale
        line = (
            f"{done:,.1f} of {total:,.1f} {self._unit} ({share:.0%}), {rate:,.1f} {self._unit}/s, {left} left"
        )
        if self._in_place:
            print(f"\r{line}\x1b[K", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
