"""The index of a component: which file holds which range of which parameter.

A parameter is cut first over tensor-parallel ranks (see `ShardLayout`), then, flattened, into ranges
that ZeRO ranks own. A piece is one such range, a one-dimensional float32 tensor named
`PARAMETER|STATE` in its rank's file. A parameter that was not trained has its weight alone.

At ZeRO 3 every rank owns a piece of every parameter, some hundred thousands on a thousand ranks: on disk and
in memory the pieces of a parameter are columns of numbers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, overload

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from metalm.checkpoint.layout import ShardLayout
from metalm.checkpoint.manifest import read_regular_file
from metalm.checkpoint.state import first_mistake
from metalm.errors import CheckpointError
from metalm.regular_files import force

INDEX_NAME = "index.json"
STATES = ("master", "exp_avg", "exp_avg_sq")
"""fp32 weight and Adam's two moments."""
AVERAGE = "average"
"""The state of a moving average of the weight, where a run has one."""

Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass(frozen=True)
class Piece:
    """A flat range of one tensor-parallel shard of a parameter."""

    file: str
    tensor_rank: Count
    start: Count
    size: Annotated[int, Field(gt=0, lt=2**62)]


class Pieces(Sequence[Piece]):
    """Pieces of a parameter as columns, ordered by tensor rank and start.

    Attributes:
        names: of files.
        files: [pieces] int64, numbers of `names`.
        tensor_ranks, starts, sizes: [pieces] int64.
    """

    def __init__(
        self,
        names: Sequence[str],
        files: Sequence[int],
        tensor_ranks: Sequence[int],
        starts: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        """In any order; `sizes` are not 0."""
        columns = np.array([files, tensor_ranks, starts, sizes], np.int64)
        ordered = columns[:, np.lexsort((columns[2], columns[1]))]
        self.names = names
        self.files, self.tensor_ranks, self.starts, self.sizes = ordered

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Pieces:
        """The columns of some pieces."""
        if isinstance(pieces, Pieces):
            return pieces
        names: dict[str, int] = {}
        rows = [(names.setdefault(p.file, len(names)), p.tensor_rank, p.start, p.size) for p in pieces]
        return cls(list(names), *zip(*rows, strict=True)) if rows else cls([], [], [], [], [])

    @property
    def ends(self) -> np.ndarray:
        """[pieces] int64, the first element after each."""
        return self.starts + self.sizes

    def under(self, tensor_rank: int, start: int, size: int) -> Iterator[Piece]:
        """The pieces of a shard that hold part of a range of it, in order."""
        first, last = np.searchsorted(self.tensor_ranks, (tensor_rank, tensor_rank + 1)).tolist()
        begin = int(np.searchsorted(self.starts[first:last], start, side="right"))
        end = int(np.searchsorted(self.starts[first:last], start + size))
        for number in range(first + max(begin - 1, 0), first + end):
            yield self[number]

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, number: int) -> Piece: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Piece]: ...
    def __getitem__(self, number: int | slice) -> Piece | Sequence[Piece]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return Piece(
            self.names[self.files[number]],
            int(self.tensor_ranks[number]),
            int(self.starts[number]),
            int(self.sizes[number]),
        )


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
    pieces: Sequence[Piece]
    states: tuple[str, ...] = STATES
    """What is kept of it, the weight first."""

    @property
    def layout(self) -> ShardLayout:
        """How its shards lie in it."""
        return ShardLayout(self.shape, self.partition_dim, self.partition_stride, self.tensor_size)

    @functools.cached_property
    def columns(self) -> Pieces:
        """Of its pieces."""
        return Pieces.of(self.pieces)


def piece_name(parameter: str, state: str) -> str:
    """Name of a piece's tensor in its file."""
    return f"{parameter}|{state}"


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes for a component."""
    return f"rank_{rank:05d}.safetensors"


def write_index(folder: Path, parameters: Mapping[str, ParameterIndex]) -> None:
    """Write a component's index, and force it to disk."""
    files: dict[str, int] = {}
    entries = {}
    for name, index in parameters.items():
        pieces = index.columns
        numbers = np.array([files.setdefault(file, len(files)) for file in pieces.names], np.int64)
        entries[name] = {
            "shape": index.shape,
            "partition_dim": index.partition_dim,
            "partition_stride": index.partition_stride,
            "tensor_size": index.tensor_size,
            "states": index.states,
            "files": numbers[pieces.files].tolist() if len(pieces) else [],
            "tensor_ranks": pieces.tensor_ranks.tolist(),
            "starts": pieces.starts.tolist(),
            "sizes": pieces.sizes.tolist(),
        }
    content = {"version": 2, "files": list(files), "parameters": entries}
    path = folder / INDEX_NAME
    path.write_text(json.dumps(content, separators=(",", ":")))
    force(path)


def read_index(folder: Path) -> dict[str, ParameterIndex]:
    """Read and check a component's index: it comes from outside, so nothing in it is believed.

    Raises:
        CheckpointError: the index is missing, malformed, names a file outside its folder, or its pieces
            do not tile the parameters.
    """
    path = folder / INDEX_NAME
    try:
        index = _ANY_INDEX.validate_json(read_regular_file(path))
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {first_mistake(error)}") from None
    parameters: dict[str, ParameterIndex] = {}
    if isinstance(index, _PlainIndex):
        for name, plain in index.parameters.items():
            parameters[name] = ParameterIndex(**dict(plain))
    else:
        for name, entry in index.parameters.items():
            columns = (entry.files, entry.tensor_ranks, entry.starts, entry.sizes)
            if len({len(column) for column in columns}) > 1 or max(entry.files, default=-1) >= len(
                index.files
            ):
                raise CheckpointError(f"{path}: the columns of {name} do not fit each other")
            parameters[name] = ParameterIndex(
                entry.shape,
                entry.partition_dim,
                entry.partition_stride,
                entry.tensor_size,
                Pieces(index.files, *columns),
                entry.states,
            )
    checked: set[str] = set()
    for name, parameter in parameters.items():
        for file in set(parameter.columns.names) - checked:
            if PurePosixPath(file).name != file or file in ("", ".", ".."):
                raise CheckpointError(f"{path}: {name} points outside its folder, to {file!r}")
            checked.add(file)
        _check(path, name, parameter)
    return parameters


class _PlainIndex(BaseModel):
    """As checkpoints were written before: an object for each piece."""

    version: Literal[1]
    parameters: dict[str, _PlainParameter]


class _PlainParameter(BaseModel):
    shape: tuple[Count, ...]
    partition_dim: int | None
    partition_stride: int
    tensor_size: int
    pieces: tuple[Piece, ...]
    states: tuple[str, ...] = STATES


class _Columns(BaseModel, extra="forbid"):
    """A parameter and its pieces, each a row of the last four."""

    shape: tuple[Count, ...]
    partition_dim: int | None
    partition_stride: int
    tensor_size: int
    states: tuple[str, ...]
    files: list[Count]
    """By number in the index's list."""
    tensor_ranks: list[Count]
    starts: list[Count]
    sizes: list[Annotated[int, Field(gt=0, lt=2**62)]]


class _Index(BaseModel, extra="forbid"):
    version: Literal[2]
    files: list[str]
    parameters: dict[str, _Columns]


_ANY_INDEX: TypeAdapter[_PlainIndex | _Index] = TypeAdapter(
    Annotated[_PlainIndex | _Index, Field(discriminator="version")]
)


def _check(path: Path, name: str, parameter: ParameterIndex) -> None:
    pieces = parameter.columns
    if parameter.states[:1] != ("master",) or not set(parameter.states) <= {*STATES, AVERAGE}:
        raise CheckpointError(f"{path}: {name} has states {parameter.states}, known are {(*STATES, AVERAGE)}")
    try:
        shard_size = parameter.layout.shard_size
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} cannot be cut as it says: {error}") from None
    begins_shard = np.diff(pieces.tensor_ranks, prepend=-1) != 0
    expected = np.where(begins_shard, 0, np.roll(pieces.ends, 1))
    if (wrong := np.flatnonzero(pieces.starts != expected)).size:
        end = int(expected[wrong[0]])
        raise CheckpointError(f"{path}: the pieces of {name} overlap or leave a gap at {end}")
    # Without a loop over the shards: an index may claim any number of them.
    found = pieces.tensor_ranks[begins_shard]
    if shard_size and not np.array_equal(found, np.arange(min(parameter.tensor_size, len(found) + 1))):
        raise CheckpointError(f"{path}: the pieces of {name} hold 0 of {shard_size} of a shard")
    shard_ends = pieces.ends[np.roll(begins_shard, -1)]
    if short := [end for end in shard_ends.tolist() if end != shard_size]:
        raise CheckpointError(f"{path}: the pieces of {name} hold {short[0]} of {shard_size}")
