"""Prepare images with captions: img2dataset folders, COCO captions or tables to shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Example: python tools/prepare_image_text.py captions_train2014.json --image-folder train2014 --out data/coco
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.image_text import prepare_image_text
from metalm.data.preparation.report import format_table


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="folder of tars or of images with .txt beside them; COCO captions .json; .csv, .tsv or .jsonl",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--image-folder", type=Path, help="image paths are relative to it (default: the folder of the file)"
    )
    parser.add_argument("--path-column", default="path", help="of a table (default: path)")
    parser.add_argument("--caption-column", default="caption", help="of a table (default: caption)")
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shrink larger images to this on their shorter side"
    )
    parser.add_argument(
        "--shard-images", type=int, default=4096, help="most images per shard (default: 4096)"
    )
    parser.add_argument("--shard-mib", type=float, default=512, help="largest size of a shard (default: 512)")
    parser.add_argument(
        "--first-number",
        type=int,
        default=0,
        help="number of the first input, when inputs are prepared apart (default: 0)",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args()
    if options.processes < 1 or options.shard_mib <= 0 or options.shard_images < 1 or options.resize == 0:
        parser.error("--processes, --shard-mib, --shard-images and --resize must be positive")
    if options.first_number < 0:
        parser.error("--first-number must not be negative")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    started = time.monotonic()
    report = prepare_image_text(
        options.inputs,
        options.out,
        image_folder=options.image_folder,
        path_column=options.path_column,
        caption_column=options.caption_column,
        shorter_side=options.resize,
        images_per_unit=options.shard_images,
        shard_bytes=int(options.shard_mib * 2**20),
        first_number=options.first_number,
        processes=options.processes,
    )
    print(format_table(report, ("images", "captions", "bytes")))
    print(f"{report['num_shards']} shards in {options.out}, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    run_tool(main)
