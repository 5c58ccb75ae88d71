"""Prepare images with captions: img2dataset folders, COCO captions or tables to shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Example: python tools/prepare_image_text.py captions_train2014.json --image-folder train2014 --out data/coco
"""

from __future__ import annotations

import functools
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.images import prepare_image
from metalm.data.preparation.pair_arguments import add_pair_arguments, run_preparation


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="folder of tars or of images with .txt beside them; COCO captions .json; .csv, .tsv or .jsonl",
    )
    parser.add_argument(
        "--image-folder", type=Path, help="image paths are relative to it (default: the folder of the file)"
    )
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shrink larger images to this on their shorter side"
    )
    add_pair_arguments(parser, "image_text")
    options = parser.parse_args()
    settings = {"shorter_side": options.resize}
    run_preparation(
        parser,
        options,
        "image_text",
        convert=functools.partial(prepare_image, **settings),
        settings=settings,
        media_folder=options.image_folder,
    )


if __name__ == "__main__":
    run_tool(main)
