"""Which code runs the elementwise work of layers: Triton's passes, or PyTorch's operations."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]

SWITCH = "METALM_FUSED"
"""Environment variable that takes Triton's passes out where it is 0, to compare."""


def choose_backend(tensor: Tensor) -> Backend:
    """Triton for tensors on CUDA that are not float64."""
    return "triton" if tensor.is_cuda and tensor.dtype != torch.float64 and _can_fuse() else "torch"


@cache
def _can_fuse() -> bool:
    return os.environ.get(SWITCH) != "0" and importlib.util.find_spec("triton") is not None
