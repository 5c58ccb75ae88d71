"""What the command lines of the tools that read text have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from metalm.data.preparation.text_document import PILE_FIELDS, TextFields

TEXT_FORMS = ".jsonl (also .gz, .zst, .bz2), .parquet, or .bin of Megatron with its .idx"


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the files have their texts: see `text_fields`."""
    parser.add_argument("inputs", type=Path, nargs="+", help=TEXT_FORMS)
    parser.add_argument(
        "--text-field",
        default=PILE_FIELDS.text,
        metavar="NAME",
        help="key or column of the text; A.B is B within A (default: %(default)s)",
    )
    parser.add_argument(
        "--subset-field",
        default=PILE_FIELDS.subset,
        metavar="NAME",
        help="key or column of the name of a document's subset (default: %(default)s)",
    )
    parser.add_argument(
        "--from-tokenizer",
        type=Path,
        metavar="PATH",
        help="of .bin inputs: folder or tokenizer.json of the tokenizer that made their ids",
    )


def text_fields(options: argparse.Namespace) -> TextFields:
    """Where records have their texts, as the options say."""
    return TextFields(options.text_field, options.subset_field)
