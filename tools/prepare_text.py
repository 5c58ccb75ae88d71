"""Prepare text: JSON Lines, parquet or Megatron's token datasets to tokenised shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Examples:
    python tools/prepare_text.py pile/*.zst --tokenizer data/tokenizer --out data/pile --paper-subsets
    python tools/prepare_text.py web/*.parquet --subset-field dump --tokenizer data/tokenizer --out data/web
    python tools/prepare_text.py old/*.bin --from-tokenizer old/gpt2 --tokenizer data/tokenizer --out data/old
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.folder import describe_shards
from metalm.data.preparation.shard_arguments import check_numbers
from metalm.data.preparation.text_arguments import add_text_arguments, text_fields
from metalm.data.preparation.text_shards import PAPER_DROPS, SubsetFilter, prepare_text


def main() -> None:
    parser = ToolParser(__doc__)
    add_text_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", type=Path, help="folder or tokenizer.json")
    parser.add_argument(
        "--store", choices=("ids", "text", "both"), default="ids", help="what a sample holds (default: ids)"
    )
    parser.add_argument("--meta", action="store_true", help="add the subset of each document to its sample")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="SUBSET", help="keep only these subsets"
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="SUBSET", help="leave out these subsets"
    )
    parser.add_argument(
        "--paper-subsets", action="store_true", help=f"leave out, as the paper does: {', '.join(PAPER_DROPS)}"
    )
    parser.add_argument(
        "--shard-mib", type=float, default=256, help="raw text per shard, and its largest size (default: 256)"
    )
    parser.add_argument(
        "--first-number",
        type=int,
        default=0,
        help="number of the first input, when inputs are prepared apart (default: 0)",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--backend", choices=("auto", "gigatoken", "huggingface"), default="auto", help="of the tokenizer"
    )
    options = parser.parse_args()
    check_numbers(parser, options, [])
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    started = time.monotonic()
    report = prepare_text(
        options.inputs,
        options.out,
        options.tokenizer,
        fields=text_fields(options),
        from_tokenizer=options.from_tokenizer,
        subsets=SubsetFilter(
            tuple(options.keep), tuple(options.drop) + (PAPER_DROPS if options.paper_subsets else ())
        ),
        store=options.store,
        meta=options.meta,
        shard_bytes=int(options.shard_mib * 2**20),
        first_number=options.first_number,
        processes=options.processes,
        backend=options.backend,
    )
    print(describe_shards(report, ("documents", "tokens", "bytes"), options.out, time.monotonic() - started))


if __name__ == "__main__":
    run_tool(main)
