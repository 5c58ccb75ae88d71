"""The encoders, one span at a time, without packing, masks, kernels or routing by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.t5.modeling_t5 import T5Attention

from metalm.config import ModelConfig
from reference.rows import Document

Weights = dict[str, Tensor]


def encode_span(document: Document, span, weights: Weights, config: ModelConfig) -> Tensor:
    """Connector(encoder(span)): [end - start, decoder hidden]."""
    encoder, prefix = config.encoders[span.encoder], f"encoders/encoders.{span.encoder}."
    num_patches = 0 if span.patches is None else len(span.patches)
    text = torch.tensor(document.tokens[span.start + num_patches : span.end], dtype=torch.long)
    x = weights[prefix + "token_embedding.weight"][text]
    x = x + weights[prefix + "text_positions.weight"][: len(text)]
    if num_patches:
        pixels = torch.tensor(span.patches).to(x.dtype) / 127.5 - 1
        patches = _linear(pixels, weights, prefix + "patch_embedding")
        x = torch.cat((patches + weights[prefix + "image_positions.weight"], x))
    bias = (
        _t5_bias(len(x), weights[prefix + "relative_bias.table.weight"], encoder)
        if encoder.relative_bias
        else None
    )
    for number in range(encoder.num_layers):
        routes = _routes(len(x), num_patches, number, encoder)
        x = _encoder_layer(x, f"{prefix}layers.{number}.", weights, encoder, bias, routes)
    if encoder.normalization == "pre_ln":
        x = _norm(x, weights, prefix + "final_norm")
    if encoder.connector == "linear":
        return _linear(x, weights, prefix + "connector.0")
    for part in (0, 2):
        x = functional.gelu(_linear(x, weights, f"{prefix}connector.{part}"))
    return _linear(x, weights, prefix + "connector.4")


def _routes(length: int, num_patches: int, number: int, encoder) -> list[str]:
    """The feed-forward of each element, image first: VLMo's (Bao et al., 2022)."""
    if encoder.joint_layers is None:
        return ["shared"] * length
    if num_patches and num_patches < length and number >= encoder.num_layers - encoder.joint_layers:
        return ["joint"] * length
    return ["vision"] * num_patches + ["language"] * (length - num_patches)


def _t5_bias(length: int, table: Tensor, encoder) -> Tensor:
    """[heads, length, length], with the buckets of transformers' T5."""
    index = torch.arange(length)
    sizes = encoder.relative_bias
    buckets = T5Attention._relative_position_bucket(
        index - index[:, None], True, sizes.num_buckets, sizes.max_distance
    )
    return table[buckets].permute(2, 0, 1)


def _encoder_layer(
    x: Tensor, prefix: str, weights: Weights, encoder, bias: Tensor | None, routes: list[str]
) -> Tensor:
    def attend(x: Tensor) -> Tensor:
        qkv = _linear(x, weights, prefix + "qkv")
        q, k, v = qkv.view(len(x), 3, encoder.num_heads, -1).unbind(1)
        return _linear(_attention(q, k, v, bias), weights, prefix + "attention_output")

    def feed_forward(x: Tensor) -> Tensor:
        found = []
        for one, route in zip(x, routes, strict=True):
            part = f"{prefix}feed_forwards.{route}."
            inner = functional.gelu(_linear(one, weights, part + "ffn_in"))
            found.append(_linear(inner, weights, part + "ffn_out"))
        return torch.stack(found)

    if encoder.normalization == "pre_ln":
        x = x + attend(_norm(x, weights, prefix + "attention_norm"))
        return x + feed_forward(_norm(x, weights, prefix + "ffn_norm"))
    alpha = (2 * encoder.num_layers) ** (1 / 4)
    x = _norm(alpha * x + attend(x), weights, prefix + "attention_norm")
    return _norm(alpha * x + feed_forward(x), weights, prefix + "ffn_norm")


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    attention = (scores if bias is None else scores + bias).softmax(-1)
    return torch.einsum("hqk,khd->qhd", attention, v).flatten(1)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x * weights[name + ".weight"] + weights[name + ".bias"]
