"""Documents of Megatron's token datasets: ids in NAME.bin, where they begin and end in NAME.idx.

The index is a head (magic, version, code of the ids' type, number of sequences and of bounds of documents),
lengths (int32) and byte offsets (int64) of the sequences, and the sequences that the documents begin with
(int64), with the end of the last. Reading that takes no part of Megatron, whose import is slow and brings
torch into every process.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalm.errors import DataError
from metalm.regular_files import open_regular

TOKENS_SUFFIX, INDEX_SUFFIX = ".bin", ".idx"
_HEAD = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""By their codes. Floats (6 and 7) are no ids."""
_CHECKED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TokenDataset:
    """A dataset whose index has been checked. Only numbers: processes open its files themselves."""

    path: Path
    size: int
    """Of NAME.bin, in bytes."""
    dtype: np.dtype
    num_sequences: int
    num_documents: int

    @property
    def index_path(self) -> Path:
        """NAME.idx."""
        return self.path.with_suffix(INDEX_SUFFIX)

    def beginning_in(self, first: int, end: int) -> range:
        """Numbers of the documents whose ids begin in [first, end) of NAME.bin."""
        index = self._index()
        begins, ends = (
            int(np.searchsorted(index.documents, np.searchsorted(index.offsets, place)))
            for place in (first, end)
        )
        # Documents of no ids may stand behind the last id.
        return range(begins, self.num_documents if end >= self.size else ends)

    def documents(self, numbers: range, max_ids: int) -> Iterator[np.ndarray | None]:
        """The ids [n] of neighbouring documents; None for one of more than `max_ids`.

        Raises:
            DataError: the file cannot be read, or has become shorter.
        """
        index = self._index()
        with _open(self.path) as file:
            for number in numbers:
                first, end = (int(bound) for bound in index.documents[number : number + 2])
                start = int(index.offsets[first]) if end > first else 0
                num_ids = int(index.lengths[first:end].sum(dtype=np.int64))
                if num_ids > max_ids:
                    yield None
                    continue
                file.seek(start)
                content = file.read(num_ids * self.dtype.itemsize)
                if len(content) < num_ids * self.dtype.itemsize:
                    raise DataError(f"{self.path} ends inside document {number}: it has become shorter")
                yield np.frombuffer(content, self.dtype)

    def _index(self) -> _Index:
        path, arrays, at = self.index_path, [], _HEAD.size
        for kind, length in (
            ("<i4", self.num_sequences),
            ("<i8", self.num_sequences),
            ("<i8", self.num_documents + 1),
        ):
            # A map of no bytes is refused.
            found: np.ndarray = np.memmap(path, kind, "r", at, length) if length else np.empty(0, kind)
            arrays.append(found)
            at += found.nbytes
        return _Index(*arrays)


@dataclass(frozen=True)
class _Index:
    lengths: np.ndarray  # [sequences] int32, ids
    offsets: np.ndarray  # [sequences] int64, bytes in NAME.bin
    documents: np.ndarray  # [documents + 1] int64, their first sequences


def open_token_dataset(path: Path) -> TokenDataset:
    """The dataset of a NAME.bin.

    Raises:
        DataError: it or its index cannot be read, or they are none of Megatron's, or do not fit each other.
    """
    index = path.with_suffix(INDEX_SUFFIX)
    with _open(path) as file:
        size = file.seek(0, 2)
    with _open(index) as file:
        head, index_size = file.read(_HEAD.size), file.seek(0, 2)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise DataError(f"{index} is no index of Megatron, which begins with {_MAGIC!r}")
    _, version, code, num_sequences, num_bounds = _HEAD.unpack(head)
    if version != _VERSION or code not in _DTYPES:
        raise DataError(
            f"{index} is of version {version} with ids of type {code}; read are version {_VERSION} and types "
            f"{', '.join(map(str, _DTYPES))}"
        )
    if num_bounds < 1 or index_size < _HEAD.size + 12 * num_sequences + 8 * num_bounds:
        raise DataError(
            f"{index} states {num_sequences} sequences and {num_bounds} bounds of documents, but has only "
            f"{index_size} bytes: it is damaged, or has not been finished"
        )
    dataset = TokenDataset(path, size, np.dtype(_DTYPES[code]), num_sequences, num_bounds - 1)
    if problem := _problem(dataset):
        raise DataError(f"{index} and {path.name} do not fit each other: {problem}")
    return dataset


def _problem(dataset: TokenDataset) -> str | None:
    """What is wrong with an index, looked through once; None: nothing."""
    index = dataset._index()
    end = 0
    for at in range(0, dataset.num_sequences, _CHECKED_AT_ONCE):
        lengths: np.ndarray = (
            index.lengths[at : at + _CHECKED_AT_ONCE].astype(np.int64) * dataset.dtype.itemsize
        )
        ends = end + np.cumsum(lengths)
        if (lengths < 0).any() or (index.offsets[at : at + _CHECKED_AT_ONCE] != ends - lengths).any():
            return "its sequences do not follow each other"
        end = int(ends[-1])
    if end > dataset.size:
        return f"its sequences have {end} bytes, the file {dataset.size}"
    before = 0
    for at in range(0, dataset.num_documents + 1, _CHECKED_AT_ONCE):
        bounds = index.documents[at : at + _CHECKED_AT_ONCE]
        if (np.diff(bounds, prepend=before) < 0).any():
            return "its documents do not follow each other"
        before = int(bounds[-1])
    if int(index.documents[0]) != 0 or before != dataset.num_sequences:
        return f"its documents have sequences up to {before} of {dataset.num_sequences}"
    return None


def _open(path: Path) -> io.BufferedReader:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, but a dataset of Megatron is a .bin and its .idx") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
