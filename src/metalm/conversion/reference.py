"""The checkpoint's own model in plain PyTorch, one layer in memory at a time.

Written from the checkpoint's names and layout and the training batch, not from the exported code: it is
the other side of the conversion's proof, and runs without DeepSpeed, Megatron and process groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.batch import SemiCausalBatch
from metalm.config import DecoderConfig, ModelConfig
from metalm.kernels import IntervalMask, interval_attention
from metalm.model.deepnorm import deepnorm_alpha
from metalm.model.encoder import Encoder
from metalm.model.positions import rotary_angles, sinusoidal_positions
from metalm.model.pretrained import PretrainedEncoder

EMBEDDING = "gpt.embedding.word_embeddings.weight"
POSITIONS = "gpt.embedding.position_embeddings.weight"
OUTPUT = "gpt.output_layer.weight"

ReadParameter = Callable[[str, str], Tensor]
"""Component and name to the whole parameter, float32."""


@torch.no_grad()
def reference_logits(config: ModelConfig, read: ReadParameter, batch: SemiCausalBatch) -> Tensor:
    """Logits of every position.

    Args:
        config: of the model.
        read: gives parameters; each is asked for once, the tied embedding twice.
        batch: of one tensor-parallel share, on the CPU.

    Returns:
        [B, S, vocabulary] float32.
    """
    rows, length = batch.tokens.shape
    decoder = config.decoder
    hidden = functional.embedding(batch.tokens.flatten(), read("decoder", EMBEDDING))
    if decoder.scale_embedding:
        hidden = hidden * decoder.hidden_size**0.5
    for name, spans in batch.encoders.items():
        (share,) = spans.shares
        vectors = _load_encoder(config, read, name)(share)
        if decoder.scale_docked_vectors:
            vectors = vectors * decoder.hidden_size**0.5
        hidden = hidden.index_copy(0, spans.dock_positions, vectors.index_select(0, spans.dock_vectors))
    hidden = hidden.view(rows, length, decoder.hidden_size)
    if decoder.positions == "sinusoidal":
        hidden = hidden + sinusoidal_positions(batch.positions, decoder.hidden_size)
    elif decoder.positions == "learned":
        hidden = hidden + functional.embedding(batch.positions, read("decoder", POSITIONS))
    mask = IntervalMask(batch.attention_start, batch.attention_end, length)
    for layer in range(decoder.num_layers):
        hidden = _decoder_layer(decoder, read, f"gpt.decoder.layers.{layer}", hidden, mask, batch.positions)
    if decoder.normalization == "pre_ln":
        hidden = _norm(decoder, hidden, read, "gpt.decoder.final_layernorm")
    output = read("decoder", EMBEDDING if decoder.tied_output else OUTPUT)
    return functional.linear(hidden, output[: config.vocab_size])


def _load_encoder(config: ModelConfig, read: ReadParameter, name: str) -> nn.Module:
    sizes, width = config.encoders[name], config.decoder.hidden_size
    encoder: nn.Module
    if sizes.pretrained is not None:
        encoder = PretrainedEncoder(sizes, width)  # which is tried out, so not on the meta device
    else:
        with torch.device("meta"):
            encoder = Encoder(sizes, config.padded_vocab_size, width)
    names = [parameter for parameter, _ in encoder.named_parameters()]
    state = {n: read("encoders", f"encoders.{name}.{n}") for n in names}
    encoder.load_state_dict(state, assign=True, strict=sizes.pretrained is None)
    return encoder.eval()


def _decoder_layer(
    config: DecoderConfig,
    read: ReadParameter,
    name: str,
    hidden: Tensor,
    mask: IntervalMask,
    positions: Tensor,
) -> Tensor:
    """[B, S, D] to [B, S, D]."""
    if config.normalization == "deepnorm":
        alpha = deepnorm_alpha(config.num_layers)
        attended = _attend(config, read, name, hidden, mask, positions)
        hidden = _norm(config, alpha * hidden + attended, read, f"{name}.attention_norm")
        wide = _feed_forward(config, read, name, hidden)
        return _norm(config, alpha * hidden + wide, read, f"{name}.mlp_norm")
    normed = _norm(config, hidden, read, f"{name}.input_layernorm")
    attended = hidden + _attend(config, read, name, normed, mask, positions)
    seen = hidden if config.parallel_residual else attended
    normed = _norm(config, seen, read, f"{name}.pre_mlp_layernorm")
    return attended + _feed_forward(config, read, name, normed)


def _attend(
    config: DecoderConfig,
    read: ReadParameter,
    name: str,
    hidden: Tensor,
    mask: IntervalMask,
    positions: Tensor,
) -> Tensor:
    rows, length, _ = hidden.shape
    qkv = _linear(hidden, read, f"{name}.self_attention.linear_qkv", config.has_qkv_biases)
    # Megatron groups by key head: [key heads, (its queries, key, value), width of a head].
    qkv = qkv.view(rows, length, config.key_value_heads, -1, config.head_size)
    query = qkv[:, :, :, :-2].flatten(2, 3).transpose(1, 2)
    key, value = qkv[:, :, :, -2].transpose(1, 2), qkv[:, :, :, -1].transpose(1, 2)
    if config.positions == "rope":
        angles = rotary_angles(positions, config.rotary_size, config.rope_base, config.rope_scaling)[:, None]
        query, key = _turn(query, angles), _turn(key, angles)
    attended = interval_attention(query, key, value, mask)
    joined = attended.transpose(1, 2).reshape(rows, length, config.attention_size)
    return _linear(joined, read, f"{name}.self_attention.linear_proj", config.biases)


def _turn(heads: Tensor, angles: Tensor) -> Tensor:
    turned, kept = heads.tensor_split([angles.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return torch.cat((turned, kept), dim=-1)


def _feed_forward(config: DecoderConfig, read: ReadParameter, name: str, hidden: Tensor) -> Tensor:
    wide = _linear(hidden, read, f"{name}.mlp.linear_fc1", config.biases)
    gate, *value = wide.chunk(2, dim=-1) if config.is_gated else [wide]
    if config.activation == "swiglu":
        wide = functional.silu(gate)
    else:
        wide = functional.gelu(gate, approximate="tanh" if config.activation.endswith("_tanh") else "none")
    wide = wide * value[0] if value else wide
    return _linear(wide, read, f"{name}.mlp.linear_fc2", config.biases)


def _linear(hidden: Tensor, read: ReadParameter, name: str, has_bias: bool) -> Tensor:
    bias = read("decoder", f"{name}.bias") if has_bias else None
    return functional.linear(hidden, read("decoder", f"{name}.weight"), bias)


def _norm(config: DecoderConfig, hidden: Tensor, read: ReadParameter, name: str) -> Tensor:
    weight = read("decoder", f"{name}.weight")
    if config.norm == "rms_norm":
        return functional.rms_norm(hidden, weight.shape, weight, config.norm_eps)
    bias = read("decoder", f"{name}.bias")
    return functional.layer_norm(hidden, weight.shape, weight, bias, config.norm_eps)
