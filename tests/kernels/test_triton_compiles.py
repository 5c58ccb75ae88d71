"""The Triton kernels compile for Hopper, without a device: the interpreter accepts more than the compiler.

Run as a script, this file prints the facts about each compiled kernel, in a process without the interpreter.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from metalm.kernels.triton_configs import Kernel, LaunchConfig

# Bytes of shared memory that a program may use on compute capability 9.0.
HOPPER_SHARED_BYTES = 232_448


def compile_table() -> dict[str, dict[str, Any]]:
    """The kernels of the table, what tells their blocks, elementwise work, and an odd head size in groups."""
    from metalm.kernels.compile_report import (
        ELEMENTWISE,
        compile_ahead,
        compile_block_ranges,
        compile_elementwise,
    )
    from metalm.kernels.triton_configs import configs_of

    reports = {name: compile_elementwise(name) for name in ELEMENTWISE}
    reports["block ranges"] = compile_block_ranges()
    for variant, config in configs_of((9, 0)).items():
        extras = variant.has_extras
        name = f"{variant.kernel}, {variant.head_block}{', bias and dropout' * extras}"
        reports[name] = compile_ahead(
            variant.kernel, variant.head_block, config, has_bias=extras, has_dropout=extras
        )
    for kernel in get_args(Kernel):
        odd = LaunchConfig(32, 64, 8, 2) if kernel == "key_gradient" else LaunchConfig(64, 32, 8, 2)
        reports[f"{kernel}, 80 of grouped heads, bias and dropout"] = compile_ahead(
            kernel, 80, odd, has_bias=True, has_dropout=True, groups=2
        )
    return {name: dataclasses.asdict(report) for name, report in reports.items()}


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
    others = [name for name, facts in kernels.items() if not facts["wgmma"]]
    assert (len(kernels), len(others)) == (26, 11), f"without tensor cores: {', '.join(others)}"
    for name, facts in kernels.items():
        assert facts["shared_bytes"] <= HOPPER_SHARED_BYTES, name
        assert not facts["spilled_bytes"], f"{name} spills {facts['spilled_bytes']} bytes"


if __name__ == "__main__":
    print(json.dumps(compile_table()))
