"""Set before anything imports Triton, which reads it once: without CUDA its kernels are interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
