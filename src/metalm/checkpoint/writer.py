"""Write tensors to a safetensors file, hashed in the same pass and forced to disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from metalm.checkpoint.manifest import FileRecord


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write contiguous float32 host tensors without copying them; answer the file's size and hash.

    The library's own `save_file` copies every tensor first and leaves the hash to a second pass.

    Raises:
        OSError: the disk is full, for example; the file is then incomplete.
    """
    size = 0
    with path.open("wb", buffering=0) as handle, ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_hash, tensors)  # hashing and writing both release the GIL
        for chunk in _content(tensors):
            written = 0
            while written < len(chunk):
                written += handle.write(chunk[written:])
            size += written
        os.fsync(handle.fileno())
        return FileRecord(size, digest.result())


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for chunk in _content(tensors):
        digest.update(chunk)
    return digest.hexdigest()


def _content(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        yield tensor.numpy().data.cast("B")
