"""The checkpoint's own model in plain PyTorch, one layer in memory at a time.

Written from the checkpoint's names and layout and the training batch, not from the exported code: it is
the other side of the conversion's proof, and runs without DeepSpeed, Megatron and process groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from metalm.batch import SemiCausalBatch
from metalm.config import ModelConfig
from metalm.kernels import IntervalMask, interval_attention
from metalm.model.deepnorm import deepnorm_alpha
from metalm.model.encoder import Encoder
from metalm.model.positions import sinusoidal_positions

LAYER_NORM_EPS = 1e-5
EMBEDDING = "gpt.embedding.word_embeddings.weight"

ReadParameter = Callable[[str, str], Tensor]
"""Component and name to the whole parameter, float32."""


@torch.no_grad()
def reference_logits(config: ModelConfig, read: ReadParameter, batch: SemiCausalBatch) -> Tensor:
    """Logits of every position.

    Args:
        config: of the model.
        read: gives parameters; each is asked for once, the embedding twice.
        batch: of one tensor-parallel share, on the CPU.

    Returns:
        [B, S, vocabulary] float32.
    """
    rows, length = batch.tokens.shape
    hidden_size = config.decoder.hidden_size
    hidden = functional.embedding(batch.tokens.flatten(), read("decoder", EMBEDDING)) * hidden_size**0.5
    for name, spans in batch.encoders.items():
        (share,) = spans.shares
        vectors = _load_encoder(config, read, name)(share)
        hidden = hidden.index_copy(0, spans.dock_positions, vectors.index_select(0, spans.dock_vectors))
    hidden = hidden.view(rows, length, hidden_size) + sinusoidal_positions(batch.positions, hidden_size)
    mask = IntervalMask(batch.attention_start, batch.attention_end, length)
    for layer in range(config.decoder.num_layers):
        hidden = _decoder_layer(config, read, f"gpt.decoder.layers.{layer}", hidden, mask)
    if config.decoder.normalization == "pre_ln":
        hidden = _norm(hidden, read, "gpt.decoder.final_layernorm")
    return functional.linear(hidden, read("decoder", EMBEDDING)[: config.vocab_size])


def _load_encoder(config: ModelConfig, read: ReadParameter, name: str) -> Encoder:
    with torch.device("meta"):
        encoder = Encoder(config.encoders[name], config.padded_vocab_size, config.decoder.hidden_size)
    names = [parameter for parameter, _ in encoder.named_parameters()]
    encoder.load_state_dict({n: read("encoders", f"encoders.{name}.{n}") for n in names}, assign=True)
    return encoder.eval()


def _decoder_layer(
    config: ModelConfig, read: ReadParameter, name: str, hidden: Tensor, mask: IntervalMask
) -> Tensor:
    """[B, S, D] to [B, S, D]."""
    if config.decoder.normalization == "deepnorm":
        alpha = deepnorm_alpha(config.decoder.num_layers)
        attended = _attend(config.decoder.num_heads, read, name, hidden, mask)
        hidden = _norm(alpha * hidden + attended, read, f"{name}.attention_norm")
        return _norm(alpha * hidden + _feed_forward(read, name, hidden), read, f"{name}.mlp_norm")
    normed = _norm(hidden, read, f"{name}.input_layernorm")
    hidden = hidden + _attend(config.decoder.num_heads, read, name, normed, mask)
    return hidden + _feed_forward(read, name, _norm(hidden, read, f"{name}.pre_mlp_layernorm"))


def _attend(num_heads: int, read: ReadParameter, name: str, hidden: Tensor, mask: IntervalMask) -> Tensor:
    rows, length, width = hidden.shape
    qkv = _linear(hidden, read, f"{name}.self_attention.linear_qkv")
    # Megatron interleaves by head: [heads, (query, key, value), width of a head].
    qkv = qkv.view(rows, length, num_heads, 3, width // num_heads).permute(3, 0, 2, 1, 4)
    attended = interval_attention(qkv[0], qkv[1], qkv[2], mask)
    joined = attended.transpose(1, 2).reshape(rows, length, width)
    return _linear(joined, read, f"{name}.self_attention.linear_proj")


def _feed_forward(read: ReadParameter, name: str, hidden: Tensor) -> Tensor:
    wide = functional.gelu(_linear(hidden, read, f"{name}.mlp.linear_fc1"))
    return _linear(wide, read, f"{name}.mlp.linear_fc2")


def _linear(hidden: Tensor, read: ReadParameter, name: str) -> Tensor:
    return functional.linear(hidden, read("decoder", f"{name}.weight"), read("decoder", f"{name}.bias"))


def _norm(hidden: Tensor, read: ReadParameter, name: str) -> Tensor:
    weight, bias = read("decoder", f"{name}.weight"), read("decoder", f"{name}.bias")
    return functional.layer_norm(hidden, weight.shape, weight, bias, LAYER_NORM_EPS)
