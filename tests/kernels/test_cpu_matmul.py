"""Matrix products by oneDNN: their values against float64, and where they are taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metalm.kernels import cpu_matmul

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)

# Rows, inner size, columns: on both sides of where oneDNN is asked.
SIZES = [(300, 96, 130), (3, 700, 1100), (2100, 1000, 1), (5, 7, 3), (1100, 700, 3), (0, 4, 6), (4, 0, 6)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(rows: int, inner: int, columns: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """As a linear layer's forward and its backward have them: contiguous, and transposed views."""
    left, right = draw(rows, inner, dtype=dtype), draw(inner, columns, dtype=dtype, seed=1)
    return [(a, b) for a in (left, left.t().contiguous().t()) for b in (right, right.t().contiguous().t())]


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_float64(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    rows, inner, columns = size
    for left, right in operands(rows, inner, columns, dtype):
        wanted = left.double() @ right.double()
        scale = max(1.0, inner**0.5)
        found = cpu_matmul._mm(left, right)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * scale)
        for bias in (draw(columns, dtype=dtype, seed=2), draw(rows, columns, dtype=dtype, seed=2)):
            for factors in ({}, {"beta": 0.5, "alpha": 2.0}):
                wanted_sum = torch.addmm(bias.double(), left.double(), right.double(), **factors)
                found_sum = cpu_matmul._addmm(bias, left, right, **factors)
                torch.testing.assert_close(found_sum.double(), wanted_sum, rtol=0, atol=2 * tolerance * scale)


@needs_onednn
def test_views_of_any_strides_are_multiplied() -> None:
    rows, inner, columns = 300, 96, 130
    left, right, bias = draw(rows, inner), draw(inner, columns, seed=1), draw(columns, seed=2)
    lefts = {
        "one row": left[:1].expand(rows, inner),
        "one column": left[:, :1].expand(rows, inner),
        "one number": left[:1, :1].expand(rows, inner),
        "columns of a wider one": draw(rows, 3 * inner)[:, inner + 1 : 2 * inner + 1],
        "every second column": draw(rows, 2 * inner)[:, ::2],
        "not aligned": draw(rows * inner + 1)[1:].view(rows, inner),
        "one row, transposed": left[:1].t().expand(inner, rows).t(),
    }
    rights = {
        "itself": right,
        "one row": right[:1].expand(inner, columns),
        "every second row": draw(2 * inner, columns)[::2],
    }
    biases = {"itself": bias, "one number": bias[:1].expand(columns), "every second": draw(2 * columns)[::2]}
    for a in lefts.values():
        for b in rights.values():
            wanted = a.double() @ b.double()
            torch.testing.assert_close(cpu_matmul._mm(a, b).double(), wanted, rtol=1e-5, atol=1e-4)
            for one in biases.values():
                found = cpu_matmul._addmm(one, a, b).double()
                torch.testing.assert_close(found, wanted + one.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_a_bias_of_another_type_is_pytorch_s_to_judge(dtype: torch.dtype) -> None:
    left, right, bias = draw(300, 96), draw(96, 130), torch.ones(130, dtype=dtype)
    with pytest.raises(RuntimeError) as theirs:
        torch.addmm(bias, left, right)
    with pytest.raises(RuntimeError) as ours:
        cpu_matmul._addmm(bias, left, right)
    assert str(ours.value) == str(theirs.value)


PROGRAM = """
import torch
from metalm.kernels.cpu_matmul import multiply_by_onednn

one = torch.ops.mkldnn._linear_pointwise
x = torch.randn(300, 96, requires_grad=True)
layer = torch.nn.Linear(96, 130)
before = layer(x)
taken = multiply_by_onednn()
assert multiply_by_onednn() == taken
layer(x).square().sum().backward()
with torch.no_grad():
    out = one(x, layer.weight, layer.bias, "none", [], "")
    bits = out if taken else before
    torch.testing.assert_close(layer(x), bits, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, 2 * out @ layer.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, 2 * out.t() @ x, rtol=1e-4, atol=1e-3)
try:
    torch.ones(3, 4) @ torch.ones(3, 4)
    raise SystemExit("these have no product")
except RuntimeError as error:
    assert "cannot be multiplied" in str(error), error
assert (torch.eye(2, dtype=torch.complex64) @ torch.eye(2, dtype=torch.complex64)).sum() == 2
print(taken)
"""


def run_program(tmp_path: Path, maker: str, **environment: str) -> str:
    """What the program says on a CPU of a maker."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nvendor_id\t: {maker}\n")
    paths = "from pathlib import Path\nfrom metalm.kernels import cpu_matmul\n"
    paths += f"cpu_matmul._CPU_INFO = Path({str(info)!r})\n"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", paths + PROGRAM],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@needs_onednn
def test_linear_layers_go_through_it_where_mkl_is_slow(tmp_path: Path) -> None:
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert run_program(tmp_path, "AuthenticAMD") == str(is_wide)


def test_intel_s_cpus_and_those_who_switch_it_off_keep_pytorch_s_own(tmp_path: Path) -> None:
    assert run_program(tmp_path, "GenuineIntel") == "False"
    assert run_program(tmp_path, "AuthenticAMD", METALM_ONEDNN="0") == "False"


@needs_onednn
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (1, 2), (160, 1), (1, 160), (160, 2), (7, 3)], ids=str)
def test_windows_that_overlap_are_left_to_pytorch(strides: tuple[int, int]) -> None:
    """On either side, as a layer over windows has them forwards and backwards."""
    windows, right = draw(100_000).as_strided((200, 400), strides), draw(400, 80, seed=1)
    for left, other in ((windows, right), (right.t(), windows.t()), (windows.t(), draw(200, 80, seed=2))):
        wanted = left.contiguous() @ other.contiguous()
        torch.testing.assert_close(cpu_matmul._mm(left, other), wanted, atol=1e-4, rtol=1e-4)
