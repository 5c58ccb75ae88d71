"""Processes that evaluate one exported folder together: each has the whole model, and answers its share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from metalm.errors import ConfigError
from metalm.parallel.launch import Launch

Value = TypeVar("Value")
_SLOWEST = timedelta(hours=12)
"""One may wait so long for the answers of another; one that has died is noticed at once."""


@dataclass(frozen=True)
class Peers:
    """This process among those that evaluate together."""

    rank: int = 0
    size: int = 1

    def agreed(self, value: Value) -> Value:
        """The first one's value, in all. Collective."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all, by rank. Collective."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(launch: Launch) -> Iterator[Peers]:
    """Join the processes of a launch, over the host: models are on a device each, and only answers travel."""
    if launch.world_size == 1:
        yield Peers()
        return
    os.environ.update(launch.environment())
    dist.init_process_group("gloo", rank=launch.rank, world_size=launch.world_size, timeout=_SLOWEST)
    yield Peers(launch.rank, launch.world_size)
    dist.destroy_process_group()  # not after an error, which the first process tells for all that have joined


def device_of(name: str, launch: Launch) -> str:
    """The device of a process: of `cuda`, each its own GPU.

    Raises:
        ConfigError: there is no such device, or not one for each process.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: {error}") from None
    if device.type != "cuda":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter of back ends that are not in this build
            raise ConfigError(f"--device {name} cannot be used here: {error}") from None
        return name
    if launch.world_size > 1 and device.index is not None:
        raise ConfigError(
            f"--device {name} with {launch.world_size} processes: give --device cuda, one GPU each"
        )
    index = launch.local_rank if device.index is None else device.index
    if index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: GPU {index} is wanted, this machine has {count}")
    return f"cuda:{index}"
