"""The README's tables are those of the figures that are kept beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tools" / "measured" / "h200_2026-11-27.json"


def test_the_readme_shows_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "tools/check_gpu.py"), "--table", str(MEASURED)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("|") and "forward" in line]
    assert len(rows) == 12
    shown = (ROOT / "src/metalm/kernels/README.md").read_text()
    assert [row for row in rows if row not in shown] == []
