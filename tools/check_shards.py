"""Check a folder of shards against its index: sizes, checksums, counts, members; decode some samples.

Ends with exit code 65 if anything is wrong.

Example: python tools/check_shards.py data/pile --tokenizer data/tokenizer
"""

from __future__ import annotations

import os
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.checking import ShardCheck, check_shards
from metalm.data.storage.remote import check_url
from metalm.errors import EXIT_DATA, EXIT_DONE


def main() -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of .tar shards with an index")
    parser.add_argument("--url", help="where the shards are, if not in the folder: the source's `url`")
    parser.add_argument("--tokenizer", type=Path, help="folder or tokenizer.json, of shards of text")
    parser.add_argument(
        "--samples", type=int, default=16, help="samples decoded per shard (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args()
    if options.processes < 1 or options.samples < 0:
        parser.error("--processes must be positive, --samples not negative")
    if options.url is not None:
        check_url(options.url)

    def show(check: ShardCheck) -> None:
        for problem in check.problems:
            print(f"{options.folder / check.name}: {problem}", flush=True)

    checks = check_shards(
        options.folder,
        options.tokenizer,
        url=options.url,
        samples_per_shard=options.samples,
        processes=options.processes,
        on_shard=show,
    )
    bad = sum(bool(check.problems) for check in checks)
    print(
        f"{len(checks) - bad} of {len(checks)} shards are sound: {sum(c.num_samples for c in checks):,} "
        f"samples indexed, {sum(c.num_decoded for c in checks):,} decoded"
    )
    return EXIT_DATA if bad else EXIT_DONE


if __name__ == "__main__":
    run_tool(main)
