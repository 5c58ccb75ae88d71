"""The index of a component: which file holds which range of which parameter.

A parameter is cut first over tensor-parallel ranks (see `ShardLayout`), then, flattened, into ranges
that ZeRO ranks own. A piece is one such range, a one-dimensional float32 tensor named
`PARAMETER|STATE` in its rank's file. A parameter that was not trained has its weight alone.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from metalm.checkpoint.layout import ShardLayout
from metalm.errors import CheckpointError

INDEX_NAME = "index.json"
STATES = ("master", "exp_avg", "exp_avg_sq")
"""fp32 weight and Adam's two moments."""


@dataclass(frozen=True)
class Piece:
    """A flat range of one tensor-parallel shard of a parameter."""

    file: str
    tensor_rank: int
    start: int
    size: int


@dataclass(frozen=True)
class ParameterIndex:
    """Where a parameter is found."""

    shape: tuple[int, ...]
    """Of the whole parameter, all tensor-parallel shards together."""
    partition_dim: int | None
    """None: replicated over tensor-parallel ranks, and written by the first."""
    partition_stride: int
    tensor_size: int
    """Number of shards; 1 where replicated."""
    pieces: tuple[Piece, ...]
    states: tuple[str, ...] = STATES
    """What is kept of it, the weight first."""

    @property
    def layout(self) -> ShardLayout:
        """How its shards lie in it."""
        return ShardLayout(self.shape, self.partition_dim, self.partition_stride, self.tensor_size)

    def pieces_under(self, tensor_rank: int, start: int, size: int) -> Iterator[Piece]:
        """The pieces of a shard that hold part of a range of it, in order."""
        own = self._by_rank[tensor_rank]
        first = bisect.bisect_right(own, start, key=lambda piece: piece.start) - 1
        for piece in own[first:]:
            if piece.start >= start + size:
                break
            yield piece

    @functools.cached_property
    def _by_rank(self) -> list[list[Piece]]:
        ordered = sorted(self.pieces, key=lambda piece: piece.start)
        return [[p for p in ordered if p.tensor_rank == rank] for rank in range(self.tensor_size)]


def piece_name(parameter: str, state: str) -> str:
    """Name of a piece's tensor in its file."""
    return f"{parameter}|{state}"


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes for a component."""
    return f"rank_{rank:05d}.safetensors"


def write_index(folder: Path, parameters: dict[str, ParameterIndex]) -> None:
    """Write a component's index."""
    content = {"version": 1, "parameters": {name: asdict(index) for name, index in parameters.items()}}
    (folder / INDEX_NAME).write_text(json.dumps(content))


def read_index(folder: Path) -> dict[str, ParameterIndex]:
    """Read and check a component's index: it comes from outside, so nothing in it is believed.

    Raises:
        CheckpointError: the index is missing, malformed, names a file outside its folder, or its pieces
            do not tile the parameters.
    """
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text())
        if content["version"] != 1:
            raise CheckpointError(f"{path} has version {content['version']!r}, this program reads 1")
        parameters = {name: read_parameter(entry) for name, entry in content["parameters"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {error!r}") from None
    for name, parameter in parameters.items():
        _check(path, name, parameter)
    return parameters


def read_parameter(entry: dict[str, Any]) -> ParameterIndex:
    """An entry of an index, as `asdict` made it."""
    return ParameterIndex(
        shape=tuple(int(size) for size in entry["shape"]),
        partition_dim=None if entry["partition_dim"] is None else int(entry["partition_dim"]),
        partition_stride=int(entry["partition_stride"]),
        tensor_size=int(entry["tensor_size"]),
        pieces=tuple(
            Piece(str(p["file"]), int(p["tensor_rank"]), int(p["start"]), int(p["size"]))
            for p in entry["pieces"]
        ),
        states=tuple(str(state) for state in entry.get("states", STATES)),
    )


def _check(path: Path, name: str, parameter: ParameterIndex) -> None:
    for piece in parameter.pieces:
        if PurePosixPath(piece.file).name != piece.file or piece.file in ("", ".", ".."):
            raise CheckpointError(f"{path}: {name} points outside its folder, to {piece.file!r}")
    if parameter.states[:1] != ("master",) or not set(parameter.states) <= set(STATES):
        raise CheckpointError(f"{path}: {name} has states {parameter.states}, known are {STATES}")
    try:
        shard_size = parameter.layout.shard_size
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} cannot be cut as it says: {error}") from None
    for tensor_rank in range(parameter.tensor_size):
        own = sorted((p.start, p.size) for p in parameter.pieces if p.tensor_rank == tensor_rank)
        end = 0
        for start, size in own:
            if start != end or size <= 0:
                raise CheckpointError(f"{path}: the pieces of {name} overlap or leave a gap at {end}")
            end += size
        if end != shard_size:
            raise CheckpointError(f"{path}: the pieces of {name} hold {end} of {shard_size}")
