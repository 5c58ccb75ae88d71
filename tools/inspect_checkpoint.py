"""Show what a checkpoint holds, check that it is whole, or compare it with another.

Example: python tools/inspect_checkpoint.py runs/demo --compare runs/demo/checkpoints/step_00000600
"""

from __future__ import annotations

from pathlib import Path

from metalm.checkpoint.format import AVERAGE, STATES
from metalm.cli import ToolParser, run_tool
from metalm.progress import Phase


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a step folder, or a run folder for its latest")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="show how each parameter differs")
    parser.add_argument("--state", choices=(*STATES, AVERAGE), default="master", help="what is compared")
    parser.add_argument("--no-verify", action="store_true", help="do not hash the files")
    options = parser.parse_args()

    with Phase("loading torch"):
        from metalm.checkpoint.folders import find_checkpoint
        from metalm.checkpoint.inspection import compare_checkpoints, describe_checkpoint
        from metalm.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(find_checkpoint(options.checkpoint), verify=not options.no_verify)
    print(reader.folder)
    print(describe_checkpoint(reader))
    if not options.no_verify:
        print(f"{'files are':<14}as the manifest says")
    if options.compare is None:
        return
    other = CheckpointReader(find_checkpoint(options.compare), verify=not options.no_verify)
    print(f"\n{'largest':>12}{'relative':>12}  {options.state} against {other.folder}")
    for difference in compare_checkpoints(reader, other, options.state):
        print(
            f"{difference.largest:12.4g}{difference.relative:12.4g}  {difference.component}/{difference.name}"
        )


if __name__ == "__main__":
    run_tool(main)
