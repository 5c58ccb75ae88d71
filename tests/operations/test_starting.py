"""How commands with ranks start."""

import subprocess
import sys

PROGRAM = """
import sys
from metalm.commands.starting import set_up_libraries
set_up_libraries()
assert "megatron.core.models.gpt.gpt_model" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
import torch
calls = []
def backend(module, inputs):
    calls.append(module)
    return module.forward
assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1)).item() == 2
print(len(calls))
"""


def test_torch_s_compiler_is_not_imported_with_megatron_and_serves_what_a_run_compiles() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.split() == ["1"], result.stderr
