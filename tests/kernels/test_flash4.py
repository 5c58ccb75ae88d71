"""The flash4 backend: when it is taken, what it says where it is not, and its values where there is a GPU."""

import importlib.metadata
import logging
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metalm.kernels import (
    IntervalMask,
    RelativeBias,
    backend_counts,
    flash4,
    interval_attention,
    reset_backend_counts,
)
from metalm.kernels.first_use import problem_of
from metalm.kernels.tiled import tiled_attention

ROOT = Path(__file__).resolve().parents[2]


class OnCuda:
    """A tensor as far as the choice of a backend looks: the real checks, without a device."""

    def __init__(self, num_heads: int, length: int, head_size: int, dtype: torch.dtype = torch.bfloat16):
        self.shape = torch.Size((2, num_heads, length, head_size))
        self.dtype = dtype
        self.device = torch.device("cuda", 0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None, int], None]]:
    """Pretends a version of the package, and a device's compute capability."""

    def pretend(version: str | None, major: int = 9) -> None:
        def found(name: str) -> str:
            assert name == "flash-attn-4"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        flash4._why_not_installed.cache_clear()

    yield pretend
    flash4._why_not_installed.cache_clear()


@pytest.mark.parametrize(
    ("version", "major", "q", "extras", "reason"),
    [
        (flash4.VERSION, 9, OnCuda(4, 300, 64), False, None),
        (flash4.VERSION, 10, OnCuda(4, 300, 128, torch.float16), False, None),
        (None, 9, OnCuda(4, 300, 64), False, "which is not installed: pip install 'metalm[flash]'"),
        ("3.9", 9, OnCuda(4, 300, 64), False, f"needs flash-attn-4 {flash4.VERSION}, found 3.9"),
        (flash4.VERSION, 8, OnCuda(4, 300, 64), False, "got tensors on cuda:0 of compute capability 8"),
        (
            flash4.VERSION,
            12,
            OnCuda(4, 300, 64),
            False,
            "takes masks whose segments are known on compute capability 12",
        ),
        (flash4.VERSION, 9, OnCuda(4, 300, 64, torch.float32), False, "got torch.float32"),
        (flash4.VERSION, 9, OnCuda(4, 300, 256), False, "up to 128, got 256"),
        (flash4.VERSION, 9, OnCuda(4, 300, 60), False, "divide by 8"),
        (flash4.VERSION, 9, OnCuda(4, 300, 64), True, "takes no bias and no dropout"),
    ],
)
def test_what_it_takes(
    installed: Callable[[str | None, int], None],
    version: str | None,
    major: int,
    q: Tensor,
    extras: bool,
    reason: str | None,
) -> None:
    installed(version, major)
    found = flash4.why_not_flash4(q, flash4._small_mask("intervals", None), has_extras=extras)
    assert found is None if reason is None else reason in str(found)


def test_it_leaves_deterministic_runs_to_others(installed: Callable[..., None]) -> None:
    installed(flash4.VERSION)
    torch.use_deterministic_algorithms(True)
    try:
        found = flash4.why_not_flash4(OnCuda(4, 300, 64), IntervalMask.causal(300), has_extras=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == "does not add gradients up in one order"


def test_forcing_it_where_it_cannot_run_says_why() -> None:
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="the flash4 backend needs CUDA .* got tensors on cpu"):
        interval_attention(q, q, q, IntervalMask.causal(8), backend="flash4")


def test_it_knows_which_masks_are_plain() -> None:
    documents = IntervalMask.packed_documents(torch.tensor([[0, 0, 2, 2, 4, 4]]))
    spans = torch.tensor([[0, 0, 0, 3, 3, 3]])
    meta = torch.device("meta")  # leaving the CPU, masks find their segments
    assert flash4._form(IntervalMask.causal(6)) == "causal"
    assert flash4._form(IntervalMask.whole(6, 6)) == "whole"
    assert flash4._form(documents.to(meta)) == "causal"
    assert flash4._form(IntervalMask.packed_spans(spans, spans + 3).to(meta)) == "whole"
    assert flash4._form(IntervalMask.packed_documents(spans).to(meta)) == "causal"
    assert flash4._form(IntervalMask.packed_documents(spans[:, :5]).to(meta)) == "intervals"
    for kind in (("causal", True), ("whole", False), ("intervals", True), ("intervals", False)):
        small = flash4._small_mask(*kind).validate().to(meta)
        assert small.segments is not None
        assert (flash4._form(small), small.segments.is_causal) == kind
    assert flash4._form(IntervalMask.causal(3, 6)) == "intervals"
    assert flash4._small_mask("intervals", None).validate().segments is None


def test_values_that_differ_and_failures_are_told() -> None:
    mask = flash4._small_mask("intervals", None)

    def right(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
        return tiled_attention(q, k, v, mask, None, scale, None)

    def without_keys_gradient(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
        return right(q, k, v, mask, scale) + 0.0 * torch.sqrt(k - k).sum()

    def failing(*_: object) -> Tensor:
        raise AssertionError("no such kernel\nand more")

    def check(attention: Callable[..., Tensor]) -> str | None:
        return problem_of(attention, mask, dtype=torch.float32, head_size=16, is_grouped=True)

    assert check(right) is None
    assert "differs from the reference by" in str(check(lambda *inputs: 1.1 * right(*inputs)))
    assert check(without_keys_gradient) == "differs from the reference by nan of its norm"
    assert check(failing) == "failed: no such kernel"


def test_the_extra_pins_the_version_that_is_taken() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert any(line.startswith(f"flash-attn-4[cu13]=={flash4.VERSION}") for line in extras["flash"])
    assert "flash" not in str(extras["dev"])


def why_not_here() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    q = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    reason = flash4.why_not_flash4(q, IntervalMask.causal(1), has_extras=False)
    return None if reason is None else f"flash4 {reason}"


def masks(length: int) -> dict[str, IntervalMask]:
    """Every kind: its own forms, and intervals of full blocks, partial ones, and queries that see nothing."""
    edges = torch.tensor([0, 1, 1 + length // 2, length - length // 8, length])
    lengths = edges.diff()
    start = edges[:-1].repeat_interleave(lengths)[None]
    end = edges[1:].repeat_interleave(lengths)[None]
    padded = torch.where(torch.arange(length) >= length - length // 8, -1, start)
    inside = torch.arange(length) - start
    span_end = torch.where(inside % 64 < 24, start + inside // 64 * 64 + 24, 0).minimum(end)
    image = torch.arange(length)[None] // 160 * 160
    return {
        "causal": IntervalMask.causal(length),
        "whole": IntervalMask.whole(length, length),
        "more keys than queries": IntervalMask.causal(length, length + 77),
        "packed documents": IntervalMask.packed_documents(padded),
        "semi-causal": IntervalMask.semi_causal(padded, span_end, bidirectional_spans=True),
        "encoder": IntervalMask.packed_spans(start, torch.where(padded < 0, 0, end)),
        "padded rows": IntervalMask.padded(torch.tensor([length - 150, length // 3]), length),
        "images": IntervalMask.packed_spans(image, image + 160),
    }


@pytest.mark.gpu
@pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))
@pytest.mark.parametrize("num_key_heads", [4, 2], ids=["own keys", "grouped"])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kind", masks(640))
def test_values_and_gradients(kind: str, head_size: int, num_key_heads: int) -> None:
    mask = masks(640)[kind].validate().to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(num_heads: int, length: int) -> Tensor:
        shape = (2, length, num_heads, head_size)
        drawn = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return drawn.transpose(1, 2).requires_grad_()

    q, grad = draw(4, mask.num_queries), draw(4, mask.num_queries).detach()
    k, v = draw(num_key_heads, mask.num_keys), draw(num_key_heads, mask.num_keys)
    reset_backend_counts()
    out = interval_attention(q, k, v, mask, backend="flash4")
    ours = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    assert backend_counts() == {"flash4": 1}
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = interval_attention(*inputs, mask, backend="dense")
    expected = [exact, *torch.autograd.grad(exact, inputs, grad.double())]
    for one, other in zip(ours, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-2
    hidden = (mask.end <= mask.start).expand(2, -1)
    for values in ours[:2]:
        assert not values.transpose(1, 2)[hidden].any()


@pytest.mark.gpu
@pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))
def test_it_is_chosen_checked_once_and_never_waits(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = (
        torch.randn(2, 640, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    bias = RelativeBias(torch.randn(4, 32, device="cuda"))
    flash4._is_right.cache_clear()
    with caplog.at_level(logging.INFO, logger="metalm.kernels"):
        interval_attention(q, k, v, masks(640)["causal"].to("cuda"))
    assert [record.getMessage() for record in caplog.records].count(
        f"compiles FlashAttention {flash4.VERSION} for head size 64, torch.bfloat16, causal"
    ) == 1
    mask = masks(640)["causal"].to("cuda")
    reset_backend_counts()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            out = interval_attention(q, k, v, mask)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert backend_counts() == {"flash4": 2}
    interval_attention(q, k, v, mask, dropout=0.1)
    interval_attention(q, k, v, mask, bias=bias)
    # The kernels of ours that were tuned here are faster under masks of shorter runs.
    interval_attention(q, k, v, masks(640)["semi-causal"].to("cuda"))
    assert backend_counts() == {"flash4": 2, "triton": 3}


@pytest.mark.gpu
@pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))
@pytest.mark.parametrize("kind", ["causal", "semi-causal"])
def test_it_runs_in_a_graph(kind: str) -> None:
    mask = masks(640)[kind].to("cuda")
    shape = (2, 640, 4, 64)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]
    q, k, v, grad = inputs

    def step() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = interval_attention(*leaves, mask, backend="flash4")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in inputs:
        x.copy_(torch.randn_like(x))
    expected = step()
    graph.replay()
    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
