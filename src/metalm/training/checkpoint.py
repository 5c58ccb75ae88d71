"""The checkpoints of a run, as its ranks write and choose them together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from metalm.checkpoint.folders import find_checkpoint, remove_later, set_aside
from metalm.checkpoint.manifest import check_files, read_manifest
from metalm.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints, partial_folder, step_of
from metalm.checkpoint.publishing import begin_checkpoint
from metalm.checkpoint.reader import CheckpointReader, damaged, is_lane_file, read_lane_states
from metalm.checkpoint.state import EngineCounters, RunFacts, RunState, WrittenBy
from metalm.config import RunConfig, config_content
from metalm.errors import CheckpointError, FaultError
from metalm.parallel.agreement import together
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from metalm.training.going_on import require_to_begin
from metalm.training.owned_ranges import optimizer_step
from metalm.training.provenance import provenance
from metalm.training.saving import HostBuffers, RunningSave, SaveJob
from metalm.training.weights import restore

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointStore:
    """The `checkpoints` folder of a run, as the ranks write and read it together."""

    def __init__(self, run_folder: Path, config: RunConfig, topology: Topology) -> None:
        self._folder = run_folder / CHECKPOINTS_NAME
        self._run_config = config
        self._topology = topology
        self._buffers = HostBuffers()
        self._running: RunningSave | None = None
        self._unbegun: str | None = None
        """What kept the last save from beginning, until it is reported."""
        self._damaged: list[Path] = []
        """What `newest_whole` has passed over."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that looks for what all ranks would find alike."""
        return self._topology.rank == 0

    def save(
        self,
        engines: Engines,
        step: int,
        lane_states: Mapping[int, Any] | None,
        facts: RunFacts,
        *,
        background: bool = False,
    ) -> str | None:
        """Write and publish the checkpoint of a step, then remove those that need not be kept.

        Args:
            engines: their masters and optimizer states are saved.
            step: optimizer steps done.
            lane_states: of this rank's data lanes, by lane; None on ranks that read no data.
            facts: what the run knows of itself, as the first rank has it.
            background: return once the state is copied to host memory. A failure is then reported by
                `has_failed` and `finish`, and the training need not end for it.

        Returns:
            What became wrong of a save that was still running, None if all is well.

        Raises:
            FaultError: this save failed; on all ranks alike, and never in the background.

        Collective: all ranks.
        """
        earlier = self.finish()
        topology = self._topology
        problem = None
        if topology.rank == 0:
            try:
                begin_checkpoint(self._folder, step)
            except OSError as error:
                problem = str(error)
        partial = partial_folder(self._folder, step)
        if problem := self._first_problem(problem):
            self._unbegun = f"checkpoint {partial} could not be begun: {problem}"
            if not background:
                raise FaultError(self._unbegun)
            return earlier
        components = engines.by_component()
        job = SaveJob(
            partial=partial,
            snapshots={
                name: self._buffers.snapshot(engine, name, topology) for name, engine in components.items()
            },
            lane_states=lane_states,
            state=self._state(engines, step, facts),
            topology=topology,
            config=config_content(self._run_config, provenance()) if topology.rank == 0 else b"",
            keep=self._run_config.checkpoint,
        )
        if topology.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copies to pinned memory
        self._running = RunningSave(job)
        if not background and (problem := self.finish()):
            raise FaultError(problem)
        return earlier

    def has_failed(self) -> bool:
        """Whether this rank knows that the save in the background failed. Does not wait."""
        return self._unbegun is not None or (self._running is not None and self._running.has_failed())

    def finish(self) -> str | None:
        """Wait until no save is running.

        Returns:
            What went wrong, on all ranks alike; None if all is well or nothing was running.

        Collective: all ranks.
        """
        running, self._running = self._running, None
        unbegun, self._unbegun = self._unbegun, None
        if running is None:
            return unbegun
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

    def newest_whole(self, *, before: int | None = None) -> Path | None:
        """The newest checkpoint that can be read and whose files are as its manifest says.

        Damaged ones are named in the log. The ranks share the hashing.

        Args:
            before: only of those of earlier steps than this, where there may be none; None: of all.

        Raises:
            CheckpointError: of all, there are checkpoints, but none is whole; or there is none, although
                there is a file `latest` or `checkpoint.resume` is `required`.

        Collective: all ranks.
        """
        published = self._as_first(list_checkpoints(self._folder))
        if before is not None:
            published = [folder for folder in published if step_of(folder) < before]
        self._damaged = []
        for folder in reversed(published):
            problems = self.check(folder)
            if not problems:
                return folder
            logger.warning("checkpoint %s is passed over: %s", folder, "; ".join(problems))
            self._damaged.append(folder)
        if before is not None:
            return None
        if published:
            raise CheckpointError(
                f"none of the {len(published)} checkpoint(s) in {self._folder} is whole; "
                "remove the folder to start from scratch"
            )
        with together():
            if self.is_first:
                require_to_begin(self._folder, self._run_config)
        return None

    def remove_later(self, step: int) -> None:
        """Remove the checkpoints of later steps, which the run has given up: no start is to take one.

        Raises:
            FaultError: one could not be removed; on all ranks alike.

        Collective: all ranks.
        """
        with together():
            if not self.is_first:
                return
            try:
                for folder in remove_later(self._folder, step):
                    logger.warning("checkpoint %s is removed: the run has gone back to step %d", folder, step)
            except OSError as error:
                raise FaultError(
                    f"a checkpoint later than step {step} could not be removed: {error}"
                ) from None

    def set_aside_damaged(self) -> None:
        """Rename what `newest_whole` has passed over: the run goes on from an earlier one.

        The first rank calls it, once the start is accepted.
        """
        damaged, self._damaged = self._damaged, []
        for folder in damaged:
            set_aside(folder)

    def find_whole(self, path: Path) -> Path:
        """The checkpoint of any run that a path means, hashed; see `find_checkpoint`.

        Raises:
            CheckpointError: there is none, or it is damaged.

        Collective: all ranks.
        """
        with together():
            folder = find_checkpoint(path) if self._topology.rank == 0 else path
        folder = self._as_first(folder)
        if problems := self.check(folder):
            raise damaged(folder, problems)
        return folder

    def check(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, one line each, the same on all ranks.

        Collective: all ranks.
        """
        try:
            files = sorted(read_manifest(folder).items())[self._topology.rank :: self._topology.world_size]
            problems = check_files(folder, files)
            if not problems:
                for name in (name for name, _ in files if is_lane_file(name)):
                    read_lane_states(folder / name)
                if self._topology.rank == 0:
                    CheckpointReader(folder)
        except CheckpointError as error:
            problems = [str(error)]
        found: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(found, problems)
        return sorted({problem for part in found for problem in part})

    def load(self, folder: Path, engines: Engines) -> RunState:
        """Restore weights and optimizers, and answer the saved state; see `restore`.

        Raises:
            CheckpointError: the checkpoint does not fit the model.

        Collective: all ranks.
        """
        reader = self.open(folder)
        restore(reader, engines, self._topology)
        return reader.state

    def open(self, folder: Path) -> CheckpointReader:
        """A reader of a checkpoint.

        Raises:
            CheckpointError: one of the ranks cannot read it.

        Collective: all ranks.
        """
        with together():
            return CheckpointReader(folder)

    def _as_first(self, own: T) -> T:
        """What the first rank has found: a network file system may show others less."""
        found = [own]
        dist.broadcast_object_list(found)
        return found[0]

    def _state(self, engines: Engines, step: int, facts: RunFacts) -> RunState:
        topology, components = self._topology, engines.by_component()
        return RunState(
            **dict(facts),
            step=step,
            topology=WrittenBy(
                tensor=topology.tensor_size, context=topology.context_size, data=topology.data_size
            ),
            zero_stages={name: engine.zero_optimization_stage() for name, engine in components.items()},
            optimizer_steps={name: optimizer_step(engine) for name, engine in components.items()},
            engine_counters={
                name: EngineCounters(global_steps=engine.global_steps, skipped_steps=engine.skipped_steps)
                for name, engine in components.items()
            },
        )

    def _first_problem(self, own: str | None) -> str | None:
        """The first rank's problem that has one, so that all ranks act alike."""
        found: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(found, own)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None), None)
