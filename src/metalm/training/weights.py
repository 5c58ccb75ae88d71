"""Weights and optimizer states of a checkpoint into engines, whatever layout wrote them.

Every rank reads the ranges that it keeps. What one rank cannot read, all ranks refuse, before any of them
enters a collective.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metalm.checkpoint.format import AVERAGE, STATES
from metalm.checkpoint.layout import ShardLayout
from metalm.checkpoint.reader import CheckpointReader
from metalm.errors import CheckpointError
from metalm.model.adapters import is_adapter
from metalm.model.image_positions import fit_positions, holds_positions
from metalm.parallel.agreement import together
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from metalm.training.owned_ranges import (
    kept_ranges,
    push_masters,
    set_optimizer_step,
    set_state,
    shard_layouts,
)

logger = logging.getLogger(__name__)


def restore(reader: CheckpointReader, engines: Engines, topology: Topology) -> None:
    """Take weights, optimizers and counters from a checkpoint of this run.

    Moments that the checkpoint has not, because it was made from weights alone, start from zero, and a moving
    average that it has not from the weights.

    Raises:
        CheckpointError: the checkpoint does not fit the model.

    Collective: all ranks.
    """
    state = reader.state
    for component, engine in engines.by_component().items():
        with together():
            layouts = shard_layouts(engine, topology)
            _compare(reader, component, layouts)
            _read_component(reader, component, engine, layouts, (*STATES, AVERAGE), topology)
            set_optimizer_step(engine, state.optimizer_steps[component])
            counters = state.engine_counters[component]
            engine.global_steps, engine.skipped_steps = counters.global_steps, counters.skipped_steps
        push_masters(engine)
    _log_reading(reader)


def adopt(
    reader: CheckpointReader, component: str, engines: Engines, new: Sequence[str], topology: Topology
) -> None:
    """Take one component's weights from another run's checkpoint; the optimizer starts afresh.

    Args:
        reader: of the checkpoint.
        component: `decoder` or `encoders`.
        engines: of this run, freshly built.
        new: patterns of parameter names that the checkpoint may lack, as it may adapters: they keep their
            own start.
        topology: this rank's place.

    Raises:
        CheckpointError: the checkpoint does not fit.

    Collective: all ranks.
    """
    engine = engines.by_component()[component]
    with together():
        layouts = shard_layouts(engine, topology)
        saved = reader.parameters(component)
        if lost := sorted(name for name in saved.keys() - layouts.keys() if is_adapter(name)):
            raise CheckpointError(
                f"{reader.folder} has an adapter, such as {lost[0]}, which the model has not: give the model "
                "the same adapter, or export the checkpoint, which merges it, and restore that"
            )
        for name in layouts.keys() - saved.keys():
            if is_adapter(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in new):
                del layouts[name]
        if unused := saved.keys() - layouts.keys():
            logger.warning(
                "%d parameter(s) of %s are not used, such as %s", len(unused), reader.folder, min(unused)
            )
        fitted = _fit_positions(reader, component, layouts)
        read_as_they_are = {name: layout for name, layout in layouts.items() if name not in fitted}
        _compare(reader, component, read_as_they_are, [*unused, *fitted])
        _read_component(reader, component, engine, layouts, STATES[:1], topology, fitted)
    push_masters(engine)
    _log_reading(reader)


def _read_component(
    reader: CheckpointReader,
    component: str,
    engine: Any,
    layouts: Mapping[str, ShardLayout],
    states: Sequence[str],
    topology: Topology,
    fitted: Mapping[str, Tensor] | None = None,
) -> None:
    """Read the ranges that this rank keeps of these parameters, but for those given whole in `fitted`."""
    for name, parameter, owned in kept_ranges(engine):
        layout = layouts.get(name)
        if layout is None:
            continue
        if fitted and name in fitted:
            values = fitted[name].flatten()[owned.start : owned.start + owned.size]
            set_state(engine, parameter, "master", values.to(topology.device))
            continue
        tensor_rank = 0 if layout.dimension is None else topology.tensor_rank
        saved = reader.states(component, name)
        for state in (state for state in states if state in owned.states):
            found = "master" if state == AVERAGE and AVERAGE not in saved else state
            values = (
                reader.read_range(component, name, found, layout, tensor_rank, owned.start, owned.size)
                if found in saved
                else torch.zeros(owned.size)
            )
            set_state(engine, parameter, state, values.to(topology.device))


def _fit_positions(
    reader: CheckpointReader, component: str, layouts: Mapping[str, ShardLayout]
) -> dict[str, Tensor]:
    """Positions of image patches, whole, of a model whose images have another resolution."""
    saved = reader.parameters(component)
    return {
        name: fit_positions(reader.read(component, name), layout.shape)
        for name, layout in layouts.items()
        if component == "encoders"
        and holds_positions(name)
        and name in saved
        and saved[name] != layout.shape
        and saved[name][-1:] == layout.shape[-1:]
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


def _log_reading(reader: CheckpointReader) -> None:
    logger.info("read %.1f MiB of tensors from %s", reader.bytes_read / 2**20, reader.folder)
    reader.close()
