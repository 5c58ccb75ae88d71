"""Candidates for the Triton kernels' block sizes, compiled in parallel processes and timed one by one."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, get_args

import torch
import triton
from torch import Tensor

from metalm.kernels.dropout import attention_pattern
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.relative_bias import RelativeBias
from metalm.kernels.triton_attention import triton_attention
from metalm.kernels.triton_configs import Kernel, LaunchConfig, Variant, launch_config

_Configs = dict[Kernel, LaunchConfig]

# At most six for each kernel and head size. All compile for compute capability 9.0, most without spills.
_PLAIN: dict[tuple[Kernel, int], list[tuple[int, int, int, int]]] = {
    ("forward", 64): [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
    ("forward", 128): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2)],
    ("query_gradient", 64): [
        (128, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 8, 2),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
    ],
    ("query_gradient", 128): [
        (128, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 8, 2),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
    ],
    ("key_gradient", 64): [(64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 3), (32, 64, 4, 2)],
    ("key_gradient", 128): [(64, 64, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)],
}
_WITH_EXTRAS: dict[tuple[Kernel, int], list[tuple[int, int, int, int]]] = {
    ("forward", 64): [(64, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 3), (64, 64, 4, 2)],
    ("forward", 128): [(64, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 3), (64, 32, 8, 2)],
    ("query_gradient", 64): [(64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)],
    ("query_gradient", 128): [
        (64, 32, 8, 2),
        (64, 64, 8, 2),
        (128, 32, 8, 2),
        (64, 32, 4, 2),
        (32, 32, 4, 2),
    ],
    ("key_gradient", 64): [(32, 64, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)],
    ("key_gradient", 128): [(32, 64, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)],
}


def candidates(kernel: Kernel, head_block: int, *, has_extras: bool) -> list[LaunchConfig]:
    """Of a kernel in 16-bit types."""
    table = _WITH_EXTRAS if has_extras else _PLAIN
    return [LaunchConfig(*sizes) for sizes in table[kernel, head_block]]


@dataclass(frozen=True)
class Trial:
    """What candidates are tried on: bfloat16, laid out as a model's projections leave it."""

    head_size: int
    has_extras: bool
    batch_size: int
    num_heads: int
    length: int

    def inputs(self, device: torch.device) -> list[Tensor]:
        """q, k, v and the output's gradient."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch_size, self.length, self.num_heads, self.head_size)
        drawn = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
        return [x.bfloat16().transpose(1, 2).requires_grad_() for x in drawn]

    def run(self, inputs: list[Tensor], mask: IntervalMask, configs: _Configs) -> Tensor:
        """Forward."""
        q, k, v, _ = inputs
        bias = pattern = None
        if self.has_extras:
            table = torch.zeros(self.num_heads, 32, device=q.device)
            bias = RelativeBias(table).by_distance(self.length, self.length)
            sizes = {"batch_size": self.batch_size, "num_queries": self.length, "num_keys": self.length}
            pattern = attention_pattern(0.1, 1, None, 0, device=q.device, **sizes)
        return triton_attention(q, k, v, mask, bias, 1 / math.sqrt(self.head_size), pattern, configs)


def tune(
    device: torch.device, trials: list[Trial], masks: dict[str, IntervalMask], *, num_processes: int
) -> Iterator[dict[str, Any]]:
    """Times of all candidates: milliseconds forward, or of the whole backward, by mask.

    Args:
        masks: by name, of one row of the trials' length.
    """
    combinations = [(trial, configs) for trial in trials for configs in _together(trial)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        problems = list(pool.map(_compile, combinations, [device] * len(combinations)))
    for (trial, configs), problem in zip(combinations, problems, strict=True):
        if problem:
            yield {"head_size": trial.head_size, "configs": _plain(configs), "not_run": problem}
    for trial in trials:
        yield from _time(trial, device, masks)


def best(records: list[dict[str, Any]]) -> dict[Variant, LaunchConfig]:
    """The candidates of least time, geometric mean over the masks."""
    found: dict[Variant, tuple[float, LaunchConfig]] = {}
    for record in records:
        if "not_run" in record:
            continue
        block = max(64, triton.next_power_of_2(record["head_size"]))
        variant = Variant(record["kernel"], block, False, record["has_extras"])
        mean = math.exp(sum(math.log(ms) for ms in record["ms"].values()) / len(record["ms"]))
        if variant not in found or mean < found[variant][0]:
            found[variant] = (mean, LaunchConfig(*record["config"]))
    return {variant: config for variant, (_, config) in found.items()}


def _defaults(trial: Trial, device: torch.device) -> _Configs:
    return {
        kernel: launch_config(
            kernel, trial.head_size, torch.bfloat16, has_extras=trial.has_extras, device=device
        )
        for kernel in get_args(Kernel)
    }


def _together(trial: Trial) -> list[_Configs]:
    """The i-th candidates of all kernels at once: as many compilations as the longest list has."""
    block = max(64, triton.next_power_of_2(trial.head_size))
    kernels = get_args(Kernel)
    lists = [candidates(kernel, block, has_extras=trial.has_extras) for kernel in kernels]
    return [
        {kernel: config or options[0] for kernel, config, options in zip(kernels, row, lists, strict=True)}
        for row in zip_longest(*lists)
    ]


def _compile(combination: tuple[Trial, _Configs], device: torch.device) -> str | None:
    """Runs the kernels once on a short input, in a process of its own; the code goes to Triton's cache."""
    trial, configs = combination
    short = Trial(trial.head_size, trial.has_extras, trial.batch_size, trial.num_heads, 256)
    try:
        inputs = short.inputs(device)
        out = short.run(inputs, IntervalMask.causal(256, device=device), configs)
        torch.autograd.grad(out, inputs[:3], inputs[3])
        torch.cuda.synchronize(device)
    except (RuntimeError, triton.OutOfResources) as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


def _time(trial: Trial, device: torch.device, masks: dict[str, IntervalMask]) -> Iterator[dict[str, Any]]:
    inputs, defaults = trial.inputs(device), _defaults(trial, device)
    block = max(64, triton.next_power_of_2(trial.head_size))
    for kernel in get_args(Kernel):
        for config in candidates(kernel, block, has_extras=trial.has_extras):
            record: dict[str, Any] = {
                "kernel": kernel,
                "head_size": trial.head_size,
                "has_extras": trial.has_extras,
                "config": list(config),
            }
            try:
                record["ms"] = {
                    name: _milliseconds(trial, inputs, mask, {**defaults, kernel: config}, kernel)
                    for name, mask in masks.items()
                }
            except (RuntimeError, triton.OutOfResources) as error:
                record["not_run"] = next(iter(str(error).splitlines()), type(error).__name__)
            yield record


def _milliseconds(
    trial: Trial, inputs: list[Tensor], mask: IntervalMask, configs: _Configs, kernel: Kernel
) -> float:
    if kernel == "forward":
        with torch.no_grad():
            return _median(lambda: trial.run(inputs, mask, configs))
    out = trial.run(inputs, mask, configs)
    return _median(lambda: torch.autograd.grad(out, inputs[:3], inputs[3], retain_graph=True))


def _median(run: Any) -> float:
    found: float = triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median")
    return found


def _plain(configs: _Configs) -> dict[str, list[int]]:
    return {kernel: list(config) for kernel, config in configs.items()}
