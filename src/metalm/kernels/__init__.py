"""Kernels: attention over interval masks, and a fused linear + cross entropy. Knows torch and triton only."""

from metalm.kernels.attention import backend_counts, interval_attention, reset_backend_counts
from metalm.kernels.dropout import hidden_dropout, site_seeds
from metalm.kernels.interval_mask import BlockRanges, IntervalMask
from metalm.kernels.linear_cross_entropy import linear_cross_entropy
from metalm.kernels.relative_bias import RelativeBias, t5_relative_buckets
from metalm.kernels.segments import Segments, find_segments

__all__ = [
    "BlockRanges",
    "IntervalMask",
    "RelativeBias",
    "Segments",
    "backend_counts",
    "find_segments",
    "hidden_dropout",
    "interval_attention",
    "linear_cross_entropy",
    "reset_backend_counts",
    "site_seeds",
    "t5_relative_buckets",
]
