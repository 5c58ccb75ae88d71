"""End a run in which nothing happens any more, and leave behind what each rank was doing."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from metalm.errors import EXIT_FAULT
from metalm.run_ends import record_end

_GRACE_S = 10.0
"""To write the stacks, and then for the other ranks to, before a launcher ends them for this rank's exit."""


class Watchdog:
    """A thread that ends this process with EXIT_FAULT when `beat` is not called for too long.

    A rank that waits in a collective for another one hangs just like that other one does. So every
    rank's watchdog barks, and the stacks of all ranks are in the logs.
    """

    def __init__(self, log_folder: Path, rank: int, limit_minutes: float) -> None:
        """Start watching.

        Args:
            log_folder: gets `stacks_rank_N.txt`.
            rank: of this process.
            limit_minutes: longest time between two beats.
        """
        self._run_folder = log_folder.parent
        self._stacks = log_folder / f"stacks_rank_{rank:05d}.txt"
        self._rank, self._limit_s = rank, 60.0 * limit_minutes
        self._doing, self._last = "starting", time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Say that the run is alive, and what it does next."""
        self._doing, self._last = doing, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit_s / 4)):
            silent_s = time.monotonic() - self._last
            if silent_s > self._limit_s:
                self._bark(silent_s)

    def _bark(self, silent_s: float) -> None:
        message = f"rank {self._rank} has hung for {silent_s:.0f} s while {self._doing}"
        # Storage that hangs is what a run hangs for, too: whatever becomes of the notes, the process ends.
        notes = threading.Thread(target=self._leave_behind, args=(message,), daemon=True)
        notes.start()
        notes.join(_GRACE_S)
        time.sleep(_GRACE_S)
        os._exit(EXIT_FAULT)

    def _leave_behind(self, message: str) -> None:
        print(f"metalm: {message}; stacks go to {self._stacks}", file=sys.stderr, flush=True)
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)  # a run may hang before it begins to write
            with self._stacks.open("w") as handle:
                handle.write(message + "\n")
                handle.flush()
                faulthandler.dump_traceback(handle, all_threads=True)
            if self._rank == 0:
                record_end(self._run_folder, None, EXIT_FAULT, message)
        except OSError as error:
            print(f"metalm: they cannot be written: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
