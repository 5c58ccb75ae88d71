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


CONVOLUTIONS = {
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
VISION, AUDIO = ("vit", "beit", "clip", "siglip"), ("ast", "wav2vec2", "wav2vec2-masked", "hubert", "wavlm")


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
        "ast": lambda: transformers.ASTConfig(
            **SIZES, patch_size=6, frequency_stride=4, time_stride=5, max_length=40, num_mel_bins=16
        ),
        "wav2vec2": lambda: transformers.Wav2Vec2Config(**SIZES, **CONVOLUTIONS),
        "wav2vec2-masked": lambda: transformers.Wav2Vec2Config(**SIZES, **CONVOLUTIONS, **LAYER_NORM),
        "hubert": lambda: transformers.HubertConfig(**SIZES, **CONVOLUTIONS),
        "wavlm": lambda: transformers.WavLMConfig(**SIZES, **CONVOLUTIONS),
    }[kind]()
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.eval().save_pretrained(folder)
    if kind == "ast":
        transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=40).save_pretrained(folder)
    elif kind in AUDIO:
        masked = kind == "wav2vec2-masked"
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(folder)
    elif kind in VISION:
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": MEAN, "image_std": STD, "size": {"height": image_size}})
        )
    return model


def vision_model(model: Any) -> Any:
    """The part of a model that reads images."""
    return getattr(model, "vision_model", model)
