"""Remove old checkpoints of a run and what killed saves left. Refused while the run is training.

Example: python tools/prune_checkpoints.py runs/demo --keep-last 2 --keep-every-steps 1000
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from metalm.checkpoint.folders import checkpoints_of, prune_checkpoints
from metalm.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints
from metalm.cli import ToolParser, run_tool
from metalm.commands.argument_types import positive
from metalm.errors import CheckpointError
from metalm.progress import Phase
from metalm.run_lock import RunLock


def folders_to_lock(checkpoints: Path) -> set[Path]:
    """Of the runs whose checkpoints these are, by the path that was given and by where links lead."""
    named = (checkpoints.absolute(), checkpoints.resolve())
    return {path.parent.resolve() for path in named if path.name == CHECKPOINTS_NAME} or {checkpoints}


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--keep-last", type=int, default=1, help="at least 1 (default: %(default)s)")
    parser.add_argument("--keep-every-steps", type=positive, help="multiples of this stay")
    options = parser.parse_args()
    if options.keep_last < 1:
        parser.error("--keep-last must be at least 1: the only whole checkpoint is never removed")
    checkpoints = checkpoints_of(options.run)
    if not list_checkpoints(checkpoints):
        raise CheckpointError(f"{options.run} is no run folder that holds a checkpoint")
    with ExitStack() as locks:
        for folder in sorted(folders_to_lock(checkpoints)):
            locks.callback(RunLock(folder).release)
        with Phase(f"removing checkpoints of {options.run}"):
            removed = prune_checkpoints(checkpoints, options.keep_last, options.keep_every_steps)
        for folder in removed:
            print(f"removed {folder}")


if __name__ == "__main__":
    run_tool(main)
