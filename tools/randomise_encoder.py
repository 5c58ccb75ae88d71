"""Copy a pretrained encoder's folder, with random weights: what is left of a result without them?

Example: python tools/randomise_encoder.py data/real/minilm/encoder --out data/random
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.progress import Phase
from metalm.reproduction.random_encoder import write_random_encoder


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="that save_pretrained wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with Phase("drawing weights"):
        write_random_encoder(options.folder, options.out, options.seed)
    print(f"{options.out}: random weights, seed {options.seed}")


if __name__ == "__main__":
    run_tool(main)
