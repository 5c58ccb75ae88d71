"""Keys of a DeepSpeed JSON that write files of their own or start services: no engine of a run may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_FIGURES = "monitor.sinks of the pipeline says where figures go"
_CHECKPOINTS = "checkpoints are the run's own"
_SERVICES = {
    "tensorboard": _FIGURES,
    "wandb": _FIGURES,
    "csv_monitor": _FIGURES,
    "comet": _FIGURES,
    "autotuning": "tools/plan_run.py --search looks for layouts",
    "checkpoint": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "data_efficiency": "the pipeline's data section says what is read",
    "curriculum_learning": "the pipeline's data section says what is read",
    "elasticity": "a run goes on with any number of ranks, without changing its batch",
    "aio": "nothing is kept on local disks",
}
_WRITTEN_FILES = {
    "flops_profiler.output_file": "leave it out, and the profile is printed",
    "zero_optimization.offload_optimizer.nvme_path": "nothing is kept on local disks",
    "zero_optimization.offload_param.nvme_path": "nothing is kept on local disks",
}


def service_problems(path: str, content: Mapping[str, Any]) -> Iterator[str]:
    """What a DeepSpeed JSON asks for that is refused, a line each.

    Args:
        path: of the file, for the message.
        content: of the file.
    """
    for key, reason in _SERVICES.items():
        if key in content:
            yield f"{path} holds {key}, which is refused: {reason}"
    for key, reason in _WRITTEN_FILES.items():
        if _find(content, key.split(".")) is not None:
            yield f"{path} holds {key}, which is refused: {reason}"
    if (device := _find(content, ["zero_optimization", "offload_param", "device"])) not in (
        None,
        "none",
        "cpu",
    ):
        yield f"{path}: offload_param.device must be cpu, not {device!r}"


def _find(content: Any, key: list[str]) -> Any:
    for name in key:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content
