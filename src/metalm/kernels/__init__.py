"""Kernels: attention over interval masks, a fused linear + cross entropy, and the elementwise work of layers.

Knows torch and triton only.
"""

from metalm.kernels.activation import ActivationKind, activate
from metalm.kernels.attention import backend_counts, interval_attention, reset_backend_counts
from metalm.kernels.dropout import HiddenPattern, hidden_dropout, site_seeds
from metalm.kernels.interval_mask import BlockRanges, IntervalMask
from metalm.kernels.linear_cross_entropy import linear_cross_entropy
from metalm.kernels.relative_bias import RelativeBias, t5_relative_buckets
from metalm.kernels.residual_norm import NormKind, residual_norm, residual_sum
from metalm.kernels.rotary import turn
from metalm.kernels.segments import Segments, find_segments

__all__ = [
    "ActivationKind",
    "BlockRanges",
    "HiddenPattern",
    "IntervalMask",
    "NormKind",
    "RelativeBias",
    "Segments",
    "activate",
    "backend_counts",
    "find_segments",
    "hidden_dropout",
    "interval_attention",
    "linear_cross_entropy",
    "reset_backend_counts",
    "residual_norm",
    "residual_sum",
    "site_seeds",
    "t5_relative_buckets",
    "turn",
]
