"""A moving average of the weights: one more state of the optimizer, updated beside it and never trained on.

Each rank averages the fp32 masters that it owns, so nothing is communicated, and checkpoints keep the average
as they keep Adam's moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from metalm.config import AverageConfig
from metalm.training.engines import Engines
from metalm.training.owned_ranges import averaged_masters, push_masters

_CHUNK = 2**24
"""Elements that are swapped at once: the memory that this needs."""


def average_decay(step: int, config: AverageConfig) -> float:
    """What optimizer step `step` (the first is 1) leaves of the average; see `AverageConfig.decay`."""
    return min(config.decay, (1 + step) / (10 + step))


def begin_average(engines: Engines) -> None:
    """Have the average, if the engines keep one, begin at the weights as they are."""
    for engine in engines.trained().values():
        for master, average in averaged_masters(engine):
            average.copy_(master)


def update_average(engines: Engines, decay: float, is_taken: Tensor | None = None) -> None:
    """Take the weights of a step into the average.

    Args:
        is_taken: a flag on the device; where it is not set, the average stays as it is.
    """
    share: float | Tensor = 1.0 - decay
    for engine in engines.trained().values():
        for master, average in averaged_masters(engine):
            if is_taken is not None:
                share = torch.where(is_taken, 1.0 - decay, 0.0).to(average.device, average.dtype)
            average.lerp_(master, share)


@contextmanager
def averaged(engines: Engines) -> Iterator[None]:
    """The engines with the average for their weights within.

    Collective: all ranks.
    """
    _swap(engines)
    yield  # an error within ends the run: the ranks could not swap back together
    _swap(engines)


def _swap(engines: Engines) -> None:
    for engine in engines.trained().values():
        for master, average in averaged_masters(engine):
            for one, other in zip(master.split(_CHUNK), average.split(_CHUNK), strict=True):
                held = one.clone()
                one.copy_(other)
                other.copy_(held)
        push_masters(engine)
