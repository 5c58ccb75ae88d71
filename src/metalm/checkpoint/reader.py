"""Read a checkpoint's parameters, whole or in part, whatever layout of ranks wrote them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metalm.checkpoint.format import AVERAGE, INDEX_NAME, ParameterIndex, Piece, piece_name, read_index
from metalm.checkpoint.layout import ShardLayout
from metalm.checkpoint.manifest import check_files, read_manifest, read_regular_file
from metalm.checkpoint.state import STATE_NAME, RunState, parse_state
from metalm.errors import CheckpointError

DATA_FOLDER = "data"
_LANES = re.compile(rf"{DATA_FOLDER}/lanes_[0-9]+\.json")


class CheckpointReader:
    """One `step_N` folder: what its manifest lists of it."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """Open a folder.

        Args:
            folder: a published checkpoint.
            verify: hash every file against the manifest first.

        Raises:
            CheckpointError: the folder is no whole checkpoint; every damaged file is named.
        """
        self.folder = folder
        self.files = read_manifest(folder)
        problems = check_files(folder, self.files.items()) if verify else []
        if problems:
            raise damaged(folder, problems)
        self.state: RunState = parse_state(
            read_regular_file(self.path_of(STATE_NAME)), str(folder / STATE_NAME)
        )
        self._indices = {
            component: read_index(self.path_of(f"{component}/{INDEX_NAME}").parent)
            for component in self.state.zero_stages
        }
        self._check_pieces()
        self._files: dict[Path, Any] = {}
        self.bytes_read = 0
        """Of tensors, so far."""

    @property
    def step(self) -> int:
        """Optimizer steps that were done when it was written."""
        return self.state.step

    def path_of(self, name: str) -> Path:
        """A file of the checkpoint.

        Raises:
            CheckpointError: the manifest does not list it.
        """
        if name not in self.files:
            raise CheckpointError(f"checkpoint {self.folder} has no {name} in its manifest")
        return self.folder / name

    def lane_states(self, lanes: Collection[int] = (), num_lanes: int = 1) -> dict[int, Any]:
        """The data lanes' states; none if it is of weights alone.

        Args:
            lanes: that are wanted: only the files which are found to hold them are read. Without them: all.
            num_lanes: of the run, by which files hold consecutive ones.

        Raises:
            CheckpointError: a file of them is malformed.
        """
        names = sorted(filter(is_lane_file, self.files))
        likely = {names[lane * len(names) // num_lanes] for lane in lanes if names and lane < num_lanes}
        states: dict[int, Any] = {}
        for name in sorted(names, key=lambda name: name not in likely):
            if lanes and states.keys() >= set(lanes):
                break
            states |= read_lane_states(self.path_of(name))
        return states

    def components(self) -> list[str]:
        """`decoder` and, where the model has them, `encoders`."""
        return list(self._indices)

    def parameters(self, component: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a component's whole parameters, by name."""
        return {name: index.shape for name, index in self._index_of(component).items()}

    def states(self, component: str, name: str) -> tuple[str, ...]:
        """What is kept of a parameter: "master" alone, or Adam's moments and perhaps an average as well."""
        return self._parameter(component, name).states

    def read(self, component: str, name: str, state: str = "master") -> Tensor:
        """One whole parameter, float32, its shards and ranges put together; see `read_range`."""
        shape = self._parameter(component, name).shape
        layout = ShardLayout(shape)
        return self.read_range(component, name, state, layout, 0, 0, layout.size).view(shape)

    def read_range(
        self,
        component: str,
        name: str,
        state: str,
        layout: ShardLayout,
        tensor_rank: int,
        start: int,
        size: int,
    ) -> Tensor:
        """A flat range of one shard of a parameter, as any layout cuts it. Only its bytes are read.

        Args:
            component: `decoder` or `encoders`.
            name: as in the module's `named_parameters()`.
            state: "master" (the weight), "exp_avg", "exp_avg_sq" or "average".
            layout: the reader's own cut; its shape is the parameter's.
            tensor_rank: whose shard in that layout.
            start: first element of the range in that shard.
            size: elements.

        Returns:
            [size] float32.

        Raises:
            CheckpointError: the checkpoint does not hold it, or a file is not what the index says.
        """
        index = self._parameter(component, name)
        if state not in index.states:
            raise CheckpointError(f"checkpoint {self.folder} has no {state!r} of {component}.{name}")
        if layout.shape != index.shape:
            raise CheckpointError(
                f"{component}.{name} is {list(index.shape)} in {self.folder}, not {list(layout.shape)}"
            )
        target = torch.empty(size)
        for run in layout.runs_from(index.layout, tensor_rank, start, size):
            for piece in index.columns.under(run.tensor_rank, run.start, run.size):
                first = max(run.start, piece.start)
                last = min(run.start + run.size, piece.start + piece.size)
                offset = run.offset + first - run.start
                held = self._piece(component, name, state, piece)
                target[offset : offset + last - first] = held[first - piece.start : last - piece.start]
        self.bytes_read += target.nbytes
        return target

    def close(self) -> None:
        """Forget the open files."""
        self._files.clear()

    def _check_pieces(self) -> None:
        """Every piece lies in a file that the manifest lists and that has room for it.

        Raises:
            CheckpointError: one does not.
        """
        needed: Counter[str] = Counter()
        for component, index in self._indices.items():
            for parameter in index.values():
                pieces = parameter.columns
                # In float64, exact for all that can be on a disk; an index may claim more.
                sizes = np.bincount(pieces.files, 4.0 * len(parameter.states) * pieces.sizes)
                for number in np.flatnonzero(sizes).tolist():
                    needed[f"{component}/{pieces.names[number]}"] += int(sizes[number])
        for name, size in needed.items():
            self.path_of(name)
            if size > self.files[name].size:
                raise CheckpointError(
                    f"checkpoint {self.folder}: {name} has {self.files[name].size} bytes, "
                    f"its index places {size} in it"
                )

    def _index_of(self, component: str) -> dict[str, ParameterIndex]:
        if component not in self._indices:
            known = ", ".join(self._indices) or "none"
            raise CheckpointError(
                f"checkpoint {self.folder} has no component {component!r} (it has: {known})"
            )
        return self._indices[component]

    def _parameter(self, component: str, name: str) -> ParameterIndex:
        index = self._index_of(component).get(name)
        if index is None:
            raise CheckpointError(f"checkpoint {self.folder} has no parameter {name!r} in {component}")
        return index

    def _piece(self, component: str, name: str, state: str, piece: Piece) -> Tensor:
        """The piece as a view of its mapped file: pages are read when they are touched."""
        path = self.folder / component / piece.file
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, "pt")
            found = self._files[path].get_tensor(piece_name(name, state))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if found.shape != (piece.size,) or found.dtype != torch.float32:
            raise CheckpointError(
                f"{component}/{piece.file} holds {found.dtype} {list(found.shape)} for {name}, "
                f"expected float32 [{piece.size}]"
            )
        return found


class AverageReader(CheckpointReader):
    """Reads the moving average of each weight that has one; what was not trained is as it is."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """Open a folder, see `CheckpointReader`.

        Raises:
            CheckpointError: also where the run kept no average.
        """
        super().__init__(folder, verify=verify)
        indices = (index for component in self._indices.values() for index in component.values())
        if not any(AVERAGE in index.states for index in indices):
            raise CheckpointError(
                f"checkpoint {folder} has no average of its weights: its run was not told to keep one by "
                "training.average"
            )

    def read(self, component: str, name: str, state: str = "master") -> Tensor:
        """As its parent, but the average for the weight."""
        has_average = state == "master" and AVERAGE in self.states(component, name)
        return super().read(component, name, AVERAGE if has_average else state)


def is_lane_file(name: str) -> bool:
    """Whether a file of a checkpoint holds the states of data lanes, those of one data-parallel rank."""
    return _LANES.fullmatch(name) is not None


def read_lane_states(path: Path) -> dict[int, Any]:
    """The states that a file of data lanes holds, by lane.

    Raises:
        CheckpointError: it is malformed.
    """
    try:
        return {int(lane): state for lane, state in read_json(path).items()}
    except ValueError as error:
        raise CheckpointError(f"{path} holds no states of lanes: {error}") from None


def damaged(folder: Path, problems: list[str]) -> CheckpointError:
    """The error that names everything that is wrong with a checkpoint."""
    return CheckpointError("\n".join([f"checkpoint {folder} is damaged", *(f"  {p}" for p in problems)]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint or of a model's folder.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(read_regular_file(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object")
    return content
