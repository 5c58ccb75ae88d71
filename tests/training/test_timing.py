from __future__ import annotations

import time

import pytest
import torch

from metalm.training.timing import PartTimer


def test_parts_add_up_and_reading_starts_anew() -> None:
    timer = PartTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.part("short"):
            time.sleep(0.01)
        with timer.part("long"):
            time.sleep(0.05)
    found = timer.read()
    assert found.keys() == {"short", "long"}
    assert 0.02 <= found["short"] < found["long"]
    assert found["long"] >= 0.1
    assert timer.read() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_device_is_timed_and_not_waited_for() -> None:
    timer, a = PartTimer(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    with timer.part("work"):
        for _ in range(50):
            a @ a
    queued_s = time.perf_counter() - began
    assert timer.read()["work"] > queued_s
