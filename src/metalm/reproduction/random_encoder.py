"""An encoder of the same shape and tokenizer as a pretrained one, with random weights.

Example: python -m metalm.reproduction.random_encoder data/real/minilm/encoder --out data/random
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from metalm.cli import ToolParser, run_tool

WEIGHTS = "model.safetensors"
STD = 0.02
"""BERT's, of embeddings and matrices."""


def write_random_encoder(folder: Path, out: Path, seed: int) -> None:
    """Copy a folder of transformers, and draw its weights as BERT's begin."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, weight in sorted(load_file(folder / WEIGHTS).items()):
        if not weight.is_floating_point():  # numbers of positions, which are no weights
            drawn[name] = weight
        elif weight.ndim > 1:
            drawn[name] = torch.empty(weight.shape).normal_(0.0, STD, generator=generator)
        else:
            drawn[name] = torch.full(weight.shape, float(name.endswith("LayerNorm.weight")))
    for path in folder.glob("*.json"):
        shutil.copy(path, out)
    save_file(drawn, out / WEIGHTS, metadata={"format": "pt"})


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that save_pretrained wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_random_encoder(options.folder, options.out, options.seed)
    print(f"{options.out}: random weights, seed {options.seed}")


if __name__ == "__main__":
    run_tool(main)
