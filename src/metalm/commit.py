"""Which commit the running code is."""

from __future__ import annotations

import subprocess
from pathlib import Path

from metalm.run_folder import COMMIT_NAME


def git_commit() -> str | None:
    """The commit, with a mark if files were changed since; of a snapshot, as `tools/submit.py` noted it."""
    above = Path(__file__).parents[1]
    noted = above.parent / COMMIT_NAME
    if noted.is_file():
        return noted.read_text().strip()
    if above.name != "src":  # installed, perhaps inside another repository
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
