"""What the command lines of the tools that prepare pairs, chats and tasks have in common."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable
from pathlib import Path


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Where shards go, how large they are, and how many processes make them."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard-mib", type=float, default=512, help="largest size of a shard (default: 512)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")


def add_first_number(parser: argparse.ArgumentParser) -> None:
    """What tells the shards of inputs that are prepared apart from each other."""
    parser.add_argument(
        "--first-number",
        type=int,
        default=0,
        help="number of the first input, when inputs are prepared apart (default: 0)",
    )


def check_numbers(
    parser: argparse.ArgumentParser, options: argparse.Namespace, further: Iterable[float | None]
) -> None:
    """End with a usage error where a number of these options, or a further one, is given and not positive."""
    positive = [options.processes, options.shard_mib, *further]
    has_first = "first_number" in options
    if any(value is not None and not 0 < value < math.inf for value in positive) or (
        has_first and options.first_number < 0
    ):
        parser.error("all numbers must be positive" + ("; --first-number may be 0" if has_first else ""))
    if options.shard_mib * 2**20 < 1:
        parser.error("--shard-mib is less than a byte")
