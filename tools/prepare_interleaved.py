"""Prepare documents of texts and images between them (OBELICS' or MMC4's layout) to shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Examples:
    python tools/prepare_interleaved.py obelics/*.parquet --media-folder images --image-table images.csv \\
        --tokenizer data/tokenizer --sequence-length 2048 --image-positions 196 --out data/obelics
    python tools/prepare_interleaved.py mmc4/*.jsonl --media-folder images --out data/mmc4
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.folder import DROPPED_NAME
from metalm.data.preparation.interleaved_shards import RowSize, prepare_interleaved
from metalm.data.preparation.tally import format_table
from metalm.modalities import MEDIA


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "inputs", type=Path, nargs="+", help=".jsonl (also .gz, .zst, .bz2), .json or .parquet"
    )
    parser.add_argument(
        "--media-folder",
        type=Path,
        help="folder or tar of the images that documents name (default: the folder of the file)",
    )
    parser.add_argument(
        "--image-table",
        type=Path,
        help=".csv, .tsv or .jsonl with the `url` of each image and its `path` in that folder",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="with the next two: cut documents longer than a row into pieces"
    )
    parser.add_argument("--sequence-length", type=int, help="data.sequence_length of the run")
    parser.add_argument("--image-positions", type=int, help="vectors of an image in its encoder")
    MEDIA["image"].add_preparation_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard-mib", type=float, default=512, help="largest size of a shard (default: 512)")
    parser.add_argument(
        "--first-number",
        type=int,
        default=0,
        help="number of the first input, when inputs are prepared apart (default: 0)",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    run_preparation(parser, parser.parse_args())


def run_preparation(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    settings = MEDIA["image"].preparation_settings(options)
    sizes = [options.sequence_length, options.image_positions]
    positive = [options.processes, options.shard_mib, *sizes, *settings.values()]
    if any(value is not None and not 0 < value < math.inf for value in positive) or options.first_number < 0:
        parser.error("all numbers must be positive; --first-number may be 0")
    if len({value is None for value in (options.tokenizer, *sizes)}) > 1:
        parser.error("--tokenizer, --sequence-length and --image-positions belong together")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    report = prepare_interleaved(
        options.inputs,
        options.out,
        media_folder=options.media_folder,
        image_table=options.image_table,
        row_size=None if options.tokenizer is None else RowSize(options.tokenizer, *sizes),
        converts={"image": MEDIA["image"].convert(**settings)},
        settings=settings,
        shard_bytes=int(options.shard_mib * 2**20),
        first_number=options.first_number,
        processes=options.processes,
    )
    print(format_table(report, ("examples", "media", "bytes")))
    if report["dropped"]:
        print(f"where the dropped were: {options.out / DROPPED_NAME}")
    print(f"{report['num_shards']} shards in {options.out}, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    run_tool(main)
