"""The machine that jobs run on: what it is, how many of them it runs at once, and in which precision."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Scale = Literal["cpu", "gpu"]
Precision = Literal["bf16", "fp32"]
_CPU_INFO = Path("/proc/cpuinfo")
_MULTIPLIES_BF16 = {"avx512_bf16", "amx_bf16"}
"""A CPU with one of these flags multiplies bf16 twice as fast as fp32, or faster."""


def machine() -> str:
    """This machine, for people: no name of a host."""
    import torch  # which takes seconds that lists and reports need not wait for

    gpu = (torch.cuda.get_device_name(),) if torch.cuda.is_available() else ()
    return ", ".join((*gpu, platform.machine(), _processor(), f"Python {platform.python_version()}"))


def usual_parallel(scale: Scale) -> int:
    """Jobs at once: on CPU one for each core, of four at most.

    One job is far from filling a GPU: there three for four cores, since each has a process for data, too.
    """
    cores = os.cpu_count() or 1
    return max(1, 3 * cores // 4) if scale == "gpu" else min(4, cores)


def usual_precision(scale: Scale) -> Precision:
    """bf16 on a GPU and on CPUs that multiply it; on others it would take longer than fp32."""
    if scale == "gpu":
        return "bf16"
    flags = {flag for key, value in _cpu_info() if key == "flags" for flag in value.split()}
    return "bf16" if flags & _MULTIPLIES_BF16 else "fp32"


def _processor() -> str:
    pairs = list(_cpu_info())
    names = [value for key, value in pairs if key == "model name"]
    if not names:
        return platform.processor()
    # One name of a cloud's CPUs may stand for generations of which one is twice as fast as the other.
    told = [f"{key} {value}" for key, value in pairs if key in ("cpu family", "model")][:2]
    return f"{len(names)} x {names[0]}" + (f" ({', '.join(told)})" if told else "")


def _cpu_info() -> Iterator[tuple[str, str]]:
    for line in _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else ():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()
