"""A rank that hangs ends, also where what it leaves behind cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metalm.errors import EXIT_FAULT

HANGS = """
import sys, time
from pathlib import Path
from metalm.training import watchdog

watchdog._GRACE_S = 1.0
if sys.argv[2] == "waits":  # as a server of files that does not answer
    watchdog.record_end = lambda *_: time.sleep(1000)
watchdog.Watchdog(Path(sys.argv[1]), rank=0, limit_minutes=0.01).beat("step 3")
time.sleep(60)
"""


@pytest.mark.parametrize("storage", ["writes", "fails", "waits"])
def test_a_process_that_hangs_ends(storage: str, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    if storage == "fails":
        logs.write_text("")  # no folder can be made here
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(logs), storage], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == EXIT_FAULT, ended.stderr
    assert "metalm: rank 0 has hung for" in ended.stderr
    assert "while step 3" in ended.stderr
    stacks = ended.stderr if storage == "fails" else (logs / "stacks_rank_00000.txt").read_text()
    assert 'File "<string>"' in stacks
    assert ("they cannot be written" in ended.stderr) == (storage == "fails")
