"""Megatron-core's sequence parallelism where there is no CUDA.

It needs CUDA for one thing: it allocates on `torch.cuda.current_device()`. Where there is none that call
answers the CPU, so that the code which is tested is the code which trains.
"""

from __future__ import annotations

import torch


def let_megatron_allocate_on_cpu() -> None:
    """Have `torch.cuda.current_device()` answer the CPU in this process, if it has no CUDA device."""
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
