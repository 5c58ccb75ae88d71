"""Make an exported model the first checkpoint of a run, to train it further on any layout.

Example:
    python tools/convert_from_hf.py exported/demo pipelines/demo.yaml run.name=further
    torchrun --nproc-per-node 2 -m metalm train pipelines/demo.yaml run.name=further
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.config import load_config
from metalm.progress import Phase


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="exported, or saved by transformers")
    parser.add_argument("pipeline", type=Path, help="of the run that is to go on from it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()

    with Phase("loading transformers"):
        from metalm.conversion.restore import restore_checkpoint

    checkpoint = restore_checkpoint(options.folder, load_config(options.pipeline, options.overrides))
    print(f"wrote {checkpoint}")


if __name__ == "__main__":
    run_tool(main)
