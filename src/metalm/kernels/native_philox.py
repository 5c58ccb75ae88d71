"""The dropout generator on CPU as one compiled loop, in place of a hundred passes of PyTorch's operations.

A C compiler, which DeepSpeed's own extension needs on CPU as well, builds it at its first use on a machine,
in less than a second. Where there is none, PyTorch's operations draw the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalm.cache_folder import cache_folder
from metalm.errors import ConfigError

logger = logging.getLogger(__name__)

_SOURCE = r"""
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void keep(uint32_t *restrict out, int64_t num_lines, int64_t num_groups, const int64_t *seeds,
          const int32_t *groups, int64_t groups_stride, const int32_t *second, const int32_t *third,
          uint32_t fourth, uint32_t threshold)
{
    for (int64_t line = 0; line < num_lines; line++) {
        const uint32_t seed_low = (uint32_t)seeds[line], seed_high = (uint32_t)((uint64_t)seeds[line] >> 32);
        const uint32_t c1 = (uint32_t)second[line], c2 = (uint32_t)third[line];
        const int32_t *first = groups + line * groups_stride;
        for (int64_t group = 0; group < num_groups; group++) {
            uint32_t x0 = (uint32_t)first[group], x1 = c1, x2 = c2, x3 = fourth;
            uint32_t key0 = seed_low, key1 = seed_high;
            for (int round = 0; round < 10; round++) {
                const uint64_t product0 = (uint64_t)x0 * 0xD2511F53u, product1 = (uint64_t)x2 * 0xCD9E8D57u;
                x0 = (uint32_t)(product1 >> 32) ^ x1 ^ key0;
                x1 = (uint32_t)product1;
                x2 = (uint32_t)(product0 >> 32) ^ x3 ^ key1;
                x3 = (uint32_t)product0;
                key0 += 0x9E3779B9u;
                key1 += 0xBB67AE85u;
            }
            out[group] = (uint32_t)(x0 >= threshold) | (uint32_t)(x1 >= threshold) << 8
                | (uint32_t)(x2 >= threshold) << 16 | (uint32_t)(x3 >= threshold) << 24;
        }
        out += num_groups;
    }
}
"""


def native_keep(
    seeds: Tensor, groups: Tensor, second: Tensor, third: Tensor, fourth: int, threshold: int
) -> Tensor | None:
    """Which elements are kept, of lines of so many groups of four; None where the loop cannot be compiled.

    Args:
        seeds: int64 `[L]`, the keys.
        groups: integers `[L, G]` or `[1, G]`, the counter's first word.
        second: integers `[L]`, its second.
        third: integers `[L]`, its third.
        fourth: its fourth.
        threshold: what is kept has a word not below it.

    Returns:
        bool `[L, 4 G]`.
    """
    function = compiled_loop()
    if function is None or platform.machine() not in ("x86_64", "aarch64", "arm64"):  # little-endian
        return None
    num_lines, num_groups = len(seeds), groups.shape[1]
    keys = seeds.contiguous()
    words = [part.to(torch.int32).contiguous() for part in (groups, second, third)]
    out = torch.empty(num_lines, 4 * num_groups, dtype=torch.bool)
    stride = num_groups if len(groups) > 1 else 0
    places = [ctypes.c_void_p(part.data_ptr()) for part in words]
    function(
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(num_lines),
        ctypes.c_int64(num_groups),
        ctypes.c_void_p(keys.data_ptr()),
        places[0],
        ctypes.c_int64(stride),
        *places[1:],
        ctypes.c_uint32(fourth),
        ctypes.c_uint32(threshold),
    )
    return out


@cache
def compiled_loop() -> Any | None:
    """The loop as a function, None where it cannot be compiled; told once."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        logger.info("no C compiler: dropout on CPU draws by PyTorch's operations, which is slower")
        return None
    name = hashlib.sha256(f"{_SOURCE}{compiler}{platform.machine()}".encode()).hexdigest()[:16]
    try:
        folder = cache_folder("metalm")
        path = folder / f"philox-{name}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                source, built = Path(scratch) / "philox.c", Path(scratch) / "philox.so"
                source.write_text(_SOURCE)
                command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(built), str(source)]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                built.replace(path)  # whole, whoever else compiles it now
        return ctypes.CDLL(str(path)).keep
    except (ConfigError, OSError, subprocess.SubprocessError) as error:
        logger.info("dropout on CPU draws by PyTorch's operations, which is slower: %s", error)
        return None
