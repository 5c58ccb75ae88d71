"""One gradient norm over both engines, so that clipping and skipping are decided once.

Each ZeRO optimizer clips by the norm that it reports to itself. `JointNorm` measures both norms after
the last backward of a step, joins them, and has both optimizers report the joint norm. If either is
not finite both report -1, DeepSpeed's mark for "skip this step".

DeepSpeed reads that mark on the host, which then waits for the whole step. An engine that was built for it
(`refuses_on_device`) is not asked: its optimizer takes the verdict as a tensor, as it would from torch's
gradient scaler, and leaves weights, moments and its count of updates alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups
from torch import Tensor

from metalm.training.owned_ranges import gradients_in_partition


@dataclass(frozen=True)
class GradientNorms:
    """Norms before clipping, as device scalars; -1 where DeepSpeed found it not finite."""

    joint: Tensor
    parts: dict[str, Tensor]
    """By component that is trained."""


def refuses_on_device(optimizer: torch.optim.Optimizer, content: Mapping[str, Any]) -> bool:
    """Whether an engine can refuse a step without the host: a fused AdamW in bf16, at ZeRO 1 or 2.

    ZeRO 3 asks the host whatever its options, and so does fp32; masters in host memory are updated there.

    Args:
        optimizer: of torch.
        content: DeepSpeed's config of the engine.
    """
    zero = content["zero_optimization"]
    is_fused = bool(optimizer.defaults.get("fused"))
    return is_fused and content["bf16"]["enabled"] and zero["stage"] < 3 and not zero.get("offload_optimizer")


class JointNorm:
    """Measures and joins the gradient norms of several DeepSpeed ZeRO engines."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        """Take over how the ZeRO optimizers (stages 1 to 3) of engines, by component, report their norm."""
        self._joint = torch.tensor(-1.0)
        self._refusing: list[Any] = []
        """Optimizers of torch that take the verdict on the device."""
        self._measures = {name: self._take_over(engine.optimizer) for name, engine in engines.items()}

    def measure(self) -> GradientNorms:
        """The norms of the gradients as they stand after the boundary's backward.

        Must be called once per optimizer step, before the engines' `step()`.

        Collective: the groups of every engine.
        """
        parts = {name: measure().float() for name, measure in self._measures.items()}
        norms = torch.stack(tuple(parts.values()))
        usable = torch.isfinite(norms).all() & (norms >= 0).all()
        self._joint = torch.where(usable, norms.norm(), torch.full_like(norms[0], -1.0))
        return GradientNorms(self._joint, parts)

    def refuse(self, step: Tensor) -> None:
        """Have both engines skip the step where the device flag `step` is set."""
        self._joint = torch.where(step, torch.full_like(self._joint, -1.0), self._joint)
        for optimizer in self._refusing:
            optimizer.found_inf = step.float()

    def _take_over(self, optimizer: Any) -> Any:
        if hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
            norm_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._joint]
            return lambda: combine_grad_norm_groups(norm_groups())
        scaled_global_norm = optimizer.scaled_global_norm  # ZeRO 1 and 2
        optimizer.scaled_global_norm = lambda norm_type=2: self._joint
        if not is_left_to_us(optimizer):
            return scaled_global_norm
        limit = optimizer.clip_grad
        optimizer.unscale_and_clip_grads = lambda gradients, norm: _clip(gradients, norm, limit)
        self._refusing.append(optimizer.optimizer)
        return lambda: combine_grad_norm_groups(
            [_group_norm(optimizer, group) for group in range(len(optimizer.bit16_groups))]
        )


def is_left_to_us(optimizer: Any) -> bool:
    """Whether a ZeRO optimizer was built not to look at its gradients: see `refuses_on_device`."""
    return optimizer.dtype == torch.bfloat16 and not getattr(optimizer, "check_grad_overflow", True)


def _clip(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of this norm down to `limit` as DeepSpeed does, but without a look at the norm."""
    if limit > 0.0:
        for gradient in gradients:
            gradient.mul_(1.0 / ((norm + 1e-6) / limit).clamp(min=1.0))


def _group_norm(optimizer: Any, group: int) -> Tensor:
    """The norm of one parameter group's gradients, as `DeepSpeedZeroOptimizer.get_grad_norm_direct` has it.

    That one casts each gradient to float64 by itself, and makes a constant on the device, which waits.
    """
    counted = [
        gradient
        for parameter, gradient in gradients_in_partition(optimizer, group)
        if is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0
    ]
    if counted:
        norms = torch._foreach_norm(counted, 2, dtype=torch.float64)
        total = torch.stack(norms).square().sum().float()
    else:
        total = torch.zeros((), device=optimizer.device)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    return total.sqrt()
