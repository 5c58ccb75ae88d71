"""Which backend runs, and calls that are refused."""

import logging

import pytest
import torch

from metalm.kernels import (
    IntervalMask,
    RelativeBias,
    backend_counts,
    interval_attention,
    reset_backend_counts,
)

q = torch.randn(2, 4, 8, 16)


def test_cpu_tensors_run_tiled_by_default_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    reset_backend_counts()
    with caplog.at_level(logging.INFO, logger="metalm.kernels.attention"):
        for _ in range(2):
            interval_attention(q, q, q, IntervalMask.causal(8))
    assert backend_counts() == {"tiled": 2}
    assert [record.getMessage() for record in caplog.records] == [
        "interval attention runs on the tiled backend (cpu, torch.float32)"
    ]


def test_each_backend_can_be_forced() -> None:
    reset_backend_counts()
    for backend in ("dense", "tiled", "dense", "triton"):
        if backend != "triton" or not torch.cuda.is_available():
            interval_attention(q, q, q, IntervalMask.causal(8), backend=backend)
    assert backend_counts()["dense"] == 2
    assert backend_counts()["tiled"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": q[0]}, r"expected q \[B, H, Sq, D\]"),
        ({"v": q[:, :2]}, r"expected q \[B, H, Sq, D\]"),
        ({"q": q[:, :3]}, "key heads dividing query heads"),
        ({"q": q.double()}, r"q, k, v are torch.float64, torch.float32, torch.float32"),
        ({"mask": IntervalMask.causal(9)}, "mask of 1 rows, 9 queries and 9 keys does not fit"),
        ({"mask": IntervalMask.causal(8, batch_size=3)}, "mask of 3 rows"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"scale": 0.0}, "scale is 0.0, expected a positive number"),
        ({"bias": RelativeBias(torch.randn(3, 32))}, "bias table has 3 rows, q has 4 heads"),
        (
            {"backend": "f"},
            "unknown attention backend 'f', expected one of flash4, flash, triton, tiled, dense",
        ),
        ({"backend": "flash"}, "the flash backend needs CUDA and compute capability 8.0, got tensors on cpu"),
        ({"backend": "triton", "q": q.double(), "k": q.double(), "v": q.double()}, "triton backend takes"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    arguments = {"q": q, "k": q, "v": q, "mask": IntervalMask.causal(8), **change}
    with pytest.raises(ValueError, match=message):
        interval_attention(**arguments)  # type: ignore[arg-type]
