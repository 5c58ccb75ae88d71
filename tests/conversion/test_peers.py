"""Which device each of several processes takes."""

from __future__ import annotations

import pytest
import torch

from metalm.conversion.peers import device_of
from metalm.errors import ConfigError
from metalm.parallel.launch import Launch


def process(local_rank: int, world_size: int) -> Launch:
    return Launch(local_rank, world_size, local_rank, "127.0.0.1", 1, "torchrun")


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of("cuda", process(rank, 2)) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert device_of("cuda:1", process(0, 1)) == "cuda:1"
    assert device_of("cpu", process(5, 6)) == "cpu"
    with pytest.raises(ConfigError, match="GPU 2 is wanted, this machine has 2"):
        device_of("cuda", process(2, 3))
    with pytest.raises(ConfigError, match="cuda:1 with 2 processes: give --device cuda"):
        device_of("cuda:1", process(0, 2))
