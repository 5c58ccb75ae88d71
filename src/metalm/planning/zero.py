"""What of a DeepSpeed JSON decides bytes and traffic, with DeepSpeed's own defaults where it is silent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metalm.config.load import load_deepspeed_json


@dataclass(frozen=True)
class ZeroSettings:
    """How one engine shards."""

    stage: int
    overlap: bool
    """Whether gradients are reduced while the backward still runs."""
    bucket_elements: int
    """Of the buffers that gradients are reduced in."""
    max_live_elements: int
    """Stage 3: gathered parameters that may be held at once."""
    max_reuse_elements: int
    """Stage 3: a parameter that is used again within so many elements stays gathered until then."""
    node_shards: int
    """Stage 3: ranks among which a second copy of the weights is sharded, for the backward pass; 1: none."""
    offloads_optimizer: bool
    """The masters and moments lie in host memory."""


def zero_settings(path: Path) -> ZeroSettings:
    """The settings of a DeepSpeed JSON.

    Raises:
        ConfigError: see `load_deepspeed_json`.
    """
    zero = load_deepspeed_json(path)["zero_optimization"]
    stage = int(zero["stage"])
    return ZeroSettings(
        stage=stage,
        overlap=stage == 3 if zero.get("overlap_comm") is None else bool(zero["overlap_comm"]),
        bucket_elements=int(zero.get("reduce_bucket_size", 5e8)),
        max_live_elements=int(zero.get("stage3_max_live_parameters", 1e9)),
        max_reuse_elements=int(zero.get("stage3_max_reuse_distance", 1e9)),
        node_shards=int(zero.get("zero_hpz_partition_size", 1)),
        offloads_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
    )
