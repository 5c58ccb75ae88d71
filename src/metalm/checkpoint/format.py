"""The index of a component: which file holds which range of which parameter.

A parameter is cut first over tensor-parallel ranks (see `ShardLayout`), then, flattened, into ranges
that ZeRO ranks own. A piece is one such range, a one-dimensional float32 tensor named
`PARAMETER|STATE` in its rank's file. A parameter that was not trained has its weight alone.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from metalm.checkpoint.layout import ShardLayout
from metalm.checkpoint.manifest import read_regular_file
from metalm.checkpoint.state import first_mistake
from metalm.errors import CheckpointError

INDEX_NAME = "index.json"
STATES = ("master", "exp_avg", "exp_avg_sq")
"""fp32 weight and Adam's two moments."""
AVERAGE = "average"
"""The state of a moving average of the weight, where a run has one."""

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Piece:
    """A flat range of one tensor-parallel shard of a parameter."""

    file: str
    tensor_rank: Count
    start: Count
    size: Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class ParameterIndex:
    """Where a parameter is found."""

    shape: tuple[Count, ...]
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


def write_index(folder: Path, parameters: Mapping[str, ParameterIndex]) -> None:
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
        parameters = _Index.model_validate_json(read_regular_file(path)).parameters
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {first_mistake(error)}") from None
    for name, parameter in parameters.items():
        _check(path, name, parameter)
    return parameters


def read_parameters(content: Any) -> dict[str, ParameterIndex]:
    """The entries of an index, as `asdict` made them."""
    return _PARAMETERS.validate_python(content)


class _Index(BaseModel):
    version: Literal[1]
    parameters: dict[str, ParameterIndex]


_PARAMETERS = TypeAdapter(dict[str, ParameterIndex])


def _check(path: Path, name: str, parameter: ParameterIndex) -> None:
    for piece in parameter.pieces:
        if PurePosixPath(piece.file).name != piece.file or piece.file in ("", ".", ".."):
            raise CheckpointError(f"{path}: {name} points outside its folder, to {piece.file!r}")
    if parameter.states[:1] != ("master",) or not set(parameter.states) <= {*STATES, AVERAGE}:
        raise CheckpointError(f"{path}: {name} has states {parameter.states}, known are {(*STATES, AVERAGE)}")
    try:
        shard_size = parameter.layout.shard_size
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} cannot be cut as it says: {error}") from None
    tiled: dict[int, int] = {}
    for piece in sorted(parameter.pieces, key=lambda piece: (piece.tensor_rank, piece.start)):
        end = tiled.get(piece.tensor_rank, 0)
        if piece.start != end:
            raise CheckpointError(f"{path}: the pieces of {name} overlap or leave a gap at {end}")
        tiled[piece.tensor_rank] = end + piece.size
    # Without a loop over the shards: an index may claim any number of them.
    if shard_size and tiled.keys() != set(range(min(parameter.tensor_size, len(tiled) + 1))):
        raise CheckpointError(f"{path}: the pieces of {name} hold 0 of {shard_size} of a shard")
    if wrong := [end for end in tiled.values() if end != shard_size]:
        raise CheckpointError(f"{path}: the pieces of {name} hold {wrong[0]} of {shard_size}")
