"""What is set before the libraries of training are imported."""

from __future__ import annotations

import os
import warnings


def set_up_libraries() -> None:
    """Set what the libraries of training read when they are imported.

    DeepSpeed gets its device. Megatron has torch import its compiler for fused functions, none of which a
    run calls: it is set not to. Its notes on what is not installed stay off the terminal.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
