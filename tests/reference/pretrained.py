"""Tiny random models of transformers, saved as anyone would save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 300, "max_position_embeddings": 66}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
TOWER = {**SIZES, "vocab_size": 300, "max_position_embeddings": 16}


def save_pretrained(kind: str, folder: Path, *, image_size: int = 24, patch_size: int = 12) -> Any:
    """Save a model of a kind with random weights, all of them of some size, and answer it in eval mode."""
    vision = {**SIZES, "image_size": image_size, "patch_size": patch_size}
    torch.manual_seed(sum(map(ord, kind)))
    config = {
        "vit": lambda: transformers.ViTConfig(**vision),
        "beit": lambda: transformers.BeitConfig(**vision, use_relative_position_bias=True),
        "clip": lambda: transformers.CLIPConfig(text_config=TOWER, vision_config=vision, projection_dim=16),
        "siglip": lambda: transformers.SiglipConfig(text_config=TOWER, vision_config=vision),
        "bert": lambda: transformers.BertConfig(**TEXT),
        "roberta": lambda: transformers.RobertaConfig(**TEXT),
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**TEXT),
        "electra": lambda: transformers.ElectraConfig(**TEXT, embedding_size=16),
    }[kind]()
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.eval().save_pretrained(folder)
    if kind in ("vit", "beit", "clip", "siglip"):
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": MEAN, "image_std": STD, "size": {"height": image_size}})
        )
    return model


def vision_model(model: Any) -> Any:
    """The part of a model that reads images."""
    return getattr(model, "vision_model", model)
