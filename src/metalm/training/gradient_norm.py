"""One gradient norm over both engines, so that clipping and skipping are decided once.

Each ZeRO optimizer clips by the norm that it reports to itself. `JointNorm` measures both norms after
the last backward of a step, joins them, and has both optimizers report the joint norm. If either is
not finite both report -1, DeepSpeed's mark for "skip this step".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups
from torch import Tensor


@dataclass(frozen=True)
class GradientNorms:
    """Norms before clipping, as device scalars; -1 where DeepSpeed found it not finite."""

    joint: Tensor
    parts: dict[str, Tensor]
    """By component that is trained."""


class JointNorm:
    """Measures and joins the gradient norms of several DeepSpeed ZeRO engines."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        """Take over how the ZeRO optimizers (stages 1 to 3) of engines, by component, report their norm."""
        self._joint = torch.tensor(-1.0)
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

    def _take_over(self, optimizer: Any) -> Any:
        if hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
            norm_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._joint]
            return lambda: combine_grad_norm_groups(norm_groups())
        scaled_global_norm = optimizer.scaled_global_norm  # ZeRO 1 and 2
        optimizer.scaled_global_norm = lambda norm_type=2: self._joint
        return scaled_global_norm
