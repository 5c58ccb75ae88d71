"""Prepare images with captions: img2dataset folders, COCO captions, tables, parquet to shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Example: python tools/prepare_image_text.py captions_train2014.json --image-folder train2014 --out data/coco
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.pair_arguments import add_pair_arguments, run_preparation
from metalm.modalities import MEDIA


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="folder of tars or of images with .txt beside them; COCO captions .json; .csv, .tsv, .jsonl or "
        ".parquet",
    )
    parser.add_argument(
        "--image-folder", type=Path, help="image paths are relative to it (default: the folder of the file)"
    )
    add_pair_arguments(parser, MEDIA["image"])
    options = parser.parse_args()
    run_preparation(parser, options, MEDIA["image"], options.image_folder)


if __name__ == "__main__":
    run_tool(main)
