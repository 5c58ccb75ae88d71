"""What the guard has decided of steps, read on the host without waiting for a step that runs.

A verdict is copied to pinned host memory when its step is queued, and read when the next step is: by then the
device has long made it. So a refused step is told one step later; but once one is known, those after it are
waited for, so that nothing but the telling comes later. What is read when follows from the steps and verdicts
alone, and so is the same on all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.training.guards import FINE


@dataclass(frozen=True)
class Judged:
    """A step that the guard has judged."""

    step: int
    is_refused: bool
    judged: tuple[Tensor, ...]
    """For `StepGuard.explain`."""


@dataclass(frozen=True)
class _Pending:
    step: int
    verdict: Tensor
    """In host memory, once `is_copied`."""
    is_copied: torch.cuda.Event | None
    judged: tuple[Tensor, ...]


class Verdicts:
    """Of the steps that were queued and not yet told, oldest first."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()
        self._was_refused = False

    def add(self, step: int, verdict: Tensor, judged: tuple[Tensor, ...]) -> None:
        """Begin to read a step's verdict, an int64 device scalar."""
        event = None
        if verdict.is_cuda:
            copy = torch.empty((), dtype=verdict.dtype, pin_memory=True).copy_(verdict, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            copy = verdict.clone()
        self._pending.append(_Pending(step, copy, event, judged))

    def read(self, *, everything: bool = False) -> Iterator[Judged]:
        """What is known of steps not yet told: of all but the last one, unless one before was refused.

        Args:
            everything: of the last one, too, which waits for it.
        """
        while len(self._pending) > (0 if everything or self._was_refused else 1):
            pending = self._pending.popleft()
            if pending.is_copied is not None:
                pending.is_copied.synchronize()
            self._was_refused = bool(pending.verdict.numpy() != FINE)
            yield Judged(pending.step, self._was_refused, pending.judged)

    def forget(self) -> None:
        """The run goes back: what was not told is of steps that are done again."""
        self._pending.clear()
        self._was_refused = False
