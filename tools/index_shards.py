"""Index a folder of WebDataset shards, for example those of img2dataset, so that training can read them.

Shards behind a URL are each read once, as a stream, and indexed into a folder of their own.

Examples:
    python tools/index_shards.py data/laion --kind image_text
    python tools/index_shards.py data/pile --kind text --tokenizer data/tokenizer \\
        --url 'https://host/pile/{shard}' --shards '{0000..0029}-00000-00.tar'
"""

from __future__ import annotations

import os
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.storage.index import build_index
from metalm.data.storage.remote import check_url, expand_names
from metalm.data.storage.shard_scan import KINDS
from metalm.data.tokenizer import load_tokenizer


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of .tar shards, or of the index alone (--url)")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument(
        "--tokenizer", type=Path, help="the tokenizer that wrote the token members (.u16, .u32), if any"
    )
    parser.add_argument("--url", help="where the shards are: as the source's `url` in a pipeline")
    parser.add_argument(
        "--shards",
        nargs="+",
        default=[],
        help="with --url: names of shards, or patterns such as {00..99}.tar",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error("--processes must be positive")
    if (options.url is None) != (not options.shards):
        parser.error("--url and --shards belong together")
    if options.url is not None:
        check_url(options.url)

    index = build_index(
        options.folder,
        kind=options.kind,
        url=options.url,
        shard_names=expand_names(options.shards),
        tokenizer_fingerprint=load_tokenizer(options.tokenizer).fingerprint if options.tokenizer else None,
        processes=options.processes,
    )
    print(f"{index.num_samples:,} samples in {len(index.shards):,} shards", end="")
    print(f", {index.num_tokens:,} tokens ({index.token_dtype})" if index.token_dtype else "")
    for cause, count in index.skipped.items():
        print(f"left out: {count:,} {cause}")


if __name__ == "__main__":
    run_tool(main)
