"""What the Triton kernels become on a device that is not here: registers, spills, shared memory."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metalm.kernels import triton_loss
from metalm.kernels.triton_activation import BLOCK, NUM_WARPS, activation_gradient_kernel, activation_kernel
from metalm.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel
from metalm.kernels.triton_blocks import block_ranges_kernel
from metalm.kernels.triton_configs import Kernel, LaunchConfig, config_for
from metalm.kernels.triton_forward import forward_kernel
from metalm.kernels.triton_hidden_dropout import hidden_dropout_kernel
from metalm.kernels.triton_norm import launch_sizes, residual_norm_gradient_kernel, residual_norm_kernel
from metalm.kernels.triton_rotary import block_sizes, turn_kernel

_KERNELS = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}
_POINTERS = {"seeds": "*i64", "query_positions": "*i32", "key_positions": "*i32", "positions": "*i32"}
_POINTERS |= dict.fromkeys(("start", "end", "query_start", "query_end", "ranges"), "*i32")
_FLOAT32 = ("log_sum", "delta", "bias", "grad_bias", "mean", "inverse", "sums", "cosines", "sines")
_OF_LOSS = {"labels_ptr": "*i64", "target_ptr": "*fp32", "grad_ptr": "*fp32"}
_FLOATS = ("scale", "scale_log2", "keep_scale", "residual_scale", "eps", "sign")
_OF_BIAS = ("bias_ptr", "grad_bias_ptr")
_OF_DROPOUT = (
    *("seeds_ptr", "query_positions_ptr", "key_positions_ptr"),
    *("threshold", "keep_scale", "head_offset"),
)

_DEFAULT_WARPS, _DEFAULT_STAGES = 4, 3
_WIDTH, _HEADS, _HEAD_SIZE = 2048, 32, 64
_NO_DROPOUT: dict[str, Any] = dict.fromkeys(("seeds_ptr", "positions_ptr"))
_NORM = {"IS_CENTRED": True, "NEEDS_SUMS": True, **launch_sizes(_WIDTH)}
_GELU = {"KIND": "gelu", "IS_GATED": False, "NEEDS_SUMS": True, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
_TURN = {"NUM_PAIRS": _HEAD_SIZE // 2, "HEAD_SIZE": _HEAD_SIZE}
_TURN |= block_sizes(_HEADS, _HEAD_SIZE // 2, _HEAD_SIZE)

ELEMENTWISE: dict[str, tuple[Any, dict[str, Any]]] = {
    "hidden dropout": (hidden_dropout_kernel, {"BLOCK": 1024}),
    "residual and norm": (residual_norm_kernel, _NORM | _NO_DROPOUT),
    "residual and norm, dropout": (residual_norm_kernel, _NORM),
    "gradient of residual and norm": (residual_norm_gradient_kernel, _NORM | _NO_DROPOUT),
    "gradient of residual and norm, dropout": (residual_norm_gradient_kernel, _NORM),
    "gelu": (activation_kernel, _GELU),
    "gradient of gelu": (activation_gradient_kernel, _GELU),
    "swiglu": (activation_kernel, _GELU | {"KIND": "silu", "IS_GATED": True}),
    "gradient of swiglu": (activation_gradient_kernel, _GELU | {"KIND": "silu", "IS_GATED": True}),
    "rotary positions": (turn_kernel, _TURN),
}
"""By name: the kernel and its constants."""


@dataclass(frozen=True)
class CompileReport:
    """Of one compiled kernel, for one thread or one program."""

    registers: int
    spilled_bytes: int
    """Stack of a thread: what did not fit into registers."""
    shared_bytes: int
    wgmma: int
    """Warp-group matrix instructions in the code."""
    seconds: float
    """That compiling took."""


class Compiled(NamedTuple):
    """A kernel of the report, as the table launches it."""

    kernel: str
    head_size: int | None
    """Of attention."""
    features: str
    config: str
    report: CompileReport


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"groups": 4},
    "bias": {"has_bias": True},
    "dropout": {"has_dropout": True},
    "bias and dropout": {"has_bias": True, "has_dropout": True},
    "float32": {"is_wide": True},
}
"""Of the attention kernels, as arguments of `compile_ahead`."""


def compile_all(head_sizes: Sequence[int], *, capability: int = 90) -> Iterator[Compiled]:
    """Every kernel, with every feature of the attention kernels by itself, as a launch would configure it."""
    major_minor = divmod(capability, 10)
    for head_size in head_sizes:
        for features, arguments in FEATURES.items():
            for kernel in get_args(Kernel):
                dtype = torch.float32 if "is_wide" in arguments else torch.bfloat16
                has_extras = "has_bias" in arguments or "has_dropout" in arguments
                config = config_for(kernel, head_size, dtype, has_extras=has_extras, capability=major_minor)
                report = compile_ahead(kernel, head_size, config, capability=capability, **arguments)
                yield Compiled(kernel, head_size, features, _told(config), report)
    yield Compiled(
        "block ranges", None, "", "64 over 64, 4 warps", compile_block_ranges(capability=capability)
    )
    block, warps = triton_loss.BLOCK_SIZE, triton_loss.NUM_WARPS
    for name, function in (
        ("loss of logits", triton_loss.logits_loss_kernel),
        ("their gradients", triton_loss.logits_gradient_kernel),
    ):
        report = compile_function(
            function, {"BLOCK": block}, warps, 3, capability=capability, pointers=_OF_LOSS
        )
        yield Compiled(name, None, "", f"{block}, {warps} warps", report)
    for name, (_, constants) in ELEMENTWISE.items():
        sizes = [str(value) for key, value in constants.items() if key.startswith("BLOCK")]
        told = f"{' x '.join(sizes)}, {constants.get('num_warps', _DEFAULT_WARPS)} warps"
        yield Compiled(name, None, "", told, compile_elementwise(name, capability=capability))


def table_of(compiled: Sequence[Compiled]) -> str:
    """In Markdown."""
    lines = [
        "| kernel | head size | feature | block, warps, stages | registers | spilled bytes | shared KiB |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for kernel, head_size, features, config, report in compiled:
        size = "" if head_size is None else str(head_size)
        cells = (kernel, size, features, config, report.registers, report.spilled_bytes)
        told = " | ".join(map(str, cells))
        lines.append(f"| {told} | {report.shared_bytes / 1024:.0f} |")
    return "\n".join(lines)


def _told(config: LaunchConfig) -> str:
    return f"{config.block_q} x {config.block_k}, {config.num_warps}, {config.num_stages}"


def compile_ahead(
    kernel: Kernel,
    head_size: int,
    config: LaunchConfig,
    *,
    is_wide: bool = False,
    has_bias: bool = False,
    has_dropout: bool = False,
    groups: int = 1,
    capability: int = 90,
) -> CompileReport:
    """Compile an attention kernel without a device, by the arguments that a launch would give it.

    Args:
        config: block sizes, warps and stages.
        is_wide: of float32 tensors, not bfloat16.
        has_bias: with a bias, in the backward with its gradient.
        has_dropout: with dropout.
        groups: query heads of a key head.
        capability: compute capability times ten.
    """
    function = _KERNELS[kernel]
    absent = (() if has_bias else _OF_BIAS) + (() if has_dropout else _OF_DROPOUT)
    constants: dict[str, Any] = {
        "HEAD_SIZE": head_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "HAS_BIAS": has_bias,
        "NEEDS_BIAS_GRADIENT": has_bias,
        "HAS_DROPOUT": has_dropout,
        "PRECISION": "ieee" if is_wide else "tf32",
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "GROUPS": groups,
        **dict.fromkeys(absent),
    }
    return compile_function(
        function, constants, config.num_warps, config.num_stages, is_wide=is_wide, capability=capability
    )


def compile_block_ranges(*, capability: int = 90) -> CompileReport:
    """Compile what tells the blocks that attention visits.

    Args:
        capability: compute capability times ten.
    """
    constants = {"ROWS": 64, "OTHERS": 64}
    return compile_function(
        block_ranges_kernel, constants, _DEFAULT_WARPS, _DEFAULT_STAGES, capability=capability
    )


def compile_elementwise(name: str, *, capability: int = 90) -> CompileReport:
    """Compile a kernel of a layer's elementwise work, of bfloat16 vectors of the paper's decoder.

    Args:
        name: one of `ELEMENTWISE`.
        capability: compute capability times ten.
    """
    function, constants = ELEMENTWISE[name]
    sizes = {"num_warps": _DEFAULT_WARPS, **constants}
    return compile_function(function, sizes, sizes["num_warps"], _DEFAULT_STAGES, capability=capability)


def compile_function(
    function: Any,
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    *,
    is_wide: bool = False,
    capability: int = 90,
    pointers: Mapping[str, str] = MappingProxyType({}),
) -> CompileReport:
    """Compile any of our kernels; `constants` that it has no argument for are left out.

    Tensors are aligned to 16 bytes, strides and widths divide by 16, as in a model. `pointers` are the types
    of arguments that are not those of the attention kernels of that name.
    """
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    tensor = "*fp32" if is_wide else "*bf16"
    signature = {name: pointers.get(name) or _type(name, tensor) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if name.endswith("_ptr") or "stride" in name or name == "width"]
    source = ASTSource(
        function,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    began = time.perf_counter()
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.perf_counter() - began
    usage = _resource_usage(compiled.asm["cubin"])
    return CompileReport(
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
        seconds=seconds,
    )


def _type(name: str, tensor: str) -> str:
    stem = name.removesuffix("_ptr")
    if name == stem:
        return "fp32" if name in _FLOATS else "i32"
    return _POINTERS.get(stem, "*fp32" if stem in _FLOAT32 else tensor)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a thread, by the names that CUDA's tool gives them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = (word.split(":") for word in told.split() if word.count(":") == 1)
    return {name: int(value) for name, value in pairs if name in ("REG", "STACK", "LOCAL")}
