"""Faults, set up in a rank before it starts: each makes one rank do what broken hardware would.

`python -m faults.injected JSON ARGUMENTS` is `metalm ARGUMENTS` with the fault `["name", {options}]`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metalm import cli
from metalm.checkpoint import manifest, reader
from metalm.errors import DataError
from metalm.tasks.data_files import DataFiles
from metalm.training import loop
from metalm.training.owned_ranges import owned_ranges, push_masters
from metalm.training.step import TrainStep
from metalm.training.stopping import StopRequest

_original_run = TrainStep.run


def not_a_number(rank: int, *, victim: int, first: int, last: int) -> None:
    """The victim's loss is no number in its calls `first` to `last` of the step, counted from 1."""

    def poison(number: int, step: TrainStep, batches: list[Any]) -> list[Any]:
        if rank != victim or not first <= number <= last:
            return batches
        mask = batches[0].loss_weights.clone()
        mask[0, 0] = math.nan
        return [replace(batches[0], loss_weights=mask), *batches[1:]]

    _before_each_step(poison)


def spike(rank: int, *, victim: int, number: int, factor: float) -> None:
    """The victim's decoder returns losses that are `factor` times too large in one step."""

    def disturb(call: int, step: TrainStep, batches: list[Any]) -> list[Any]:
        decoder = step._engines.decoder.module
        if rank == victim and call == number:
            decoder.register_forward_hook(lambda module, arguments, losses: losses * factor, prepend=True)
        elif rank == victim and call == number + 1:
            decoder._forward_hooks.popitem(last=False)
        return batches

    _before_each_step(disturb)


def poisoned(rank: int, *, number: int) -> None:
    """After a step that was taken, weights of the decoder are not numbers."""
    calls = 0

    def run(step: TrainStep, batches: list[Any], rate: float) -> Any:
        nonlocal calls
        calls += 1
        result = _original_run(step, batches, rate)
        if calls == number:
            _poison_weights(step)
        return result

    TrainStep.run = run


def _poison_weights(step: TrainStep) -> None:
    decoder = step._engines.decoder
    for _, _, owned in owned_ranges(decoder):
        owned.states["master"].detach()[:10] = math.nan
    push_masters(decoder)


def stopped_in_a_bad_stretch(rank: int, *, first: int, last: int) -> None:
    """Losses of steps `first` to `last` are no numbers, and in the last of them a rank is asked to stop."""
    not_a_number(rank, victim=0, first=first, last=last)
    stopped(rank, step=last)


def stopped(rank: int, *, step: int) -> None:
    """In a step, the first rank is asked to stop."""
    calls, is_asked = 0, StopRequest.is_asked

    def ask(request: StopRequest) -> bool:
        nonlocal calls
        calls += 1  # before every step
        return is_asked(request) or (rank == 0 and calls == step + 1)

    StopRequest.is_asked = ask


def asleep(rank: int, *, victim: int, number: int) -> None:
    """The victim never enters one step."""

    def sleep(call: int, step: TrainStep, batches: list[Any]) -> list[Any]:
        if rank == victim and call == number:
            time.sleep(10_000)
        return batches

    _before_each_step(sleep)


def late(rank: int, *, victim: int, seconds: float) -> None:
    """The victim's host is slow between steps."""
    is_asked = StopRequest.is_asked

    def slow(request: StopRequest) -> bool:
        if rank == victim:
            time.sleep(seconds)
        return is_asked(request)

    StopRequest.is_asked = slow


def corrupt_weight(rank: int, *, victim: int, number: int, parameter: str) -> None:
    """After a step, one bit of the victim's working copy of a decoder parameter is another."""

    def run(step: TrainStep, batches: list[Any], rate: float) -> Any:
        result = _original_run(step, batches, rate)
        if rank == victim and step._engines.decoder.global_steps == number:
            _flip_a_bit(dict(step._engines.decoder.module.named_parameters())[parameter].data)
        return result

    TrainStep.run = run


def corrupt_master(rank: int, *, victim: int, number: int, parameter: str) -> None:
    """Before a step, one bit of the victim's fp32 master of a decoder parameter is another."""

    def flip(call: int, step: TrainStep, batches: list[Any]) -> list[Any]:
        if rank == victim and call == number:
            weight: Any = dict(step._engines.decoder.module.named_parameters())[parameter]
            _flip_a_bit(weight._hp_mapping.get_hp_fragment().data)
        return batches

    _before_each_step(flip)


def slow_steps(rank: int, *, seconds: float) -> None:
    """Every step takes so much longer, that something can be done to the run meanwhile."""

    def wait(call: int, step: TrainStep, batches: list[Any]) -> list[Any]:
        time.sleep(seconds)
        return batches

    _before_each_step(wait)


def unreadable(rank: int, *, victim: int, part: str) -> None:
    """The victim may not read files of checkpoints whose path holds a word; all others may."""
    if rank != victim:
        return
    record_file, open_tensors = manifest.record_file, reader.safe_open

    def refuse_to_hash(path: Path) -> Any:
        if part in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return record_file(path)

    def refuse_to_open(path: Path, framework: str) -> Any:
        if part in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_tensors(path, framework)

    manifest.record_file = refuse_to_hash
    reader.safe_open = refuse_to_open


def readable_until_loaded(rank: int, *, victim: int, part: str) -> None:
    """As `unreadable`, but hashing works: the disk fails later."""
    record_file = manifest.record_file
    unreadable(rank, victim=victim, part=part)
    manifest.record_file = record_file


def tasks_unreadable(rank: int, *, victim: int, part: str) -> None:
    """The victim cannot read files of tasks whose name holds a word."""
    open_file = DataFiles.open

    def refuse(files: DataFiles, name: str) -> Any:
        if rank == victim and part in name:
            raise DataError(f"{files.folder / name} cannot be read: Stale file handle")
        return open_file(files, name)

    DataFiles.open = refuse


def _before_each_step(change: Callable[[int, TrainStep, list[Any]], list[Any]]) -> None:
    calls = 0

    def run(step: TrainStep, batches: list[Any], rate: float) -> Any:
        nonlocal calls
        calls += 1
        return _original_run(step, change(calls, step, batches), rate)

    assert loop.TrainStep is TrainStep
    TrainStep.run = run


def _flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.int32)[0] ^= 1 << 16


def main() -> None:
    name, options = json.loads(sys.argv.pop(1))
    globals()[name](int(os.environ["RANK"]), **options)
    sys.argv[0] = "metalm"
    cli.main()


if __name__ == "__main__":
    main()
