"""The paper's model, one document at a time, without packing, masks, kernels or parallelism.

Weights are taken by the names of the checkpoints. Everything runs in the weights' dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

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
    x = table[tokens] * math.sqrt(hidden)
    for span in document.spans:
        vectors = encode_span(document, span, weights, config)
        x = torch.cat((x[: span.start], vectors, x[span.end :]))
    x = x + _sinusoid(len(tokens), hidden).to(x.dtype)
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for number in range(decoder.num_layers):
        x = _decoder_layer(x, causal, number, weights, config)
    if decoder.normalization == "pre_ln":
        x = _norm(x, weights, "decoder/gpt.decoder.final_layernorm")
    return x @ table.T


def _decoder_layer(x: Tensor, visible: Tensor, number: int, weights: Weights, config: ModelConfig) -> Tensor:
    decoder, prefix = config.decoder, f"decoder/gpt.decoder.layers.{number}."

    def attend(x: Tensor) -> Tensor:
        qkv = _linear(x, weights, prefix + "self_attention.linear_qkv")
        q, k, v = qkv.view(len(x), decoder.num_heads, 3, -1).unbind(2)  # interleaved by head
        return _linear(_attention(q, k, v, visible), weights, prefix + "self_attention.linear_proj")

    def feed_forward(x: Tensor) -> Tensor:
        inner = functional.gelu(_linear(x, weights, prefix + "mlp.linear_fc1"))
        return _linear(inner, weights, prefix + "mlp.linear_fc2")

    if decoder.normalization == "pre_ln":
        x = x + attend(_norm(x, weights, prefix + "input_layernorm"))
        return x + feed_forward(_norm(x, weights, prefix + "pre_mlp_layernorm"))
    alpha = (2 * decoder.num_layers) ** (1 / 4)
    x = _norm(alpha * x + attend(x), weights, prefix + "attention_norm")
    return _norm(alpha * x + feed_forward(x), weights, prefix + "mlp_norm")


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    attention = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", attention, v).flatten(1)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x * weights[name + ".weight"] + weights[name + ".bias"]


def _sinusoid(length: int, hidden: int) -> Tensor:
    table = torch.empty(length, hidden, dtype=torch.float64)
    for position in range(length):
        for i in range(0, hidden, 2):
            angle = position / 10000 ** (i / hidden)
            table[position, i], table[position, i + 1] = math.sin(angle), math.cos(angle)
    return table
