"""What the command lines of the tools that prepare pairs have in common."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from metalm.data.preparation.folder import describe_shards
from metalm.data.preparation.pair_shards import prepare_pairs
from metalm.data.preparation.shard_arguments import add_first_number, add_shard_arguments, check_numbers
from metalm.modalities import Media


def add_pair_arguments(parser: argparse.ArgumentParser, modality: Media) -> None:
    """Where pairs are listed, and into how many shards they go."""
    units = modality.unit
    modality.add_preparation_options(parser)
    parser.add_argument(
        "--path-column",
        default="path",
        help="of a table; of parquet, with the files or their paths (default: path)",
    )
    parser.add_argument(
        "--caption-column", help="of a table or parquet (default: captions, where there is one, or caption)"
    )
    parser.add_argument(
        f"--shard-{units}",
        dest="pairs_per_unit",
        type=int,
        default=4096,
        help=f"most {units} per shard (default: 4096)",
    )
    add_shard_arguments(parser)
    add_first_number(parser)


def run_preparation(
    parser: argparse.ArgumentParser, options: argparse.Namespace, modality: Media, media_folder: Path | None
) -> None:
    """Prepare pairs as the options say, and print the report."""
    try:
        settings = modality.preparation_settings(options)
    except ValueError as error:
        parser.error(str(error))
    check_numbers(parser, options, [options.pairs_per_unit, *settings.values()])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    report = prepare_pairs(
        options.inputs,
        options.out,
        modality=modality,
        convert=modality.convert(**settings),
        settings=settings,
        media_folder=media_folder,
        path_column=options.path_column,
        caption_column=options.caption_column,
        pairs_per_unit=options.pairs_per_unit,
        shard_bytes=int(options.shard_mib * 2**20),
        first_number=options.first_number,
        processes=options.processes,
    )
    columns = (modality.unit, "captions", "bytes")
    print(describe_shards(report, columns, options.out, time.monotonic() - started))
