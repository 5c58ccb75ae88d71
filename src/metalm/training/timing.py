"""Where the time of a step goes, without waiting for the device in the step.

On CUDA a part is between two events in the stream, which are read when a line is logged; on CPU between two
readings of the clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Mark = float | torch.cuda.Event


class PartTimer:
    """Seconds of the parts of steps since the last reading, on this rank."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside, and what it queues on the current stream, to a part."""
        first = self._mark()
        yield
        self._spans.append((name, first, self._mark()))

    def read(self) -> dict[str, float]:
        """Seconds by part, and start anew. On CUDA it waits for what was queued."""
        seconds: dict[str, float] = defaultdict(float)
        for name, first, last in self._spans:
            seconds[name] += _between(first, last)
        self._spans = []
        return dict(seconds)

    def _mark(self) -> Mark:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(first: Mark, last: Mark) -> float:
    if isinstance(first, float):
        assert isinstance(last, float)
        return last - first
    assert not isinstance(last, float)
    last.synchronize()
    return first.elapsed_time(last) / 1000
