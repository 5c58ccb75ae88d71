"""Prepare chats: messages, LLaVA's or ShareGPT's conversations, or alpaca's records to shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Example: python tools/prepare_chat.py llava_v1_5_mix665k.json --media-folder images --out data/llava
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import get_args

from metalm.cli import ToolParser, run_tool
from metalm.data.documents.chats import TrainedAnswers
from metalm.data.preparation.chat_shards import prepare_chats
from metalm.data.preparation.folder import describe_shards
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
        help="folder or tar of the images and clips that chats name (default: the folder of the file)",
    )
    parser.add_argument(
        "--train",
        choices=get_args(TrainedAnswers),
        default="all",
        help="on all answers of a chat, or on the last one alone (default: %(default)s)",
    )
    for media in MEDIA.values():
        media.add_preparation_options(parser)
    add_shard_arguments(parser)
    add_first_number(parser)
    run_preparation(parser, parser.parse_args())


def run_preparation(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    try:
        settings = {name: media.preparation_settings(options) for name, media in MEDIA.items()}
    except ValueError as error:
        parser.error(str(error))
    given = {key: value for found in settings.values() for key, value in found.items()}
    check_numbers(parser, options, given.values())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    report = prepare_chats(
        options.inputs,
        options.out,
        train=options.train,
        media_folder=options.media_folder,
        converts={name: MEDIA[name].convert(**found) for name, found in settings.items()},
        settings=given,
        shard_bytes=int(options.shard_mib * 2**20),
        first_number=options.first_number,
        processes=options.processes,
    )
    print(
        describe_shards(
            report, ("examples", "answers", "media", "bytes"), options.out, time.monotonic() - started
        )
    )


if __name__ == "__main__":
    run_tool(main)
