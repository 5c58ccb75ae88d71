"""Put today's model code into a folder that `convert_to_hf` wrote before, and prove it again.

For a folder whose own code does not agree with a newer transformers. It is replaced as a whole, or stays.

Example:
    python tools/refresh_export.py exported/demo
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.progress import Phase


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="written by convert_to_hf")
    options = parser.parse_args()

    with Phase("loading transformers"):
        from metalm.conversion.refresh import refresh_export

    refresh_export(options.folder)
    print(f"refreshed {options.folder}")


if __name__ == "__main__":
    run_tool(main)
