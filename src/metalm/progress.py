"""What a command is doing, told while it takes long.

On a terminal: one line that is written anew, with a bar where the amount of work is known, else with the
time that passes. In a log: plain lines, fewer as time passes. By the first rank alone, and to the standard
error: the standard output is for programs that read it. What is done sooner leaves no trace.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.process import parent_process
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")

FIRST_S = 2.0
"""A phase is shown when it has taken so long."""
TOLD_S = 3.0
"""What took so long says so in the end."""
LOG_EVERY_S = 10.0
LONG_LOG_EVERY_S = 60.0
"""In a log, after the first minute."""
TERMINAL_EVERY_S = 0.25

_SLOW = 0.2
"""Units a second below which they are counted by the minute."""
_BAR_WIDTH = 20
_SPINNER = "|/-\\"
_open: list[Phase] = []
"""The innermost is the last: it alone is shown."""
_writing = threading.RLock()


def rank_of(environment: Mapping[str, str]) -> int:
    """The rank of this process, as far as its launcher's environment tells; 0 where it does not."""
    ranks = (environment.get(name, "") for name in ("RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in ranks if rank.isdecimal()), 0)


def say(line: str) -> None:
    """Tell something at once."""
    if _speaks():
        with _writing:
            _write(f"metalm: {line}\n")


class Phase:
    """Something that may take long, as a context.

    Args:
        what: such as "reading the checkpoint".
        total: amount of work, in `unit`s times `scale`; None: not known.
        unit: what is shown, for example MB.
        scale: how much work one unit is.
        told: say in the end how long it took, though it was short.
    """

    def __init__(
        self, what: str, total: float | None = None, unit: str = "", scale: float = 1.0, *, told: bool = False
    ) -> None:
        self.what = what
        self._total, self._unit, self._scale, self._told = total, unit, scale, told
        self._done = 0.0
        self._is_shown = False
        self._began = 0.0
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None

    def __enter__(self) -> Phase:
        self._began = time.monotonic()
        if _speaks():
            _open.append(self)
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ticker is None:
            return
        self._ended.set()
        self._ticker.join()
        _open.remove(self)
        took_s = time.monotonic() - self._began
        with _writing:
            if self._is_shown and sys.stderr.isatty():
                _write("\r\x1b[K")
            if kind is None and (self._told or self._is_shown or took_s >= TOLD_S):
                _write(f"metalm: {self.what}: {self._amount()}{took_s:.1f} s\n")

    def advance(self, amount: float = 1.0) -> None:
        """Add work that is done."""
        # Neighbouring stretches of a file share a line, and both have read it.
        self._done = self._done + amount if self._total is None else min(self._total, self._done + amount)

    def each(
        self, items: Iterable[Item], amount: Callable[[Item], float] = lambda item: 1.0
    ) -> Iterator[Item]:
        """The items; each is done when the next one is asked for."""
        for item in items:
            yield item
            self.advance(amount(item))

    @classmethod
    def over(cls, what: str, items: Collection[Item], unit: str) -> Iterator[Item]:
        """A phase of its own, of so many items."""
        with cls(what, len(items), unit) as phase:
            yield from phase.each(items)

    def _tick(self) -> None:
        """The life of the thread that shows it."""
        wait_s = FIRST_S
        while not self._ended.wait(wait_s):
            elapsed_s = time.monotonic() - self._began
            on_terminal = sys.stderr.isatty()
            with _writing:
                if _open[-1] is self:
                    self._is_shown = True
                    _write(f"\r{self._bar(elapsed_s)}\x1b[K" if on_terminal else f"{self._line(elapsed_s)}\n")
            in_log_s = LOG_EVERY_S if elapsed_s < 60 else LONG_LOG_EVERY_S
            wait_s = TERMINAL_EVERY_S if on_terminal else in_log_s

    def _line(self, elapsed_s: float) -> str:
        if not self._total:
            return f"metalm: {self.what}: {self._amount()}{elapsed_s:.0f} s so far"
        rate = self._done / max(elapsed_s, 1e-9)
        left = _duration((self._total - self._done) / rate) if rate else "unknown"
        rate /= self._scale
        speed = f"{60 * rate:,.1f} {self._unit}/min" if rate < _SLOW else f"{rate:,.1f} {self._unit}/s"
        return (
            f"metalm: {self.what}: {self._shown(self._done)} of {self._shown(self._total)} {self._unit} "
            f"({self._done / self._total:.0%}), {speed}, {left} left"
        )

    def _bar(self, elapsed_s: float) -> str:
        if not self._total:
            return f"{self._line(elapsed_s)} {_SPINNER[int(elapsed_s / TERMINAL_EVERY_S) % len(_SPINNER)]}"
        filled = int(_BAR_WIDTH * self._done / self._total)
        return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self._line(elapsed_s)}"

    def _amount(self) -> str:
        return f"{self._shown(self._done)} {self._unit}, " if self._done else ""

    def _shown(self, work: float) -> str:
        """In units, of which parts are told where one is made of more than one piece of work."""
        return f"{work / self._scale:,.{0 if self._scale == 1 else 1}f}"


def _speaks() -> bool:
    """Whether this is the process that speaks for all: the first rank, and no worker."""
    return rank_of(os.environ) == 0 and parent_process() is None


def _write(text: str) -> None:
    with suppress(OSError):  # the terminal was closed: the work goes on
        sys.stderr.write(text)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
