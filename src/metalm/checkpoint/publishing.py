"""How a checkpoint comes to be, whoever makes it: a partial folder is filled, completed, and published."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalm.checkpoint.format import INDEX_NAME, ParameterIndex, Piece, piece_name, rank_file, write_index
from metalm.checkpoint.manifest import FileRecord, publish, record_file, remove, write_manifest
from metalm.checkpoint.names import CONFIG_NAME, partial_folder
from metalm.checkpoint.state import STATE_NAME, RunFacts, RunState
from metalm.checkpoint.writer import Shape, write_stream
from metalm.progress import Phase
from metalm.regular_files import force

Files = dict[str, FileRecord]
Indices = Mapping[str, Mapping[str, ParameterIndex]]
"""By component and name of the parameter."""


def begin_checkpoint(checkpoints: Path, step: int) -> Path:
    """An empty `step_N.partial`; what a killed save left of it is removed.

    Raises:
        OSError: the folder cannot be made, or what is left of another cannot be removed.
    """
    partial = partial_folder(checkpoints, step)
    remove(partial)
    partial.mkdir(parents=True)
    return partial


def complete_checkpoint(
    partial: Path, files: Mapping[str, FileRecord], indices: Indices, state: RunState, config: bytes | None
) -> Path:
    """Add what there is once of a checkpoint, and publish it.

    Args:
        partial: from `begin_checkpoint`, with the tensors and lane states written.
        files: records of what has been written, by name within the folder.
        indices: of all components, merged over ranks.
        state: for `state.json`.
        config: of the run that the checkpoint belongs to, YAML; None where it belongs to none.

    Returns:
        The published folder.

    Raises:
        OSError: a file could not be written.
    """
    complete = dict(files)
    for component, index in indices.items():
        write_index(partial / component, index)
        force(partial / component)
        complete[f"{component}/{INDEX_NAME}"] = record_file(partial / component / INDEX_NAME)
    complete[STATE_NAME] = write_bytes(partial / STATE_NAME, state.to_json().encode())
    if config is not None:
        complete[CONFIG_NAME] = write_bytes(partial / CONFIG_NAME, config)
    write_manifest(partial, complete)
    return publish(partial)


@contextmanager
def checkpoint_of_weights(
    checkpoints: Path, components: tuple[str, ...], facts: RunFacts, config: bytes | None
) -> Iterator[WeightsWriter]:
    """A checkpoint of step 0 that one process makes of weights alone; published when the block ends.

    Args:
        checkpoints: folder of checkpoints of a run.
        components: that will be written.
        facts: such as the tokenizer and where the weights come from.
        config: see `complete_checkpoint`.

    Raises:
        OSError: a file could not be written. Then, as after any error, no checkpoint is left.
    """
    state = RunState.of_weights(components, facts)
    partial = begin_checkpoint(checkpoints, 0)
    try:
        writer = WeightsWriter(partial)
        yield writer
        complete_checkpoint(partial, writer.files, writer.indices, state, config)
    finally:
        remove(partial)


class WeightsWriter:
    """Writes whole parameters, one at a time, as if by a rank alone."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial
        self.files: Files = {}
        self.indices: dict[str, dict[str, ParameterIndex]] = {}

    def write(
        self,
        component: str,
        shapes: Mapping[str, Shape],
        states: tuple[str, ...],
        pieces: Iterator[tuple[str, Tensor]],
    ) -> None:
        """Write a component.

        Args:
            component: `decoder` or `encoders`.
            shapes: of its parameters, by name.
            states: what is kept of each.
            pieces: flat float32 tensors in the order of parameters and, of each, states, by `piece_name`.

        Raises:
            OSError: the file could not be written.
        """
        file = rank_file(0)
        (self._partial / component).mkdir()
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        flat = {piece_name(name, state): (size,) for name, size in sizes.items() for state in states}
        with Phase(
            f"writing the {component}", sum(sizes.values()) * len(states), "million numbers", 1e6
        ) as phase:
            told = phase.each(pieces, lambda piece: piece[1].numel())
            record = write_stream(self._partial / component / file, told, flat, torch.float32)
        self.files[f"{component}/{file}"] = record
        self.indices[component] = {
            name: ParameterIndex(shape, None, 1, 1, (Piece(file, 0, 0, sizes[name]),), states)
            for name, shape in shapes.items()
        }


def write_json(path: Path, content: Any) -> FileRecord:
    """Write a JSON file of a checkpoint, and force it to disk.

    Raises:
        OSError: it could not be written.
    """
    return write_bytes(path, json.dumps(content).encode())


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a small file of a checkpoint, and force it to disk.

    Raises:
        OSError: it could not be written.
    """
    path.write_bytes(content)
    force(path)
    return record_file(path)
