"""The Triton kernels compile for Hopper, without a device: the interpreter accepts more than the compiler.

Run as a script, this file prints the facts about each compiled kernel, in a process without the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Bytes of shared memory that a program may use on compute capability 9.0.
HOPPER_SHARED_BYTES = 232_448
POINTERS = {"start": "*i32", "end": "*i32", "query_start": "*i32", "query_end": "*i32"}
POINTERS |= {"seeds": "*i64", "query_positions": "*i32", "key_positions": "*i32", "positions": "*i32"}
FLOATS = ("log_sum", "delta", "bias", "grad_bias")


def compile_kernel(kernel: Any) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel if isinstance(kernel, triton.JITFunction) else kernel.fn
    constants: dict[str, Any] = {
        "HEAD_SIZE": 80,
        "BLOCK_D": 128,
        "HAS_BIAS": True,
        "HAS_DROPOUT": True,
        "PRECISION": "tf32",
        "BLOCK_Q": 64,
        "BLOCK_K": 64,
        "GROUPS": 2,
        "BLOCK": 1024,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {}
    for name in function.arg_names:
        tensor = name.removesuffix("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif name != tensor:
            signature[name] = POINTERS.get(tensor, "*fp32" if tensor in FLOATS else "*bf16")
        else:
            signature[name] = "fp32" if name in ("scale", "scale_log2", "keep_scale") else "i32"
    aligned = [
        index for index, name in enumerate(function.arg_names) if name.endswith("_ptr") or "stride" in name
    ]
    source = ASTSource(
        function,
        signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"shared": compiled.metadata.shared, "wgmma": compiled.asm["ptx"].count("wgmma.mma_async")}


def main() -> None:
    from metalm.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel
    from metalm.kernels.triton_forward import forward_kernel
    from metalm.kernels.triton_hidden_dropout import hidden_dropout_kernel

    kernels = (forward_kernel, query_gradient_kernel, key_gradient_kernel, hidden_dropout_kernel)
    facts = {kernel.fn.__name__: compile_kernel(kernel) for kernel in kernels}
    print(json.dumps(facts))


@pytest.mark.timeout(240)
def test_kernels_with_all_features_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout.splitlines()[-1])
    assert len(kernels) == 4
    for name, facts in kernels.items():
        assert facts["shared"] <= HOPPER_SHARED_BYTES, name
        assert facts["wgmma"] > 0 or name == "hidden_dropout_kernel", f"{name} does not use the tensor cores"


if __name__ == "__main__":
    main()
