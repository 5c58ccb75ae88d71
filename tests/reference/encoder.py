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
    if encoder.positions == "learned":
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
        x = _norm(x, weights, prefix + "final_norm", encoder)
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
        heads = _linear(x, weights, prefix + "qkv").view(len(x), -1, encoder.hidden_size // encoder.num_heads)
        groups = encoder.num_kv_heads or encoder.num_heads
        q, k, v = heads[:, : -2 * groups], heads[:, -2 * groups : -groups], heads[:, -groups:]
        if encoder.positions == "rope":
            q, k = _turn(q, encoder.rope_base), _turn(k, encoder.rope_base)
        k, v = (part.repeat_interleave(encoder.num_heads // groups, dim=1) for part in (k, v))
        return _linear(_attention(q, k, v, bias), weights, prefix + "attention_output")

    def feed_forward(x: Tensor) -> Tensor:
        found = []
        for one, route in zip(x, routes, strict=True):
            part = f"{prefix}feed_forwards.{route}."
            inner = _activate(_linear(one, weights, part + "ffn_in"), encoder.activation)
            found.append(_linear(inner, weights, part + "ffn_out"))
        return torch.stack(found)

    if encoder.normalization == "pre_ln":
        x = x + attend(_norm(x, weights, prefix + "attention_norm", encoder))
        return x + feed_forward(_norm(x, weights, prefix + "ffn_norm", encoder))
    alpha = (2 * encoder.num_layers) ** (1 / 4)
    x = _norm(alpha * x + attend(x), weights, prefix + "attention_norm", encoder)
    return _norm(alpha * x + feed_forward(x), weights, prefix + "ffn_norm", encoder)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, value = x.chunk(2)
        return gate * torch.sigmoid(gate) * value
    if activation == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def _turn(x: Tensor, base: float) -> Tensor:
    """Rotary positions of a span [n, heads, K], each pair (i, i + K/2) as one complex number."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    attention = (scores if bias is None else scores + bias).softmax(-1)
    return torch.einsum("hqk,khd->qhd", attention, v).flatten(1)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    product = x @ weights[name + ".weight"].T
    return product + weights[name + ".bias"] if name + ".bias" in weights else product


def _norm(x: Tensor, weights: Weights, name: str, encoder) -> Tensor:
    if encoder.norm == "rms_norm":
        return x / (x.square().mean(-1, keepdim=True) + encoder.norm_eps).sqrt() * weights[name + ".weight"]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + encoder.norm_eps).sqrt()
    return x * weights[name + ".weight"] + weights[name + ".bias"]
