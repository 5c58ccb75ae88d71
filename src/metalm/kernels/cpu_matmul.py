"""Products of float32 matrices on CPU by oneDNN, where the library that PyTorch asks is slow.

PyTorch's builds for x86 multiply float32 matrices by MKL, which on CPUs of other makers than Intel takes its
path for AVX2. oneDNN is in the same builds, takes AVX-512 wherever there is, and is as accurate; PyTorch
asks it for bfloat16 alone.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "METALM_ONEDNN"
"""Environment variable that leaves matrices to PyTorch where it is 0, to compare."""

_CPU_INFO = Path("/proc/cpuinfo")
# Multiplications below which the call costs more than it saves: a row by 256 x 8192, or 128 x 128 x 128.
_FEWEST = 2**21

_library: torch.library.Library | None = None


def multiply_by_onednn() -> bool:
    """From here on, have oneDNN multiply float32 matrices of this process on CPU, where that is faster.

    It takes the place of `aten::mm` and `aten::addmm`, so of all linear layers, ours and those of other
    libraries, forward and backward. A second call changes nothing.

    Returns:
        Whether it does: not on Intel's CPUs, without AVX-512, in builds without oneDNN, or where the
        environment has METALM_ONEDNN=0.
    """
    global _library
    if _library is None and _is_faster() and os.environ.get(SWITCH) != "0":
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Oo]verrid")
            _library.impl("mm", _mm, "CPU")
            _library.impl("addmm", _addmm, "CPU")
        logger.info("oneDNN multiplies float32 matrices (%s=0 leaves it to PyTorch)", SWITCH)
    return _library is not None


@cache
def _is_faster() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, as aten::mm."""
    if _is_ours(left, right):
        # A tall gradient of weights, as of an output layer, is written as its transpose in half of the time.
        if left.stride(0) == 1 and left.shape[0] > right.shape[1]:
            return _linear(right.t(), left, None).t().contiguous()
        return _linear(left, right.t(), None)
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(0))


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * bias + alpha * (left @ right)`, as aten::addmm."""
    is_plain = beta == alpha == 1 and bias.shape == right.shape[1:] and bias.dtype == left.dtype
    if is_plain and _is_ours(left, right):
        return _linear(left, right.t(), bias)
    return torch.ops.aten.addmm.out(bias, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # its strides are not asked
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _is_ours(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.dim() == right.dim() == 2
        and left.shape[1] == right.shape[0]
        and left.numel() * right.shape[1] >= _FEWEST
        and not _overlaps(left)
        and not _overlaps(right)
    )


def _overlaps(matrix: Tensor) -> bool:
    """Whether rows or columns share numbers, as windows over a line do, which oneDNN has no form for."""
    (short, size), (long, _) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    return min(matrix.shape) > 1 and long < short * size
