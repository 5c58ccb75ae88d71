"""Where the host looks at a tensor of a step: on a GPU it would wait for all that is queued."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS_AT_NORM = "deepspeed/runtime/utils.py:is_invalid_grad_norm"
"""In fp32, at ZeRO 3 and with masters in host memory: DeepSpeed asks whether to skip, and again to clip."""
ON_THE_CPU_ALONE = {
    # An AdamW that is not fused reads its count of updates, in host memory.
    "deepspeed/runtime/zero/stage_1_and_2.py:_optimizer_step",
    "deepspeed/runtime/zero/stage3.py:step_with_gradscaler",
    # The backend of attention for the CPU.
    "metalm/kernels/tile_plan.py:_bounds",
}
"""Places that are not told: no GPU runs them."""

_LIBRARIES = ("deepspeed/", "metalm/")


def place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame of DeepSpeed's or of ours, as `deepspeed/FILE:function`."""
    for frame in reversed(frames):
        for library in _LIBRARIES:
            if f"/{library}" in frame.filename:
                return f"{library}{frame.filename.rpartition(f'/{library}')[2]}:{frame.name}"
    return f"{frames[-1].filename}:{frames[-1].name}"


class HostReads(TorchDispatchMode):
    """Records where numbers are taken out of tensors, on any device, and where the device is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def _record(self) -> None:
        if (found := place(traceback.extract_stack()[:-1])) not in ON_THE_CPU_ALONE:
            self.places.append(found)

    def __enter__(self) -> HostReads:
        def watch(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def watched(*arguments: Any, **options: Any) -> Any:
                self._record()
                return original(*arguments, **options)

            self._patch.setattr(owner, name, watched)

        watch(type(get_accelerator()), "synchronize")
        for name in ("tolist", "cpu"):  # on the CPU no operation
            watch(torch.Tensor, name)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._record()
        return func(*args, **(kwargs or {}))
