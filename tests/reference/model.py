"""The paper's model, one document at a time, without packing, masks, kernels or parallelism.

Weights are taken by the names of the checkpoints. Everything runs in the weights' dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metalm.config import ModelConfig
from reference.encoder import encode_span
from reference.rows import Document, PlainRow

Weights = dict[str, Tensor]


def trained_targets(document: Document) -> list[int]:
    """Indices t of the predicted tokens: e_i <= t <= s_{i+1}, with e_0 = 1 and s_{k+1} = n - 1."""
    starts = [span.start for span in document.spans] + [len(document.tokens) - 1]
    ends = [1] + [span.end for span in document.spans]
    return [t for end, start in zip(ends, starts, strict=True) for t in range(end, start + 1)]


def loss_sum(row: PlainRow, weights: Weights, config: ModelConfig) -> tuple[Tensor, int]:
    """Sum of -log P over a row's trained tokens, and how many there are."""
    total, count = torch.zeros((), dtype=next(iter(weights.values())).dtype), 0
    for document in row.documents:
        log_probabilities = document_logits(document, weights, config).log_softmax(-1)
        targets = torch.tensor(trained_targets(document))
        tokens = torch.tensor(document.tokens)
        total = total - log_probabilities[targets - 1, tokens[targets]].sum()
        count += len(targets)
    return total, count


def document_logits(document: Document, weights: Weights, config: ModelConfig) -> Tensor:
    """Logits [n, vocabulary] of every position of a document."""
    decoder, hidden = config.decoder, config.decoder.hidden_size
    table = weights["decoder/gpt.embedding.word_embeddings.weight"][: config.vocab_size]
    tokens = torch.tensor(document.tokens)
    x = table[tokens] * (math.sqrt(hidden) if decoder.scale_embedding else 1.0)
    for span in document.spans:
        vectors = encode_span(document, span, weights, config)
        if decoder.scale_docked_vectors:
            vectors = vectors * math.sqrt(hidden)
        x = torch.cat((x[: span.start], vectors, x[span.end :]))
    if decoder.positions == "sinusoidal":
        x = x + _sinusoid(len(tokens), hidden).to(x.dtype)
    elif decoder.positions == "learned":
        x = x + weights["decoder/gpt.embedding.position_embeddings.weight"][: len(tokens)]
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    if decoder.spans == "bidirectional":
        for span in document.spans:
            visible[span.start : span.end, span.start : span.end] = True
    for number in range(decoder.num_layers):
        x = _decoder_layer(x, visible, number, weights, decoder)
    if decoder.normalization == "pre_ln":
        x = _decoder_norm(x, weights, "decoder/gpt.decoder.final_layernorm", decoder)
    if not decoder.tied_output:
        table = weights["decoder/gpt.output_layer.weight"][: config.vocab_size]
    return x @ table.T


def _decoder_layer(x: Tensor, visible: Tensor, number: int, weights: Weights, decoder) -> Tensor:
    prefix = f"decoder/gpt.decoder.layers.{number}."

    def attend(x: Tensor) -> Tensor:
        groups = decoder.num_kv_heads or decoder.num_heads
        qkv = _linear(x, weights, prefix + "self_attention.linear_qkv")
        qkv = qkv.view(len(x), groups, -1, decoder.head_dim or decoder.hidden_size // decoder.num_heads)
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1:]  # the queries of a key head, key, value
        q, k, v = (part.expand_as(q).flatten(1, 2) for part in (q, k, v))
        if decoder.positions == "rope":
            q, k = _turn(q, decoder), _turn(k, decoder)
        return _linear(_attention(q, k, v, visible), weights, prefix + "self_attention.linear_proj")

    def feed_forward(x: Tensor) -> Tensor:
        inner = _linear(x, weights, prefix + "mlp.linear_fc1")
        if decoder.activation == "swiglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = gate * torch.sigmoid(gate) * value
        elif decoder.activation == "geglu_tanh":
            gate, value = inner.chunk(2, dim=-1)
            inner = _gelu_tanh(gate) * value
        elif decoder.activation == "gelu_tanh":
            inner = _gelu_tanh(inner)
        else:
            inner = inner / 2 * (1 + torch.erf(inner / math.sqrt(2)))
        return _linear(inner, weights, prefix + "mlp.linear_fc2")

    def norm(x: Tensor, name: str) -> Tensor:
        return _decoder_norm(x, weights, prefix + name, decoder)

    if decoder.parallel_residual:
        return x + attend(norm(x, "input_layernorm")) + feed_forward(norm(x, "pre_mlp_layernorm"))
    if decoder.normalization == "pre_ln":
        x = x + attend(norm(x, "input_layernorm"))
        return x + feed_forward(norm(x, "pre_mlp_layernorm"))
    alpha = (2 * decoder.num_layers) ** (1 / 4)
    x = norm(alpha * x + attend(x), "attention_norm")
    return norm(alpha * x + feed_forward(x), "mlp_norm")


def _gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    attention = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", attention, v).flatten(1)


def _turn(x: Tensor, decoder) -> Tensor:
    """Rotary positions of one document [n, heads, K], each pair (i, i + turned/2) as a complex number."""
    half = int(x.shape[-1] * decoder.rope_share) // 2
    frequencies = [_rotary_frequency(i, half, decoder) for i in range(half)]
    angles = torch.arange(len(x))[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), dim=-1).to(x.dtype)


def _rotary_frequency(number: int, half: int, decoder) -> float:
    frequency, scaling = decoder.rope_base ** (-number / half), decoder.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_positions / scaling.high_frequency_factor:
        return frequency
    if wavelength > scaling.original_positions / scaling.low_frequency_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_positions / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    product = x @ weights[name + ".weight"].T
    return product + weights[name + ".bias"] if name + ".bias" in weights else product


def _norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x * weights[name + ".weight"] + weights[name + ".bias"]


def _decoder_norm(x: Tensor, weights: Weights, name: str, decoder) -> Tensor:
    if decoder.norm == "layer_norm":
        return _norm(x, weights, name, decoder.norm_eps)
    return x / (x.square().mean(-1, keepdim=True) + decoder.norm_eps).sqrt() * weights[name + ".weight"]


def _sinusoid(length: int, hidden: int) -> Tensor:
    table = torch.empty(length, hidden, dtype=torch.float64)
    for position in range(length):
        for i in range(0, hidden, 2):
            angle = position / 10000 ** (i / hidden)
            table[position, i], table[position, i + 1] = math.sin(angle), math.cos(angle)
    return table
