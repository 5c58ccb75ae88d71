"""Start a program on several real ranks and collect what it wrote; a hang is a failure with stacks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
_ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}


def run_ranks(program: str, num_ranks: int, *arguments: str, timeout_s: int = 280) -> list[Any]:
    """Run `programs/PROGRAM.py ARGUMENTS` under torchrun; answer the lines `RESULT {json}` of all ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(PROGRAMS / f"{program}.py"), *arguments]
    code, output = run_command(command, timeout_s)
    assert code == 0, f"{program} on {num_ranks} rank(s) ended with {code}:\n{output[-6000:]}"
    # Anywhere in a line: another rank may have written half a line before, or one behind it.
    decoder = json.JSONDecoder()
    results = [decoder.raw_decode(output, found.end())[0] for found in re.finditer(r"RESULT (?=\{)", output)]
    assert results, f"{program} wrote no result:\n{output[-6000:]}"
    return results


def run_command(command: list[str], timeout_s: int, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command in a process group of its own, ended as one when it hangs."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **_ENVIRONMENT, **environment},
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # the ranks' faulthandler writes their stacks
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"{' '.join(command)} hung for {timeout_s} s:\n{output[-6000:]}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output
