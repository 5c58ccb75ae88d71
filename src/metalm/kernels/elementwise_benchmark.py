"""The elementwise work of layers beside PyTorch's operations: time, and bytes that must move at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metalm.kernels.activation import activate
from metalm.kernels.benchmark import interleaved_times
from metalm.kernels.dropout import HiddenPattern
from metalm.kernels.elementwise import Backend
from metalm.kernels.residual_norm import residual_norm
from metalm.kernels.rotary import turn

_BACKENDS: tuple[Backend, ...] = ("triton", "torch")
_EPS = 1e-5
_CALLS = 10


@dataclass(frozen=True)
class _Operation:
    run: Callable[[Backend], tuple[Tensor, ...]]
    inputs: list[Tensor]
    passes: tuple[int, int]
    """Over the hidden vectors, that one pass forward and one backward read and write."""


def measure_elementwise(
    num_vectors: int, width: int, num_heads: int, *, device: torch.device, repetitions: int
) -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward, of each operation in bfloat16 on both backends, in turns."""
    stream = num_vectors * width * torch.bfloat16.itemsize
    for name, operation in _operations(num_vectors, width, num_heads, device).items():
        grads = [torch.randn_like(output) for output in operation.run("torch")]
        for has_backward in (False, True):
            chosen = grads if has_backward else None
            runs: dict[str, Callable[[], object]] = {
                backend: _bind(operation, backend, chosen, device) for backend in _BACKENDS
            }
            seconds = {
                backend: several / _CALLS
                for backend, several in interleaved_times(runs, repetitions, device).items()
            }
            moved = stream * (sum(operation.passes) if has_backward else operation.passes[0])
            record: dict[str, Any] = {
                "operation": name,
                "pass": "forward + backward" if has_backward else "forward",
            }
            for backend, label in zip(_BACKENDS, ("fused", "plain"), strict=True):
                record[f"{label}_us"] = seconds[backend] * 1e6
            yield record | {"fused_gb_per_s": moved / seconds["triton"] / 1e9}


def _bind(
    operation: _Operation, backend: Backend, grads: list[Tensor] | None, device: torch.device
) -> Callable[[], object]:
    """Several calls, on CUDA as one graph: what is timed is the device, not the launches."""

    def run() -> None:
        for _ in range(_CALLS):
            outputs = operation.run(backend)
            if grads is not None:
                torch.autograd.grad(outputs, operation.inputs, grads)

    if device.type != "cuda":
        return run
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _operations(num_vectors: int, width: int, num_heads: int, device: torch.device) -> dict[str, _Operation]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    branch, residual, mixed = (
        draw(num_vectors, 1, width),
        draw(num_vectors, 1, width),
        draw(num_vectors, 3 * width),
    )
    weight, bias, branch_bias, inner_bias = (draw(size) for size in (width, width, width, 4 * width))
    inner = draw(num_vectors, 4 * width)
    places = torch.arange(num_vectors, device=device, dtype=torch.int32)[:, None]
    dropout = HiddenPattern(0.1, places.long() // 2048, places % 2048, 1)
    angles = torch.randn(num_vectors, width // num_heads // 2, device=device)
    rotation = torch.stack((angles.cos(), angles.sin()))

    def deepnorm(pattern: HiddenPattern | None) -> Callable[[Backend], tuple[Tensor, ...]]:
        options: dict[str, Any] = {"kind": "layer_norm", "eps": _EPS, "residual_scale": 2.6}
        options |= {"branch_bias": branch_bias, "dropout": pattern}
        return lambda backend: residual_norm(branch, residual, weight, bias, backend=backend, **options)[:2]

    def pre_norm(backend: Backend) -> tuple[Tensor, ...]:
        found = residual_norm(branch, residual, weight, kind="rms_norm", eps=_EPS, backend=backend)
        return found.normed, found.total

    def turned(backend: Backend) -> tuple[Tensor, ...]:
        heads = mixed.view(num_vectors, num_heads, 3, -1)
        return turn(heads[:, :, 0], rotation, backend), turn(heads[:, :, 1], rotation, backend)

    of_deepnorm = [branch, residual, branch_bias, weight, bias]
    return {
        "DeepNorm, two uses": _Operation(deepnorm(None), of_deepnorm, (4, 5)),
        "DeepNorm, dropout, two uses": _Operation(deepnorm(dropout), of_deepnorm, (4, 5)),
        "pre-norm, RMS": _Operation(pre_norm, [branch, residual, weight], (4, 4)),
        "bias and GELU": _Operation(
            lambda backend: (activate(inner, "gelu", bias=inner_bias, backend=backend),),
            [inner, inner_bias],
            (8, 12),
        ),
        "SwiGLU": _Operation(
            lambda backend: (activate(inner, "silu", is_gated=True, backend=backend),), [inner], (6, 10)
        ),
        "rotary positions": _Operation(turned, [mixed], (4, 4)),
    }
