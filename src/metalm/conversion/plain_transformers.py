"""A program by itself: logits of an exported folder, in a process that has torch and transformers only.

Usage: python -I plain_transformers.py FOLDER PROMPTS.json LOGITS.safetensors

PROMPTS.json: a list of {"text", "image": path of a .npy [height, width, 3] uint8, or null}. The prompts
run as one left-padded batch; the answer has the logits of each prompt's own tokens, float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORBIDDEN = ("metalm", "deepspeed", "megatron", "triton")
"""Packages that an exported model must do without."""


def main(folder: Path, prompts_path: Path, out: Path) -> None:
    """Write the logits of the prompts."""
    for name in FORBIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    import numpy as np
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    prompts = json.loads(prompts_path.read_text())
    images = [np.load(prompt["image"]) for prompt in prompts if prompt["image"]]
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    if model.dtype != torch.float32:
        compute_in_float32(model)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=[prompt["text"] for prompt in prompts], images=images or None)
    with torch.no_grad():
        logits = model(**inputs).logits
    own = inputs["attention_mask"].bool()
    save_file({str(row): logits[row, own[row]].float().contiguous() for row in range(len(prompts))}, out)


def compute_in_float32(model: Any) -> None:
    """Widen each module's weights for its own forward only, which is exact and needs no second copy.

    A model of transformers inside is widened as a whole: its modules look at each other's dtypes.
    """
    stored = next(model.parameters()).dtype

    def widen(module: nn.Module, inputs: Any) -> None:
        module.float()

    def narrow(module: nn.Module, inputs: Any, output: Any) -> None:
        module.to(stored)

    inside: set[int] = set()
    for module in model.modules():
        is_model = getattr(module, "config", model.config) is not model.config
        has_weights = next(module.parameters(recurse=False), None) is not None
        if id(module) not in inside and (is_model or has_weights):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)
        if is_model:
            inside |= {id(part) for part in module.modules()}


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
