"""Tensors that are streamed into a file, as the library reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from metalm.checkpoint.writer import write_stream
from metalm.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_is_written_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "large": torch.randn(700_001),
    }
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    record = write_stream(tmp_path / "file", iter(stored.items()), shapes, dtype)
    content = (tmp_path / "file").read_bytes()
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / "file", "pt") as file:
        assert list(file.keys()) == sorted(shapes)
        assert all(torch.equal(file.get_tensor(name), stored[name]) for name in shapes)


@pytest.mark.parametrize(
    "stream",
    [
        [("a", torch.zeros(2)), ("b", torch.zeros(4))],
        [("b", torch.zeros(3)), ("a", torch.zeros(2))],
        [("a", torch.zeros(2)), ("b", torch.zeros(3, dtype=torch.float16))],
        [("a", torch.zeros(2))],
    ],
)
def test_another_stream_than_announced_is_an_error(
    tmp_path: Path, stream: list[tuple[str, torch.Tensor]]
) -> None:
    with pytest.raises(CheckpointError, match="not"):
        write_stream(tmp_path / "file", stream, {"a": (2,), "b": (3,)}, torch.float32)


def test_a_stream_is_taken_from_no_further_than_the_file_needs(tmp_path: Path) -> None:
    stream = iter([("a", torch.ones(2)), ("b", torch.ones(3))])
    write_stream(tmp_path / "first", stream, {"a": (2,)}, torch.float32)
    assert next(stream)[0] == "b"
