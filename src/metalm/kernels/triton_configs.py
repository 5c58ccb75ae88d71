"""Block sizes of the Triton kernels: one configuration for each, from a table of measurements.

Nothing is tried out where a model trains: that took minutes on every new machine, and again for new lengths.
`tools/tune_attention.py` measures the candidates of a device and prints the lines of its table.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
import triton

Kernel = Literal["forward", "query_gradient", "key_gradient"]


class LaunchConfig(NamedTuple):
    """How one kernel is compiled and launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a kernel's launch."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Variant(NamedTuple):
    """What decides on the best configuration of a kernel. The length and the mask change it little."""

    kernel: Kernel
    head_block: int
    """Head size, rounded up to a power of two of at least 64."""
    is_wide: bool
    """float32, not a 16-bit type."""
    has_extras: bool
    """A bias or dropout, which take registers."""


_HOPPER: dict[Variant, LaunchConfig] = {
    Variant("forward", 64, False, False): LaunchConfig(64, 64, 4, 3),
    Variant("forward", 64, False, True): LaunchConfig(64, 32, 4, 3),
    Variant("forward", 128, False, False): LaunchConfig(64, 64, 4, 3),
    Variant("forward", 128, False, True): LaunchConfig(64, 32, 4, 3),
    Variant("query_gradient", 64, False, False): LaunchConfig(64, 64, 4, 3),
    Variant("query_gradient", 64, False, True): LaunchConfig(64, 32, 4, 2),
    Variant("query_gradient", 128, False, False): LaunchConfig(128, 64, 8, 3),
    Variant("query_gradient", 128, False, True): LaunchConfig(64, 32, 4, 2),
    Variant("key_gradient", 64, False, False): LaunchConfig(32, 64, 4, 2),
    Variant("key_gradient", 64, False, True): LaunchConfig(32, 64, 4, 2),
    Variant("key_gradient", 128, False, False): LaunchConfig(32, 64, 4, 2),
    Variant("key_gradient", 128, False, True): LaunchConfig(32, 64, 4, 2),
}
"""Compute capability 9.0, as measured on an H200: the section `tuning` of `tools/measured/`."""

_INTERPRETED = LaunchConfig(32, 16, 4, 1)
# Small enough for the shared memory of any device that Triton compiles for, and quick to compile.
_SAFE = LaunchConfig(32, 32, 4, 2)
_SAFE_AND_WIDE = LaunchConfig(32, 16, 4, 1)


def launch_config(
    kernel: Kernel, head_size: int, dtype: torch.dtype, *, has_extras: bool, device: torch.device
) -> LaunchConfig:
    """The configuration of a kernel on a device: from its table, or one that any device takes."""
    if triton.knobs.runtime.interpret:
        return _INTERPRETED
    return config_for(kernel, head_size, dtype, has_extras=has_extras, capability=_capability(device))


def config_for(
    kernel: Kernel, head_size: int, dtype: torch.dtype, *, has_extras: bool, capability: tuple[int, int]
) -> LaunchConfig:
    """The configuration of a kernel on devices of a compute capability."""
    head_block = max(64, triton.next_power_of_2(head_size))
    variant = Variant(kernel, head_block, dtype == torch.float32, has_extras)
    return configs_of(capability).get(variant, _SAFE_AND_WIDE if variant.is_wide else _SAFE)


def has_measured(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels, without extras, are in the device's table."""
    variant = Variant("forward", max(64, triton.next_power_of_2(head_size)), dtype == torch.float32, False)
    return variant in configs_of(_capability(device))


def configs_of(capability: tuple[int, int]) -> dict[Variant, LaunchConfig]:
    """The table of a compute capability, empty where nothing was measured."""
    return _HOPPER if capability == (9, 0) else {}


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
