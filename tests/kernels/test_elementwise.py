"""The elementwise work of layers, plain and in Triton, against formulas in float64."""

import math

import pytest
import torch
from torch import Tensor

from metalm.kernels import HiddenPattern, activate, hidden_dropout, residual_norm, turn

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
backends = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("torch", "cpu", id="torch"),
        pytest.param("triton", "cpu", id="triton-interpreted", marks=on_cpu),
        pytest.param("triton", "cuda", id="triton-compiled", marks=on_gpu),
    ],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
EPS = 1e-5


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def compare(
    outputs: list[Tensor],
    expected: list[Tensor],
    inputs: list[Tensor],
    wide: list[Tensor],
    weights: list[Tensor],
) -> None:
    """Values, and the gradients of all inputs under weights of the outputs."""
    tolerance = TOLERANCE[outputs[0].dtype]
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found.double().cpu(), wanted, atol=tolerance, rtol=tolerance)
    grads = torch.autograd.grad(outputs, inputs, weights)
    wanted_grads = torch.autograd.grad(expected, wide, [weight.double().cpu() for weight in weights])
    for found, wanted in zip(grads, wanted_grads, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found.double().cpu(), wanted, atol=tolerance * scale, rtol=tolerance)


def widen(inputs: list[Tensor]) -> list[Tensor]:
    return [part.detach().double().cpu().requires_grad_() for part in inputs]


def norm(total: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    centred = total - total.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def pattern(rows: int, device: str) -> HiddenPattern:
    seeds, positions = torch.arange(rows, device=device) // 3, torch.arange(rows, device=device) % 3
    return HiddenPattern(0.3, seeds[:, None], positions[:, None], site=5)


@backends
@dtypes
@pytest.mark.parametrize("width", [48, 301])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("has_dropout", [False, True], ids=["kept", "dropped"])
def test_residual_norm(
    kind: str, width: int, has_dropout: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    """All three outputs are used, as no layer does at once."""
    rows, scale = 7, 1.7
    shapes = [(rows, 1, width), (rows, 1, width), (width,), (width,)] + [(width,)] * (kind == "layer_norm")
    inputs = [draw(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    branch, residual, branch_bias, *parameters = inputs
    dropout = pattern(rows, device) if has_dropout else None
    options = {"kind": kind, "eps": EPS, "residual_scale": scale, "backend": backend}
    found = residual_norm(branch, residual, *parameters, branch_bias=branch_bias, dropout=dropout, **options)
    kept = 1.0 if dropout is None else dropout.keep(width).double().cpu() / 0.7

    wide = widen(inputs)
    total = (wide[0] + wide[2]) * kept + scale * wide[1]
    normed = norm(total, wide[3], wide[4] if kind == "layer_norm" else None)
    weights = [draw(rows, 1, width, dtype=dtype, device=device, seed=9 + n).detach() for n in range(3)]
    compare(list(found), [normed, normed, total], inputs, wide, weights)


@backends
@dtypes
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_a_norm_alone_adds_the_stream_s_gradient(
    kind: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    inputs = [draw(5, 96, dtype=dtype, device=device)]
    inputs += [
        draw(96, dtype=dtype, device=device, seed=n) for n in range(1, 3 if kind == "layer_norm" else 2)
    ]
    hidden, *parameters = inputs
    found = residual_norm(None, hidden, *parameters, kind=kind, eps=EPS, backend=backend)
    wide = widen(inputs)
    expected = norm(*wide, *[None] * (3 - len(wide)))
    weights = [draw(5, 96, dtype=dtype, device=device, seed=9 + n).detach() for n in range(2)]
    compare([found.normed, found.total], [expected, wide[0]], inputs, wide, weights)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


@backends
@dtypes
@pytest.mark.parametrize("function", [gelu, gelu_tanh, silu])
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_activations_with_their_bias(
    function, is_gated: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    """More columns than a block of the kernel holds, more rows than it has groups of."""
    rows, width = 3, 1100
    wide_width = 2 * width if is_gated else width
    inner = draw(rows, wide_width, dtype=dtype, device=device)
    bias = draw(wide_width, dtype=dtype, device=device, seed=1)
    found = activate(inner, function.__name__, is_gated=is_gated, bias=bias, backend=backend)
    wide = widen([inner, bias])
    added = wide[0] + wide[1]
    expected = function(added)
    if is_gated:
        expected = function(added[:, :width]) * added[:, width:]
    grad = draw(rows, width, dtype=dtype, device=device, seed=2).detach()
    compare([found], [expected], [inner, bias], wide, [grad])
    plain = activate(inner, function.__name__, is_gated=is_gated, backend=backend)
    (wanted,) = torch.autograd.grad(
        activate(wide[0], function.__name__, is_gated=is_gated), wide[0], grad.double().cpu()
    )
    (grad_inner,) = torch.autograd.grad(plain, inner, grad)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(grad_inner.double().cpu(), wanted, atol=tolerance, rtol=tolerance)


@backends
@dtypes
@pytest.mark.parametrize(("head_size", "num_pairs"), [(16, 8), (80, 40), (64, 8)], ids=["16", "80", "part"])
def test_turned_heads_are_complex_products(
    head_size: int, num_pairs: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Heads that stand among others, of which all pairs, or the first, are turned."""
    vectors, heads = 6, 3
    mixed = draw(vectors, 2 * heads, head_size, dtype=dtype, device=device)
    angles = torch.randn(vectors, num_pairs, generator=torch.Generator().manual_seed(3)) * 5
    rotation = torch.stack((angles.cos(), angles.sin())).to(device)
    found = turn(mixed[:, ::2], rotation, backend)
    (wide,) = widen([mixed])
    first, second, rest = wide[:, ::2].split((num_pairs, num_pairs, head_size - 2 * num_pairs), dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones(()).double(), angles.double())[:, None]
    expected = torch.cat((product.real, product.imag, rest), dim=-1)
    grad = draw(vectors, heads, head_size, dtype=dtype, device=device, seed=1).detach()
    compare([found], [expected], [mixed], [wide], [grad])


@backends
def test_a_vector_s_values_do_not_depend_on_the_others(backend: str, device: str) -> None:
    dtype, rows, some = torch.bfloat16, 9, slice(3, 7)
    branch, hidden = (draw(rows, 1, 64, dtype=dtype, device=device, seed=n).detach() for n in range(2))
    weight = draw(64, dtype=dtype, device=device, seed=2).detach()
    rotation = torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(3)).to(device)

    def run(part: slice) -> list[Tensor]:
        whole = pattern(rows, device)
        dropout = HiddenPattern(0.3, whole.seeds[part], whole.positions[part], 5)
        options = {"kind": "layer_norm", "eps": EPS, "dropout": dropout, "backend": backend}
        normed = residual_norm(branch[part], hidden[part], weight, weight, **options)
        turned = turn(hidden[part].view(-1, 4, 16), rotation[:, part].contiguous(), backend)
        return [*normed, activate(hidden[part], "gelu", bias=weight, backend=backend), turned]

    for alone, among in zip(run(some), run(slice(0, rows)), strict=True):
        assert torch.equal(alone, among[some])


def test_the_fused_branch_drops_what_hidden_dropout_drops() -> None:
    pytest.importorskip("triton")
    hidden, weight = torch.ones(6, 1, 301), torch.ones(301)
    dropout = pattern(6, "cpu")
    options = {"kind": "rms_norm", "eps": EPS, "dropout": dropout, "backend": "triton"}
    fused = residual_norm(hidden, torch.zeros_like(hidden), weight, **options).total
    alone = hidden_dropout(hidden, 0.3, dropout.seeds, dropout.positions, 5, backend="torch")
    assert torch.equal(fused, alone)
