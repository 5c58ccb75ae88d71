"""Every backend against the float64 dense reference, in values and all gradients.

The Triton kernels run in Triton's interpreter on CPU, and compiled where there is a GPU.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metalm.kernels import (
    IntervalMask,
    RelativeBias,
    backend_counts,
    fused_tiles,
    interval_attention,
    reset_backend_counts,
)
from metalm.kernels.flash4 import why_not_flash4

pytestmark = pytest.mark.usefixtures("poisoned_memory")

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
backends = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("tiled", "cpu", id="tiled"),
        pytest.param("triton", "cpu", id="triton-interpreted", marks=on_cpu),
        pytest.param("triton", "cuda", id="triton-compiled", marks=on_gpu),
    ],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    table: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        return Inputs(*(x.detach().to(device, dtype).requires_grad_() for x in self))


def draw_inputs(
    batch_size: int,
    num_heads: int,
    num_queries: int,
    head_size: int,
    *,
    num_keys: int | None = None,
    num_key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    keys = (batch_size, num_key_heads or num_heads, num_keys or num_queries, head_size)
    queries = (batch_size, num_heads, num_queries, head_size)
    shapes = (queries, keys, keys, queries, (num_heads, 32))
    # Through the low precision: the float64 reference gets exactly the same numbers.
    return Inputs(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


def run(
    backend: str, inputs: Inputs, mask: IntervalMask, *, bias: bool = False, **options: object
) -> list[Tensor]:
    """Output and gradients of q, k, v and, with a bias, its table; in float64 on CPU."""
    reset_backend_counts()
    relative = RelativeBias(inputs.table) if bias else None
    mask = mask.to(inputs.q.device)
    out = interval_attention(inputs.q, inputs.k, inputs.v, mask, bias=relative, backend=backend, **options)
    assert backend_counts() == {backend: 1}
    assert out.dtype == inputs.q.dtype
    wanted = [inputs.q, inputs.k, inputs.v, *([inputs.table] if bias else [])]
    grads = torch.autograd.grad(out, wanted, inputs.grad)
    return [x.detach().cpu().double() for x in (out, *grads)]


def run_sdpa(inputs: Inputs, mask: IntervalMask) -> list[Tensor]:
    """PyTorch's own attention in the same dtype, with the dense mask; rows that see nothing see all."""
    dense = mask.to_dense()[:, None].to(inputs.q.device)
    dense = dense | ~dense.any(-1, keepdim=True)
    groups = inputs.q.shape[1] // inputs.k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (inputs.k, inputs.v))
    out = torch.nn.functional.scaled_dot_product_attention(inputs.q, k, v, attn_mask=dense)
    grads = torch.autograd.grad(out, [inputs.q, inputs.k, inputs.v], inputs.grad)
    return [x.detach().cpu().double() for x in (out, *grads)]


def check_against_sdpa(
    backend: str, device: str, inputs: Inputs, mask: IntervalMask, dtype: torch.dtype
) -> None:
    """Errors of at most twice those of SDPA, or of four float32 roundings where it makes none.

    Roundings are those of the products, of order one, also where they cancel: gradients of one-key rows.
    """
    seen = (mask.end > mask.start)[:, None, :, None]
    inputs = inputs._replace(grad=inputs.grad * seen)
    reference = run("dense", inputs.to(torch.float64), mask)
    ours = run(backend, inputs.to(dtype, device), mask)
    peers = run_sdpa(inputs.to(dtype, device), mask)
    peers[0] = peers[0] * seen
    for name, exact, value, peer in zip(("out", "q", "k", "v"), reference, ours, peers, strict=True):
        rounding = max(float(exact.abs().max()), 1.0) * torch.finfo(torch.float32).eps
        allowed = max(2 * float((peer - exact).abs().max()), 4 * rounding)
        error = float((value - exact).abs().max())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


class Operands(TorchDispatchMode):
    """The dtypes that PyTorch's own attention on CPU, and its backward, were given."""

    def __init__(self) -> None:
        super().__init__()
        self.of_forward: set[torch.dtype] = set()
        self.of_backward: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.of_forward |= {x.dtype for x in args[:3]}
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self.of_backward |= {x.dtype for x in args[:5]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "length", "forward", "backward"),
    [
        (torch.bfloat16, 40, torch.bfloat16, torch.float32),
        (torch.bfloat16, 200, torch.bfloat16, torch.float32),
        (torch.bfloat16, 1024, torch.bfloat16, torch.bfloat16),
        (torch.float16, 40, torch.float32, torch.float32),
        (torch.float16, 512, torch.float32, torch.float32),
        (torch.float32, 40, torch.float32, torch.float32),
        (torch.float64, 40, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_half_precision_is_widened_where_it_is_slow_on_cpu(
    dtype: torch.dtype, length: int, forward: torch.dtype, backward: torch.dtype, is_mixed: bool
) -> None:
    position = torch.arange(2 * length, dtype=torch.int32)[None]
    document_start = position // length * length
    span_end = torch.where(position % length < length // 2, document_start + length // 2, 0)
    mask = IntervalMask.semi_causal(document_start, span_end, bidirectional_spans=is_mixed)
    inputs = draw_inputs(1, 2, 2 * length, 16).to(dtype)
    with Operands() as operands:
        run("tiled", inputs, mask)
    assert (operands.of_forward, operands.of_backward) == ({forward}, {backward})


@backends
@pytest.mark.parametrize("length", [1, 17, 63, 111, 128, 1000])
def test_packed_documents_with_spans(
    backend: str, device: str, length: int, make_documents: Callable[..., IntervalMask]
) -> None:
    if length == 1000 and backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes minutes at 1000; tiled and the compiled kernels run it")
    inputs = draw_inputs(2, 2, length, 16)
    for seed in range(2 if device == "cpu" else 5):
        check_against_sdpa(backend, device, inputs, make_documents(2, length, seed), torch.float32)


@backends
@dtypes
def test_every_dtype_with_grouped_heads(
    backend: str, device: str, dtype: torch.dtype, make_documents: Callable[..., IntervalMask]
) -> None:
    inputs = draw_inputs(2, 4, 63, 32, num_key_heads=2, dtype=dtype)
    check_against_sdpa(backend, device, inputs, make_documents(2, 63, 3), dtype)


@backends
@pytest.mark.parametrize("head_size", [32, 80, 128, 256])
def test_head_sizes(
    backend: str, device: str, head_size: int, make_documents: Callable[..., IntervalMask]
) -> None:
    check_against_sdpa(
        backend, device, draw_inputs(1, 1, 40, head_size), make_documents(1, 40, 0), torch.float32
    )


@backends
@pytest.mark.parametrize(("num_queries", "num_keys"), [(63, 111), (111, 50)])
def test_any_intervals_over_other_numbers_of_keys(
    backend: str, device: str, num_queries: int, num_keys: int, make_intervals: Callable[..., IntervalMask]
) -> None:
    inputs = draw_inputs(2, 1, num_queries, 16, num_keys=num_keys)
    mask = make_intervals(2, num_queries, num_keys, 0)
    check_against_sdpa(backend, device, inputs, mask, torch.float32)


@backends
def test_one_key_rows(backend: str, device: str) -> None:
    position = torch.arange(40, dtype=torch.int32)[None]
    mask = IntervalMask(position, position + 1, 40)
    inputs = draw_inputs(1, 2, 40, 16).to(torch.float32, device)
    out, grad_q, grad_k, grad_v = run(backend, inputs, mask)
    assert torch.equal(out, inputs.v.detach().cpu().double())
    # A softmax over one key is constant; only rounding in (gradient of the weight - its mean) is left.
    assert grad_q.abs().max() < 1e-5
    assert grad_k.abs().max() < 1e-5
    torch.testing.assert_close(grad_v, inputs.grad.detach().cpu().double(), rtol=1e-6, atol=1e-6)


@backends
def test_empty_rows_give_zeros_and_zero_gradients(backend: str, device: str) -> None:
    mask = IntervalMask.padded(torch.tensor([20, 0]), 50)
    inputs = draw_inputs(2, 2, 50, 16).to(torch.float32, device)
    for result in run(backend, inputs, mask):
        assert result[0, :, :20].abs().min() > 0
        assert not result[0, :, 20:].any()
        assert not result[1].any()


@backends
def test_mask_of_one_row_holds_for_the_batch(backend: str, device: str) -> None:
    inputs = draw_inputs(3, 1, 40, 16)
    shared = run(backend, inputs.to(torch.float32, device), IntervalMask.causal(40))
    repeated = run(backend, inputs.to(torch.float32, device), IntervalMask.causal(40, batch_size=3))
    for one, other in zip(shared, repeated, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    check_against_sdpa(backend, device, inputs, IntervalMask.causal(40), torch.float32)


@backends
def test_permuted_inputs(backend: str, device: str) -> None:
    """Megatron's layout: memory order [S, B, H, D]."""
    inputs = draw_inputs(2, 2, 33, 16).to(torch.float32, device)
    permuted = Inputs(
        *(
            x.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).requires_grad_()
            for x in inputs[:4]
        ),
        inputs.table,
    )
    mask = IntervalMask.causal(33)
    for plain, other in zip(run(backend, inputs, mask), run(backend, permuted, mask), strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-6)


@backends
@pytest.mark.parametrize("length", [17, 111])
def test_bias_and_the_gradient_of_its_table(
    backend: str, device: str, length: int, make_documents: Callable[..., IntervalMask]
) -> None:
    inputs, mask = draw_inputs(2, 2, length, 16), make_documents(2, length, 1)
    reference = run("dense", inputs.to(torch.float64), mask, bias=True)
    ours = run(backend, inputs.to(torch.float32, device), mask, bias=True)
    for exact, value in zip(reference, ours, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)


@backends
def test_dropout_drops_what_the_reference_drops(
    backend: str, device: str, make_documents: Callable[..., IntervalMask]
) -> None:
    inputs, mask = draw_inputs(2, 4, 63, 16, num_key_heads=2), make_documents(2, 63, 2)
    options = {"dropout": 0.3, "dropout_seed": 2**40 + 7, "dropout_head_offset": 5}
    reference = run("dense", inputs.to(torch.float64), mask, **options)
    ours = run(backend, inputs.to(torch.float32, device), mask, **options)
    undropped = run("dense", inputs.to(torch.float64), mask)
    assert (reference[0] - undropped[0]).abs().max() > 0.1
    for exact, value in zip(reference, ours, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)


@backends
def test_scale(backend: str, device: str) -> None:
    inputs, mask = draw_inputs(1, 1, 33, 16), IntervalMask.causal(33)
    reference = run("dense", inputs.to(torch.float64), mask, scale=0.7, bias=True)
    ours = run(backend, inputs.to(torch.float32, device), mask, scale=0.7, bias=True)
    for exact, value in zip(reference, ours, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)


def test_tiles_of_many_keys_are_joined() -> None:
    """More than one rectangle of keys per tile, which short rows never reach."""
    inputs, mask = draw_inputs(1, 2, 140, 16, num_keys=2600), IntervalMask.causal(140, 2600)
    reference = run("dense", inputs.to(torch.float64), mask, bias=True)
    ours = run("tiled", inputs.to(torch.float32), mask, bias=True)
    for exact, value in zip(reference, ours, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_never_wait_for_the_device_nor_compile_again(
    make_documents: Callable[..., IntervalMask],
) -> None:
    from metalm.kernels.triton_forward import forward_kernel

    inputs = draw_inputs(2, 2, 128, 64, dtype=torch.bfloat16).to(torch.bfloat16, "cuda")
    run("triton", inputs, make_documents(2, 128, 0))
    compiled = sum(len(cache[0]) for cache in forward_kernel.device_caches.values())
    mask = make_documents(2, 128, 1).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = interval_attention(inputs.q, inputs.k, inputs.v, mask, backend="triton")
        torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert backend_counts()["triton"] == 2
    assert compiled == sum(len(cache[0]) for cache in forward_kernel.device_caches.values())


def segments_of(edges: list[list[int]], length: int, *, is_causal: bool) -> IntervalMask:
    """Runs between the edges of each row, and padding beyond them."""
    start = torch.full((len(edges), length), -1 if is_causal else 0)
    end = torch.zeros(len(edges), length, dtype=torch.int64)
    for row, bounds in enumerate(edges):
        for first, last in pairwise(bounds):
            start[row, first:last], end[row, first:last] = first, last
    return IntervalMask.packed_documents(start) if is_causal else IntervalMask.packed_spans(start, end)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize(
    "edges", [[[0, 1, 130, 300], [0, 40, 41, 220]], [[0, 150, 300], [0, 150, 300]]], ids=["ragged", "uniform"]
)
def test_flash_takes_segments(head_size: int, is_causal: bool, edges: list[list[int]]) -> None:
    mask = segments_of(edges, 300, is_causal=is_causal)
    inputs = draw_inputs(2, 4, 300, head_size, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(False)
    check_against_sdpa("flash", "cuda", inputs, mask, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_segments_of_one_length_go_to_flash_by_themselves_and_never_wait() -> None:
    inputs = draw_inputs(2, 4, 300, 64, dtype=torch.bfloat16).to(torch.bfloat16, "cuda")
    mask = segments_of([[0, 150, 300]] * 2, 300, is_causal=True).to("cuda")
    torch.use_deterministic_algorithms(False)
    interval_attention(inputs.q, inputs.k, inputs.v, mask)  # checks the backend's values
    reset_backend_counts()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = interval_attention(inputs.q, inputs.k, inputs.v, mask)
        torch.autograd.grad(out, inputs[:3], inputs.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    has_flash4 = why_not_flash4(inputs.q, mask, has_extras=False) is None
    assert backend_counts() == {"flash4" if has_flash4 else "flash": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_runs_and_extras_keep_to_triton() -> None:
    inputs = draw_inputs(1, 2, 64, 64, dtype=torch.bfloat16).to(torch.bfloat16, "cuda")
    mask = IntervalMask.causal(64, device="cuda")
    reset_backend_counts()
    interval_attention(inputs.q, inputs.k, inputs.v, mask)  # the fixture has made algorithms deterministic
    torch.use_deterministic_algorithms(False)
    interval_attention(inputs.q, inputs.k, inputs.v, mask, dropout=0.1)
    assert backend_counts() == {"triton": 2}


def test_rows_beyond_32_bits_are_refused_by_triton() -> None:
    from metalm.kernels.triton_attention import triton_attention

    fused = torch.empty(1, 350_000, 3, 16, 128, device="meta", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(2))
    with pytest.raises(ValueError, match=r"give a smaller training\.micro_batch_size"):
        triton_attention(q, k, v, IntervalMask.causal(350_000, device="meta"), None, 1.0, None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of q of the calls of PyTorch's operation."""
    shapes: list[torch.Size] = []
    forward = fused_tiles._forward

    def count(q: torch.Tensor, *others: torch.Tensor, **options: object) -> tuple[torch.Tensor, ...]:
        shapes.append(q.shape)
        return forward(q, *others, **options)

    monkeypatch.setattr(fused_tiles, "_forward", count)
    return shapes


def short_runs(num_rows: int, kind: str) -> IntervalMask:
    """Runs of 20 to 32 of 300 elements, and padding behind them."""
    generator = torch.Generator().manual_seed(0)
    start, end = torch.full((num_rows, 300), -1), torch.zeros(num_rows, 300, dtype=torch.int64)
    for row in range(num_rows):
        first = 0
        while first < 250:
            last = first + int(torch.randint(20, 33, (), generator=generator))
            start[row, first:last], end[row, first:last] = first, last
            first = last
    if kind == "spans":
        return IntervalMask.packed_spans(start.clamp(min=0), end)
    # Of a semi-causal document the last ten are seen by each other, too: their keys are seen by two runs.
    span_end = torch.where(torch.arange(300) >= end - 10, end, 0) if kind == "semi-causal" else None
    return IntervalMask.semi_causal(start, span_end, bidirectional_spans=True)


@dtypes
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", ["causal", "spans", "semi-causal"])
def test_short_runs_are_rows_of_few_operations(
    kind: str, num_rows: int, dtype: torch.dtype, calls: list[torch.Size]
) -> None:
    mask = short_runs(num_rows, kind).validate()
    inputs = draw_inputs(3, 2, 300, 16, dtype=dtype)
    check_against_sdpa("tiled", "cpu", inputs, mask, dtype)
    assert len(calls) <= 6
    assert max(shape[0] for shape in calls) > 4, "of ten runs in each row"


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "whole"])
def test_runs_of_one_length_are_the_rows_of_one_operation(is_causal: bool, calls: list[torch.Size]) -> None:
    start = (torch.arange(600) // 200 * 200)[None]
    mask = (
        IntervalMask.packed_documents(start) if is_causal else IntervalMask.packed_spans(start, start + 200)
    )
    inputs = draw_inputs(1, 2, 600, 16)
    check_against_sdpa("tiled", "cpu", inputs, mask, torch.float32)
    assert calls == [(3, 2, 200, 16)]
