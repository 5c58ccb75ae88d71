"""Write one checkpoint: snapshot what this rank owns, write it beside the training, publish it once.

The ranks meet in the checkpoint's partial folder, not in a collective: each writes its files and then a
record of them, and the first rank publishes when every record is there. So nothing here communicates
while the training does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalm.checkpoint.folders import prune_checkpoints
from metalm.checkpoint.format import ParameterIndex, Pieces, piece_name, rank_file
from metalm.checkpoint.manifest import FileRecord, remove
from metalm.checkpoint.names import PARTIAL_SUFFIX
from metalm.checkpoint.publishing import complete_checkpoint, write_json
from metalm.checkpoint.reader import DATA_FOLDER, read_json
from metalm.checkpoint.state import RunState
from metalm.checkpoint.writer import write_tensors
from metalm.config import CheckpointConfig
from metalm.errors import CheckpointError
from metalm.parallel.sharding import sharding_of
from metalm.parallel.topology import Topology
from metalm.regular_files import force
from metalm.training.owned_ranges import owned_ranges, shard_layouts, states_of

logger = logging.getLogger(__name__)

_POLL_S = 0.05


class Abandoned(Exception):
    """Another rank could not write its part."""


@dataclass
class Snapshot:
    """What this rank owns of one component, in host memory."""

    tensors: dict[str, Tensor]
    """float32, by `PARAMETER|STATE`."""
    owned: dict[str, tuple[int, int, int]]
    """Of each parameter that this rank has a range of: whose tensor-parallel shard it is of, start, size."""
    layouts: dict[str, ParameterIndex]
    """Of all parameters, without pieces; on the first rank, which writes the index."""


class HostBuffers:
    """Host memory that one snapshot after another is taken into; pinned beside a CUDA device."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def snapshot(self, engine: Any, component: str, topology: Topology) -> Snapshot:
        """Copy the masters and moments that this rank owns."""
        taken = Snapshot({}, {}, _layouts(engine, topology) if topology.rank == 0 else {})
        for name, parameter, owned in owned_ranges(engine):
            sharding = sharding_of(parameter)
            if component == "decoder" and sharding is None and topology.tensor_rank > 0:
                continue  # replicated: the first tensor rank writes it
            tensor_rank = 0 if sharding is None else topology.tensor_rank
            taken.owned[name] = (tensor_rank, owned.start, owned.size)
            for state, tensor in owned.states.items():
                key = piece_name(name, state)
                taken.tensors[key] = self._copy((component, key), tensor)
        return taken

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape:
            buffer = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)


@dataclass(frozen=True)
class SaveJob:
    """One checkpoint in the making, as this rank sees it."""

    partial: Path
    snapshots: Mapping[str, Snapshot]
    lane_states: Mapping[int, Any] | None
    """Of this rank's lanes; None where another rank with the same rows has them."""
    state: RunState
    topology: Topology
    config: bytes
    """Of the run, as YAML."""
    keep: CheckpointConfig

    @property
    def folder(self) -> Path:
        """What it is called when it is published."""
        return self.partial.with_name(self.partial.name.removesuffix(PARTIAL_SUFFIX))

    def write(self) -> None:
        """Write this rank's files, and then their record.

        Raises:
            OSError: a file could not be written.
        """
        written: dict[str, FileRecord] = {}
        for component, snapshot in self.snapshots.items():
            (self.partial / component).mkdir(exist_ok=True)
            if snapshot.tensors:
                name = f"{component}/{rank_file(self.topology.rank)}"
                written[name] = write_tensors(self.partial / name, snapshot.tensors)
        if self.lane_states is not None:
            name = f"{DATA_FOLDER}/lanes_{self.topology.data_rank:05d}.json"
            (self.partial / DATA_FOLDER).mkdir(exist_ok=True)
            written[name] = write_json(self.partial / name, self.lane_states)
        for folder in {(self.partial / name).parent for name in written}:
            force(folder)
        record = {
            "files": {name: asdict(entry) for name, entry in written.items()},
            "owned": {component: snapshot.owned for component, snapshot in self.snapshots.items()},
        }
        path = _record_path(self.partial, self.topology.rank)
        write_json(path.with_suffix(PARTIAL_SUFFIX), record)
        path.with_suffix(PARTIAL_SUFFIX).replace(path)

    def publish(self, abandoned: threading.Event) -> None:
        """Wait for the records of all ranks and publish the checkpoint. The first rank calls it.

        Raises:
            OSError: a file could not be written.
            Abandoned: the event was set.
        """
        files: dict[str, FileRecord] = {}
        ranges: dict[str, dict[str, list[tuple[int, ...]]]] = {
            component: {name: [] for name in snapshot.layouts}
            for component, snapshot in self.snapshots.items()
        }
        for rank in range(self.topology.world_size):
            path = _record_path(self.partial, rank)
            while not path.exists():
                if abandoned.wait(_POLL_S):
                    raise Abandoned
            record = read_json(path)
            files |= {name: FileRecord(**entry) for name, entry in record["files"].items()}
            for component, owned in record["owned"].items():
                for name, own in owned.items():
                    ranges[component][name].append((rank, *own))
            path.unlink()
        names = [rank_file(rank) for rank in range(self.topology.world_size)]
        indices = {
            component: {
                name: replace(layout, pieces=Pieces(names, *zip(*ranges[component][name], strict=True)))
                for name, layout in snapshot.layouts.items()
            }
            for component, snapshot in self.snapshots.items()
        }
        complete_checkpoint(self.partial, files, indices, self.state, self.config)
        try:
            keep = self.keep
            prune_checkpoints(self.folder.parent, keep.keep_last, keep.keep_every_steps, whole=self.folder)
        except OSError as error:
            logger.warning("old checkpoints could not be removed: %s", error)


class RunningSave:
    """A job at work on threads of its own."""

    def __init__(self, job: SaveJob) -> None:
        self.job = job
        self._began = time.perf_counter()
        self._abandoned = threading.Event()
        # A rank's own part ends first; waiting for the others' must not hold up knowing that it failed.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        self._written = self._pool.submit(job.write)
        self._published: Future[None] | None = None
        if job.topology.rank == 0:
            self._published = self._pool.submit(job.publish, self._abandoned)

    def has_failed(self) -> bool:
        """Whether this rank's part has failed by now. Does not wait."""
        parts = (self._written, self._published)
        return any(part is not None and part.done() and part.exception() is not None for part in parts)

    def wait_written(self) -> str | None:
        """Wait for this rank's own part; answer what went wrong."""
        return _problem(self._written)

    def wait_published(self) -> str | None:
        """Wait for the publication; answer what went wrong. Nothing to wait for but on the first rank."""
        return None if self._published is None else _problem(self._published)

    def abandon(self) -> None:
        """Give the checkpoint up and remove what there is of it on the first rank."""
        self._abandoned.set()
        self._pool.shutdown(wait=True)
        if self.job.topology.rank == 0:
            with suppress(OSError):  # it is in nobody's way: the next save of this step removes it
                remove(self.job.partial)

    def close(self) -> float:
        """End the threads; answer the seconds since the job began."""
        self._pool.shutdown(wait=True)
        return time.perf_counter() - self._began


def _problem(part: Future[None]) -> str | None:
    error = part.exception()
    if error is not None and not isinstance(error, OSError | CheckpointError | Abandoned):
        raise error
    return None if error is None else str(error)


def _layouts(engine: Any, topology: Topology) -> dict[str, ParameterIndex]:
    """How every parameter of a component is cut, and what is kept of it."""
    cut, states = shard_layouts(engine, topology), states_of(engine)
    return {
        name: ParameterIndex(
            shape=cut[name].shape,
            partition_dim=cut[name].dimension,
            partition_stride=cut[name].stride,
            tensor_size=cut[name].tensor_size,
            pieces=(),
            states=states if parameter.requires_grad else states[:1],
        )
        for name, parameter in engine.module.named_parameters()
    }


def _record_path(partial: Path, rank: int) -> Path:
    return partial / f"written_{rank:05d}.json"
