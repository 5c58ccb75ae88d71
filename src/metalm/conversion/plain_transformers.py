"""A program by itself: what an exported folder answers, in a process that has torch and transformers only.

Usage: python -I plain_transformers.py FOLDER PROMPTS.json ANSWERS.safetensors

PROMPTS.json: {"prompts": a list of {"text", "media": "image", "audio" or null, "path": of that file},
"ways": of generating, "cached" or "uncached", "num_new_tokens"}. The prompts run as one left-padded batch; by
its number, each has `logits` of its own tokens, float32, and for each way so many most likely tokens (or as
many as the model has positions for) and their `logits_WAY`.
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
    """Write the answers to the prompts."""
    for name in FORBIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    asked = json.loads(prompts_path.read_text())
    prompts = asked["prompts"]
    media = {
        argument: [prompt["path"] for prompt in prompts if prompt["media"] == modality] or None
        for argument, modality in (("images", "image"), ("audio", "audio"))
    }
    auto = AutoModelForImageTextToText if any(media.values()) else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    if model.dtype != torch.float32:
        compute_in_float32(model)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=[prompt["text"] for prompt in prompts], **media)
    with torch.no_grad():
        logits = model(**inputs).logits
    own = inputs["attention_mask"].bool()
    answers = {f"logits/{row}": logits[row, own[row]].float().contiguous() for row in range(len(prompts))}
    num_new_tokens = asked["num_new_tokens"]
    if model.config.positions == "learned":
        num_new_tokens = min(num_new_tokens, model.config.max_position_embeddings - own.shape[1])
    for way in asked["ways"] if num_new_tokens > 0 else ():
        found = model.generate(
            **inputs,
            use_cache=way == "cached",
            do_sample=False,
            eos_token_id=None,
            max_new_tokens=num_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        steps = torch.stack(found.logits, dim=1).float()
        for row in range(len(prompts)):
            answers[f"{way}/{row}"] = found.sequences[row, own.shape[1] :].clone()
            answers[f"logits_{way}/{row}"] = steps[row].clone()
    save_file(answers, out)


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
