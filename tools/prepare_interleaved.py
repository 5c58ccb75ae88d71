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
import time
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.folder import describe_shards
from metalm.data.preparation.interleaved_shards import RowSize, prepare_interleaved
from metalm.data.preparation.shard_arguments import add_first_number, add_shard_arguments, check_numbers
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
    add_shard_arguments(parser)
    add_first_number(parser)
    run_preparation(parser, parser.parse_args())


def run_preparation(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    settings = MEDIA["image"].preparation_settings(options)
    sizes = [options.sequence_length, options.image_positions]
    check_numbers(parser, options, [*sizes, *settings.values()])
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
    print(describe_shards(report, ("examples", "media", "bytes"), options.out, time.monotonic() - started))


if __name__ == "__main__":
    run_tool(main)
