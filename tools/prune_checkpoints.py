"""Remove old checkpoints of a run and what killed saves left. Not while the run is saving.

Example: python tools/prune_checkpoints.py runs/demo --keep-last 2 --keep-every-steps 1000
"""

from __future__ import annotations

from pathlib import Path

from metalm.checkpoint.folders import find_checkpoint, prune_checkpoints
from metalm.cli import ToolParser, run_tool


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--keep-last", type=int, default=1, help="at least 1 (default: %(default)s)")
    parser.add_argument("--keep-every-steps", type=int, help="multiples of this stay")
    options = parser.parse_args()
    if options.keep_last < 1:
        parser.error("--keep-last must be at least 1: the only whole checkpoint is never removed")
    checkpoints = find_checkpoint(options.run).parent
    for folder in prune_checkpoints(checkpoints, options.keep_last, options.keep_every_steps):
        print(f"removed {folder}")


if __name__ == "__main__":
    run_tool(main)
