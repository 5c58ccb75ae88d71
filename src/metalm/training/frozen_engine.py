"""A component that nothing trains, in the place of its DeepSpeed engine.

DeepSpeed's engines need an optimizer. A component without trained parameters has none: no gradient buffers,
no masters, no moments. At ZeRO 3 its weights are sharded all the same, and gathered layer by layer for both
passes, since gradients still flow through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from metalm.parallel.mpu import Mpu


class FrozenEngine:
    """What the step, checkpoints and evaluation ask of an engine, without an optimizer."""

    def __init__(self, module: nn.Module, content: Mapping[str, Any], mpu: Mpu) -> None:
        """Take over a module.

        Args:
            module: without trained parameters, on its device; the first data-parallel rank's weights count.
            content: DeepSpeed's config.
            mpu: of the component.

        Collective: the component's data-parallel group.
        """
        self.module = module
        self.data_group: dist.ProcessGroup = mpu.data_group
        self.global_steps = self.skipped_steps = 0
        self._stage = int(content["zero_optimization"]["stage"])
        self._offload: Any = None
        if self._stage == 3:
            zero = dict(content["zero_optimization"])
            zero.pop("zero_hpz_partition_size", None)  # the copies of a node are an optimizer's
            settings = {**content, "zero_optimization": zero}
            engine, *_ = deepspeed.initialize(model=module, config=settings, mpu=mpu)
            self._offload = engine.optimizer  # without an optimizer: what shards and gathers weights
        else:
            if content["bf16"]["enabled"]:
                module.bfloat16()
            for parameter in module.parameters():  # as DeepSpeed does for what is trained
                dist.broadcast(parameter.data.view(torch.uint8), group=mpu.data_group, group_src=0)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)

    def zero_optimization_stage(self) -> int:
        """Of its config: only 3 makes a difference here."""
        return self._stage

    def eval(self) -> None:
        """As of a module."""
        self.module.eval()

    def train(self) -> None:
        """As of a module."""
        self.module.train()

    def step(self) -> None:
        """After each micro-batch: let go what the backward pass may have left gathered."""
        if self._offload is not None:
            self._offload.release_backward_leftovers()

    def forget_gathered(self) -> None:
        """Have weights that were set since be gathered anew."""
        if self._offload is not None:
            self._offload.partition_all_parameters()
