"""An encoder of the same shape and tokenizer as a pretrained one, with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
