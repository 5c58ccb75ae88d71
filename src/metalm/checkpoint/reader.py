"""Read a checkpoint's parameters whole, whatever layout of ranks wrote them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metalm.checkpoint.format import INDEX_NAME, STATES, ParameterIndex, piece_name, read_index
from metalm.checkpoint.manifest import check_files, read_manifest
from metalm.errors import CheckpointError

STATE_NAME = "state.json"
CONFIG_NAME = "config.yaml"


class CheckpointReader:
    """One `step_N` folder."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """Open a folder.

        Args:
            folder: a published checkpoint.
            verify: hash every file against the manifest first.

        Raises:
            CheckpointError: the folder is no whole checkpoint; every damaged file is named.
        """
        self.folder = folder
        manifest = read_manifest(folder)
        problems = check_files(folder, manifest.items()) if verify else []
        if problems:
            raise CheckpointError(
                "\n".join([f"checkpoint {folder} is damaged", *(f"  {p}" for p in problems)])
            )
        self.state: dict[str, Any] = read_json(folder / STATE_NAME)
        self._indices = {
            part.name: read_index(part)
            for part in sorted(folder.iterdir())
            if part.is_dir() and (part / INDEX_NAME).exists()
        }
        self._files: dict[Path, Any] = {}

    @property
    def step(self) -> int:
        """Optimizer steps that were done when it was written."""
        return int(self.state["step"])

    def components(self) -> list[str]:
        """`decoder` and, where the model has them, `encoders`."""
        return list(self._indices)

    def parameters(self, component: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a component's whole parameters, by name."""
        return {name: index.shape for name, index in self._index_of(component).items()}

    def read(self, component: str, name: str, state: str = "master") -> Tensor:
        """One whole parameter, float32, its shards and ranges put together.

        Args:
            component: `decoder` or `encoders`.
            name: as in the module's `named_parameters()`.
            state: "master" (the weight), "exp_avg" or "exp_avg_sq"; the moments of a frozen one are zero.

        Raises:
            CheckpointError: the checkpoint does not hold it, or a file is not what the index says.
        """
        if state not in STATES:
            raise CheckpointError(f"a checkpoint holds {', '.join(STATES)}, not {state!r}")
        index = self._index_of(component).get(name)
        if index is None:
            raise CheckpointError(f"checkpoint {self.folder} has no parameter {name!r} in {component}")
        if state != "master" and not index.trained:
            return torch.zeros(index.shape)
        shards = [torch.empty(math.prod(index.shard_shape)) for _ in range(index.tensor_size)]
        for piece in index.pieces:
            found = self._tensor(self.folder / component / piece.file, piece_name(name, state))
            if found.shape != (piece.size,) or found.dtype != torch.float32:
                raise CheckpointError(
                    f"{component}/{piece.file} holds {found.dtype} {list(found.shape)} for {name}, "
                    f"expected float32 [{piece.size}]"
                )
            shards[piece.tensor_rank][piece.start : piece.start + piece.size] = found
        return merge_shards([shard.view(index.shard_shape) for shard in shards], index)

    def close(self) -> None:
        """Forget the open files."""
        self._files.clear()

    def _index_of(self, component: str) -> dict[str, ParameterIndex]:
        if component not in self._indices:
            known = ", ".join(self._indices) or "none"
            raise CheckpointError(
                f"checkpoint {self.folder} has no component {component!r} (it has: {known})"
            )
        return self._indices[component]

    def _tensor(self, path: Path, name: str) -> Tensor:
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, "pt")
            return self._files[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None


def merge_shards(shards: list[Tensor], index: ParameterIndex) -> Tensor:
    """The whole parameter from its tensor-parallel shards."""
    if index.partition_dim is None or len(shards) == 1:
        return shards[0]
    strips = [shard.chunk(index.partition_stride, index.partition_dim) for shard in shards]
    ordered = [strip[part] for part in range(index.partition_stride) for strip in strips]
    return torch.cat(ordered, index.partition_dim)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object")
    return content
