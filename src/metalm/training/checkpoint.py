"""Save and restore a run: every rank writes what it owns, and reads what it needs, on any layout."""

from __future__ import annotations

import fnmatch
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.checkpoint.folders import find_checkpoint, list_checkpoints, step_folder
from metalm.checkpoint.format import STATES
from metalm.checkpoint.layout import ShardLayout
from metalm.checkpoint.manifest import LATEST_NAME, PARTIAL_SUFFIX, check_files, read_manifest
from metalm.checkpoint.reader import CONFIG_NAME, CheckpointReader, read_json
from metalm.config import RunConfig
from metalm.errors import CheckpointError, FaultError
from metalm.model.image_positions import fit_image_positions
from metalm.parallel.sharding import sharding_of, whole_shape
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from metalm.training.pieces import (
    kept_ranges,
    optimizer_step,
    push_masters,
    set_optimizer_step,
    set_state,
    shard_shape,
)
from metalm.training.saving import DATA_FOLDER, HostBuffers, RunningSave, SaveJob

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The `checkpoints` folder of a run, as the ranks write and read it together."""

    def __init__(self, run_folder: Path, config: RunConfig, topology: Topology) -> None:
        self._folder = run_folder / "checkpoints"
        self._run_config = run_folder / CONFIG_NAME
        self._config = config.checkpoint
        self._topology = topology
        self._buffers = HostBuffers()
        self._running: RunningSave | None = None

    def save(
        self,
        engines: Engines,
        step: int,
        lane_states: Mapping[int, Any] | None,
        facts: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> str | None:
        """Write and publish the checkpoint of a step, then remove those that need not be kept.

        Args:
            engines: their masters and optimizer states are saved.
            step: optimizer steps done.
            lane_states: of this rank's data lanes, by lane; None on ranks that read no data.
            facts: further content of `state.json`, as the first rank has it.
            background: return once the state is copied to host memory. A failure is then told by
                `has_failed` and `finish`, and the training need not end for it.

        Returns:
            What became wrong of a save that was still running, None if all is well.

        Raises:
            FaultError: this save failed; on all ranks alike, and never in the background.

        Collective: all ranks.
        """
        earlier = self.finish()
        topology = self._topology
        folder = step_folder(self._folder, step)
        partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
        if topology.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        components = engines.by_component()
        job = SaveJob(
            partial=partial,
            snapshots={
                name: self._buffers.snapshot(engine, name, topology) for name, engine in components.items()
            },
            lane_states=lane_states,
            state=self._state(engines, step, facts),
            topology=topology,
            run_config=self._run_config,
            keep=self._config,
        )
        if topology.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copies to pinned memory
        self._running = RunningSave(job)
        if not background and (problem := self.finish()):
            raise FaultError(problem)
        return earlier

    def has_failed(self) -> bool:
        """Whether this rank knows that the save in the background failed. Does not wait."""
        return self._running is not None and self._running.has_failed()

    def finish(self) -> str | None:
        """Wait until no save is running.

        Returns:
            What went wrong, on all ranks alike; None if all is well or nothing was running.

        Collective: all ranks.
        """
        running, self._running = self._running, None
        if running is None:
            return None
        problem = self._first_problem(running.wait_written())
        if problem is None:
            problem = self._first_problem(running.wait_published())
        if problem is None:
            logger.info("saved %s in %.1f s", running.job.folder, running.close())
            return None
        running.abandon()
        dist.barrier()
        return f"checkpoint {running.job.folder} could not be saved: {problem}"

    def close(self) -> None:
        """Give up a save that is still running, because the run ends otherwise than planned."""
        running, self._running = self._running, None
        if running is not None:
            running.abandon()

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files are as its manifest says; damaged ones are named in the log.

        The ranks share the hashing.

        Raises:
            CheckpointError: there are checkpoints, but none is whole; or there is none, although
                `latest` names one or `checkpoint.resume` is `required`.

        Collective: all ranks.
        """
        published = list_checkpoints(self._folder)
        for folder in reversed(published):
            problems = self._check(folder)
            if not problems:
                return folder
            logger.warning("checkpoint %s is passed over: %s", folder, "; ".join(problems))
        if published:
            raise CheckpointError(
                f"none of the {len(published)} checkpoint(s) in {self._folder} is whole; "
                "remove the folder to start from scratch"
            )
        latest = self._folder / LATEST_NAME
        if latest.exists():
            raise CheckpointError(
                f"{latest} names {latest.read_text().strip()}, but there is no checkpoint; "
                f"remove {latest} to start from scratch"
            )
        if self._config.resume == "required":
            raise CheckpointError(
                f"there is no checkpoint in {self._folder}, and checkpoint.resume is `required`"
            )
        return None

    def load(self, folder: Path, engines: Engines) -> dict[str, Any]:
        """Restore weights and optimizers, and answer the saved state (`state.json`).

        Moments that the checkpoint has not, because it was made from weights alone, start from zero.

        Raises:
            CheckpointError: the checkpoint does not fit the model.

        Collective: all ranks.
        """
        reader = CheckpointReader(folder)
        for component, engine in engines.by_component().items():
            layouts = self._layouts(engine)
            _compare(reader, component, layouts)
            self._read_component(reader, component, engine, layouts, STATES)
            set_optimizer_step(engine, reader.state["optimizer_steps"][component])
            counters = reader.state["engine_counters"][component]
            engine.global_steps, engine.skipped_steps = counters["global_steps"], counters["skipped_steps"]
        self._tell_reading(reader)
        return reader.state

    def initialize(self, path: Path, component: str, engines: Engines, new: Sequence[str]) -> None:
        """Take one component's weights from another run's checkpoint; the optimizer starts afresh.

        Args:
            path: a checkpoint, or a run folder, whose newest is meant.
            component: `decoder` or `encoders`.
            engines: of this run, freshly built.
            new: patterns of parameter names that the checkpoint may lack: they keep their own start.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit.

        Collective: all ranks.
        """
        engine = engines.by_component().get(component)
        if engine is None:
            raise CheckpointError(f"the model has no {component} to start from {path}")
        folder = find_checkpoint(path)
        if problems := self._check(folder):
            raise CheckpointError(
                "\n".join([f"checkpoint {folder} is damaged", *(f"  {problem}" for problem in problems)])
            )
        reader = CheckpointReader(folder)
        layouts = self._layouts(engine)
        own_start = [
            name
            for name in layouts.keys() - reader.parameters(component).keys()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in new)
        ]
        for name in own_start:
            del layouts[name]
        unused = reader.parameters(component).keys() - layouts.keys()
        if unused:
            logger.warning("%d parameter(s) of %s are not used, such as %s", len(unused), folder, min(unused))
        fitted = _fit_positions(reader, component, layouts)
        _compare(
            reader,
            component,
            {n: layout for n, layout in layouts.items() if n not in fitted},
            [*unused, *fitted],
        )
        self._read_component(reader, component, engine, layouts, STATES[:1], fitted)
        self._tell_reading(reader)

    def lane_states(self, folder: Path) -> dict[int, Any]:
        """The data lanes' states, of all ranks that wrote the checkpoint."""
        states: dict[int, Any] = {}
        for path in sorted((folder / DATA_FOLDER).glob("lanes_*.json")):
            states |= {int(lane): state for lane, state in read_json(path).items()}
        return states

    def _state(self, engines: Engines, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        topology, components = self._topology, engines.by_component()
        return {
            "step": step,
            **facts,
            "topology": {"tensor": topology.tensor_size, "data": topology.data_size},
            "zero_stages": {name: engine.zero_optimization_stage() for name, engine in components.items()},
            "optimizer_steps": {name: optimizer_step(engine) for name, engine in components.items()},
            "engine_counters": {
                name: {"global_steps": engine.global_steps, "skipped_steps": engine.skipped_steps}
                for name, engine in components.items()
            },
        }

    def _check(self, folder: Path) -> list[str]:
        try:
            files = sorted(read_manifest(folder).items())
            problems = check_files(folder, files[self._topology.rank :: self._topology.world_size])
        except CheckpointError as error:
            problems = [str(error)]
        found: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(found, problems)
        return sorted({problem for part in found for problem in part})

    def _first_problem(self, own: str | None) -> str | None:
        """The first rank's problem that has one, so that all ranks act alike."""
        told: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(told, own)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None), None)

    def _layouts(self, engine: Any) -> dict[str, ShardLayout]:
        """How this run cuts each parameter over its TP group."""
        layouts = {}
        for name, parameter in engine.module.named_parameters():
            sharding = sharding_of(parameter)
            shape = whole_shape(shard_shape(engine, parameter), sharding, self._topology.tensor_size)
            layouts[name] = (
                ShardLayout(shape)
                if sharding is None
                else ShardLayout(shape, sharding.dimension, sharding.stride, self._topology.tensor_size)
            )
        return layouts

    def _read_component(
        self,
        reader: CheckpointReader,
        component: str,
        engine: Any,
        layouts: Mapping[str, ShardLayout],
        states: Sequence[str],
        fitted: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Read the ranges that this rank keeps of these parameters, but for those given whole in `fitted`."""
        for name, parameter, owned in kept_ranges(engine):
            layout = layouts.get(name)
            if layout is None:
                continue
            if fitted and name in fitted:
                values = fitted[name].flatten()[owned.start : owned.start + owned.size]
                set_state(engine, parameter, "master", values.to(self._topology.device))
                continue
            tensor_rank = 0 if layout.dimension is None else self._topology.tensor_rank
            saved = reader.states(component, name)
            for state in (state for state in states if state in owned.states):
                values = (
                    reader.read_range(component, name, state, layout, tensor_rank, owned.start, owned.size)
                    if state in saved
                    else torch.zeros(owned.size)
                )
                set_state(engine, parameter, state, values.to(self._topology.device))
        push_masters(engine)

    def _tell_reading(self, reader: CheckpointReader) -> None:
        logger.info("read %.1f MiB of tensors from %s", reader.bytes_read / 2**20, reader.folder)
        reader.close()


def _fit_positions(
    reader: CheckpointReader, component: str, layouts: Mapping[str, ShardLayout]
) -> dict[str, Tensor]:
    """Positions of image patches, whole, of a model whose images have another resolution."""
    saved = reader.parameters(component)
    return {
        name: fit_image_positions(reader.read(component, name), layout.shape[0])
        for name, layout in layouts.items()
        if name.endswith("image_positions.weight") and name in saved and saved[name][0] != layout.shape[0]
    }


def _compare(
    reader: CheckpointReader,
    component: str,
    layouts: Mapping[str, ShardLayout],
    unused: Collection[str] = (),
) -> None:
    """Refuse a checkpoint whose parameters are not the model's, but for those that are left unused."""
    saved = reader.parameters(component)
    if missing := layouts.keys() - saved.keys():
        raise CheckpointError(f"{reader.folder} lacks {len(missing)} parameter(s), such as {min(missing)}")
    if unknown := saved.keys() - layouts.keys() - set(unused):
        raise CheckpointError(f"{reader.folder} holds {min(unknown)}, which the model has not")
    for name, layout in layouts.items():
        if layout.shape != saved[name]:
            raise CheckpointError(
                f"{component}.{name} is {list(saved[name])} in {reader.folder}, "
                f"the model needs {list(layout.shape)}"
            )
