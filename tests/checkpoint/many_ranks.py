"""Checkpoints as a job of many ranks writes them, by the program's own code for one rank after the other."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metalm.checkpoint.format import STATES, ParameterIndex, piece_name
from metalm.checkpoint.publishing import begin_checkpoint
from metalm.checkpoint.state import EngineCounters, RunFacts, RunState, WrittenBy
from metalm.config import CheckpointConfig
from metalm.training.saving import SaveJob, Snapshot


class Place:
    """What saving asks of a topology."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.tensor_rank, self.tensor_size, self.data_rank, self.data_size = 0, 1, rank, world_size


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and size of a rank's part of a flat parameter, as ZeRO 3 partitions it."""
    part = -(-size // ranks)
    start = min(rank * part, size)
    return start, min(part, size - start)


def jobs_of(
    checkpoints: Path,
    step: int,
    ranks: int,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    lane_states: Mapping[int, Any],
    config: bytes = b"{}",
) -> list[SaveJob]:
    """The parts of all ranks of a checkpoint, each with its range of every parameter; the values count up.

    Args:
        shapes: of parameters, by component and name.
        lane_states: of all lanes, which the ranks have in equal parts.
        config: of the run.
    """
    partial = begin_checkpoint(checkpoints, step)
    components = tuple(shapes)
    state = RunState(
        **dict(RunFacts()),
        step=step,
        topology=WrittenBy(tensor=1, data=ranks),
        zero_stages=dict.fromkeys(components, 3),
        optimizer_steps=dict.fromkeys(components, float(step)),
        engine_counters=dict.fromkeys(components, EngineCounters(global_steps=step, skipped_steps=0)),
    )
    layouts = {
        component: {name: ParameterIndex(shape, None, 1, 1, ()) for name, shape in own.items()}
        for component, own in shapes.items()
    }
    sizes = {component: {n: one.layout.size for n, one in own.items()} for component, own in layouts.items()}
    jobs = []
    for rank in range(ranks):
        snapshots = {}
        for component in components:
            owned = {name: (0, *share(size, rank, ranks)) for name, size in sizes[component].items()}
            owned = {name: place for name, place in owned.items() if place[2]}
            tensors = {
                piece_name(name, state_name): torch.arange(start, start + size, dtype=torch.float32) + number
                for name, (_, start, size) in owned.items()
                for number, state_name in enumerate(STATES)
            }
            snapshots[component] = Snapshot(tensors, owned, {} if rank else layouts[component])
        first, last = rank * len(lane_states) // ranks, (rank + 1) * len(lane_states) // ranks
        states = {lane: lane_states[lane] for lane in range(first, last)}
        place: Any = Place(rank, ranks)
        jobs.append(SaveJob(partial, snapshots, states, state, place, config, CheckpointConfig()))
    return jobs


def write_checkpoint(jobs: list[SaveJob]) -> Path:
    """Write and publish it."""
    for job in jobs:
        job.write()
    jobs[0].publish(threading.Event())
    return jobs[0].folder


def as_before(folder: Path, component: str) -> None:
    """Put a component's index into the form of version 1, an object for each piece; the manifest is left."""
    from metalm.checkpoint.format import INDEX_NAME, read_index

    entries = {
        name: {
            "shape": index.shape,
            "partition_dim": index.partition_dim,
            "partition_stride": index.partition_stride,
            "tensor_size": index.tensor_size,
            "pieces": [vars(piece) for piece in index.pieces],
            "states": index.states,
        }
        for name, index in read_index(folder / component).items()
    }
    (folder / component / INDEX_NAME).write_text(json.dumps({"version": 1, "parameters": entries}))
