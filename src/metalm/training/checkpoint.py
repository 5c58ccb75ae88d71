"""Save and restore a run: every rank writes what it owns, and reads what it needs, on any layout."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from metalm.checkpoint.folders import list_checkpoints, prune_checkpoints, step_folder
from metalm.checkpoint.format import STATES, ParameterIndex, Piece, piece_name, rank_file, write_index
from metalm.checkpoint.manifest import (
    PARTIAL_SUFFIX,
    FileRecord,
    check_files,
    publish,
    read_manifest,
    record_file,
    write_manifest,
)
from metalm.checkpoint.reader import CONFIG_NAME, STATE_NAME, CheckpointReader, read_json
from metalm.config import RunConfig
from metalm.errors import CheckpointError
from metalm.parallel.sharding import cut_shard, sharding_of, whole_shape
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from metalm.training.pieces import (
    optimizer_step,
    owned_ranges,
    push_masters,
    set_optimizer_step,
    set_state,
    shard_shape,
)

logger = logging.getLogger(__name__)

DATA_FOLDER = "data"


class CheckpointStore:
    """The `checkpoints` folder of a run, as the ranks write and read it together."""

    def __init__(self, run_folder: Path, config: RunConfig, topology: Topology) -> None:
        self._folder = run_folder / "checkpoints"
        self._run_config = run_folder / CONFIG_NAME
        self._config = config.checkpoint
        self._topology = topology

    def save(
        self,
        engines: Engines,
        step: int,
        lane_states: Mapping[int, Any] | None,
        facts: Mapping[str, Any],
    ) -> Path:
        """Write and publish the checkpoint of a step, then remove what need not be kept.

        Args:
            engines: what is saved.
            step: optimizer steps done.
            lane_states: of this data-parallel rank's lanes; None on tensor ranks above 0.
            facts: JSON-able entries of `state.json` beside its own, as rank 0 holds them.

        Collective: all ranks.
        """
        topology, folder = self._topology, step_folder(self._folder, step)
        partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
        if topology.rank == 0:
            for leftover in (partial, folder):  # of a save that was killed, or of a run that was rewound
                if leftover.exists():
                    shutil.rmtree(leftover)
            (partial / DATA_FOLDER).mkdir(parents=True)
        dist.barrier()
        indices: dict[str, dict[str, ParameterIndex]] = {}
        written: dict[str, FileRecord] = {}
        for component, engine in engines.by_component().items():
            (partial / component).mkdir(exist_ok=True)
            indices[component] = self._write_pieces(engine, component, partial, written)
        if lane_states is not None:
            name = f"{DATA_FOLDER}/lanes_{topology.data_rank:05d}.json"
            (partial / name).write_text(json.dumps(lane_states))
            written[name] = record_file(partial / name)
        told: list[Any] = [None] * topology.world_size
        dist.gather_object((indices, written), told if topology.rank == 0 else None)
        if topology.rank == 0:
            state = self._state(engines, step, facts)
            self._finish(partial, told, state)
            publish(partial)
            prune_checkpoints(self._folder, self._config.keep_last, self._config.keep_every_steps)
        dist.barrier()
        return folder

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files are as its manifest says; damaged ones are named in the log.

        The ranks share the hashing.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.

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
        return None

    def load(self, folder: Path, engines: Engines) -> dict[str, Any]:
        """Restore weights and optimizers, and answer the saved state (`state.json`).

        Raises:
            CheckpointError: the checkpoint does not fit the model.

        Collective: all ranks.
        """
        reader = CheckpointReader(folder)
        for component, engine in engines.by_component().items():
            self._load_component(reader, component, engine)
            set_optimizer_step(engine, reader.state["optimizer_steps"][component])
            counters = reader.state["engine_counters"][component]
            engine.global_steps, engine.skipped_steps = counters["global_steps"], counters["skipped_steps"]
        reader.close()
        return reader.state

    def lane_states(self, folder: Path) -> dict[int, Any]:
        """The data lanes' states, of all ranks that wrote the checkpoint."""
        states: dict[int, Any] = {}
        for path in sorted((folder / DATA_FOLDER).glob("lanes_*.json")):
            states |= {int(lane): state for lane, state in read_json(path).items()}
        return states

    def _write_pieces(
        self, engine: Any, component: str, partial: Path, written: dict[str, FileRecord]
    ) -> dict[str, ParameterIndex]:
        """Write this rank's file of a component; answer its index with the pieces of this rank alone."""
        topology = self._topology
        tensors: dict[str, Tensor] = {}
        index: dict[str, ParameterIndex] = {}
        file = rank_file(topology.rank)
        for name, parameter, owned in owned_ranges(engine):
            sharding = sharding_of(parameter)
            if component == "decoder" and sharding is None and topology.tensor_rank > 0:
                continue  # replicated: the first tensor rank writes it
            tensor_size = 1 if sharding is None else topology.tensor_size
            piece = Piece(file, 0 if sharding is None else topology.tensor_rank, owned.start, owned.size)
            index[name] = ParameterIndex(
                shape=whole_shape(shard_shape(engine, parameter), sharding, tensor_size),
                partition_dim=None if sharding is None else sharding.dimension,
                partition_stride=1 if sharding is None else sharding.stride,
                tensor_size=tensor_size,
                pieces=(piece,),
                trained=parameter.requires_grad,
            )
            for state, tensor in owned.states.items():
                tensors[piece_name(name, state)] = tensor.detach().float().cpu().contiguous()
        if tensors:
            path = partial / component / file
            save_file(tensors, path)
            written[f"{component}/{file}"] = record_file(path)
        return index

    def _finish(self, partial: Path, told: list[Any], state: Mapping[str, Any]) -> None:
        files: dict[str, FileRecord] = {}
        merged: dict[str, dict[str, ParameterIndex]] = {}
        for indices, written in told:
            files |= written
            for component, index in indices.items():
                whole = merged.setdefault(component, {})
                for name, own in index.items():
                    pieces = whole[name].pieces if name in whole else ()
                    whole[name] = replace(own, pieces=pieces + own.pieces)
        for component, index in merged.items():
            write_index(partial / component, index)
            files[f"{component}/index.json"] = record_file(partial / component / "index.json")
        (partial / STATE_NAME).write_text(json.dumps(state, indent=1))
        shutil.copyfile(self._run_config, partial / CONFIG_NAME)
        for name in (STATE_NAME, CONFIG_NAME):
            files[name] = record_file(partial / name)
        write_manifest(partial, files)

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

    def _load_component(self, reader: CheckpointReader, component: str, engine: Any) -> None:
        topology, saved = self._topology, reader.parameters(component)
        own = dict(engine.module.named_parameters())
        if missing := own.keys() - saved.keys():
            raise CheckpointError(
                f"{reader.folder} lacks {len(missing)} parameter(s), such as {min(missing)}"
            )
        if unknown := saved.keys() - own.keys():
            raise CheckpointError(f"{reader.folder} holds {min(unknown)}, which the model has not")
        for name, parameter in own.items():
            sharding = sharding_of(parameter)
            shape = whole_shape(shard_shape(engine, parameter), sharding, topology.tensor_size)
            if shape != saved[name]:
                raise CheckpointError(
                    f"{component}.{name} is {list(saved[name])} in {reader.folder}, "
                    f"the model needs {list(shape)}"
                )
            for state in STATES:
                whole = reader.read(component, name, state)
                shard = cut_shard(whole, sharding, topology.tensor_rank, topology.tensor_size)
                set_state(engine, parameter, state, shard.to(topology.device))
        push_masters(engine)
