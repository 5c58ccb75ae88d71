"""Which tensors of a Hugging Face folder a checkpoint's parameter becomes, and back.

A parameter is the unit of streaming: a rule splits one logical parameter into the folder's tensors and
joins them again, so either direction needs memory for one parameter. Padded vocabulary rows, which are
never trained, stay behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from metalm.config import DecoderConfig, EncoderConfig, ModelConfig
from metalm.modalities import modality_of_encoder
from metalm.model.pretrained import parameter_shapes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One parameter of a checkpoint and what it becomes."""

    component: str
    name: str
    shape: Shape
    """Of the checkpoint's whole parameter."""
    targets: dict[str, Shape]
    """Tensors of the folder, by name."""
    split: Callable[[Tensor], Sequence[Tensor]]
    """The parameter to its targets, contiguous, in order."""
    join: Callable[[Sequence[Tensor]], Tensor]
    """The targets to the parameter."""


def conversion_rules(config: ModelConfig) -> list[Rule]:
    """The rules for all parameters of a model, in the order in which they are written."""
    return [*_decoder_rules(config), *_encoder_rules(config)]


def _decoder_rules(config: ModelConfig) -> Iterator[Rule]:
    decoder = config.decoder
    hidden, has_norm_bias = decoder.hidden_size, decoder.norm == "layer_norm"
    embedding = "gpt.embedding"
    yield _embedding("decoder", f"{embedding}.word_embeddings.weight", "model.embed_tokens", config, hidden)
    if decoder.positions == "learned":
        shape = (decoder.max_positions or 0, hidden)
        table = _renamed("decoder", f"{embedding}.position_embeddings", "model.embed_positions", shape, False)
        yield from table
    for layer in range(decoder.num_layers):
        yield from _decoder_layer(decoder, f"gpt.decoder.layers.{layer}", f"model.layers.{layer}")
    if decoder.normalization == "pre_ln":
        final_norm = "gpt.decoder.final_layernorm"
        yield from _renamed("decoder", final_norm, "model.final_norm", (hidden,), has_norm_bias)
    if not decoder.tied_output:
        yield _embedding("decoder", "gpt.output_layer.weight", "lm_head", config, hidden)


def _decoder_layer(decoder: DecoderConfig, source: str, target: str) -> Iterator[Rule]:
    hidden, wide = decoder.hidden_size, decoder.feed_forward_size
    post_norm, has_norm_bias = decoder.normalization == "deepnorm", decoder.norm == "layer_norm"
    norms = {
        "attention_norm": "attention_norm" if post_norm else "input_layernorm",
        "mlp_norm": "mlp_norm" if post_norm else "pre_mlp_layernorm",
    }
    for new, old in norms.items():
        yield from _renamed("decoder", f"{source}.{old}", f"{target}.{new}", (hidden,), has_norm_bias)
    groups = decoder.key_value_heads
    # Of each key head: its queries, the key, the value.
    sizes = (decoder.num_heads // groups * decoder.head_size, decoder.head_size, decoder.head_size)
    attention = {f"{target}.self_attn.{part}_proj": size for part, size in zip("qkv", sizes, strict=True)}
    qkv = f"{source}.self_attention.linear_qkv"
    yield from _fused("decoder", qkv, attention, hidden, groups, decoder.has_qkv_biases)
    output = f"{source}.self_attention.linear_proj"
    shape = (hidden, decoder.attention_size)
    yield from _renamed("decoder", output, f"{target}.self_attn.o_proj", shape, decoder.biases)
    parts = ("gate_proj", "up_proj") if decoder.is_gated else ("up_proj",)
    first = {f"{target}.mlp.{part}": wide for part in parts}
    yield from _fused("decoder", f"{source}.mlp.linear_fc1", first, hidden, 1, decoder.biases)
    second = f"{source}.mlp.linear_fc2"
    yield from _renamed("decoder", second, f"{target}.mlp.down_proj", (hidden, wide), decoder.biases)


def _encoder_rules(config: ModelConfig) -> Iterator[Rule]:
    decoder_hidden = config.decoder.hidden_size
    for name, encoder in config.encoders.items():
        source, target = f"encoders.{name}", f"model.encoders.{name}"
        if encoder.pretrained is None:
            yield from _own_encoder(config, encoder, source, target)
        else:
            for parameter, shape in parameter_shapes(encoder).items():
                yield _same("encoders", source, target, f"model.{parameter}", shape)
        depths = (0,) if encoder.connector == "linear" else (0, 2, 4)
        for depth in depths:
            shape = (decoder_hidden, decoder_hidden if depth else encoder.hidden_size)
            yield from _renamed(
                "encoders", f"{source}.connector.{depth}", f"{target}.connector.{depth}", shape
            )


def _own_encoder(config: ModelConfig, encoder: EncoderConfig, source: str, target: str) -> Iterator[Rule]:
    hidden = encoder.hidden_size
    yield _embedding(
        "encoders", f"{source}.token_embedding.weight", f"{target}.token_embedding", config, hidden
    )
    if encoder.positions == "learned":
        yield _same("encoders", source, target, "text_positions.weight", (encoder.max_text_positions, hidden))
    for name, shape in modality_of_encoder(encoder).embedding_shapes(encoder).items():
        yield _same("encoders", source, target, name, shape)
    if encoder.relative_bias:
        name_of_bias = f"{target}.relative_bias.weight"
        table = (encoder.relative_bias.num_buckets, encoder.num_heads)
        yield _one("encoders", f"{source}.relative_bias.table.weight", name_of_bias, table)
    for layer in range(encoder.num_layers):
        yield from _encoder_layer(encoder, layer, f"{source}.layers.{layer}", f"{target}.layers.{layer}")
    if encoder.normalization == "pre_ln":
        has_bias = encoder.norm == "layer_norm"
        yield from _renamed("encoders", f"{source}.final_norm", f"{target}.final_norm", (hidden,), has_bias)


def _encoder_layer(encoder: EncoderConfig, layer: int, source: str, target: str) -> Iterator[Rule]:
    hidden, wide = encoder.hidden_size, encoder.feed_forward_size
    for old, new in {"attention_norm": "attention_norm", "ffn_norm": "mlp_norm"}.items():
        has_bias = encoder.norm == "layer_norm"
        yield from _renamed("encoders", f"{source}.{old}", f"{target}.{new}", (hidden,), has_bias)
    # Our own fused projection is not interleaved by head: all queries, all keys, all values.
    key_value = encoder.key_value_heads * encoder.head_size
    sizes = (hidden, key_value, key_value)
    attention = {f"{target}.self_attn.{part}_proj": size for part, size in zip("qkv", sizes, strict=True)}
    yield from _fused("encoders", f"{source}.qkv", attention, hidden, 1, encoder.biases)
    output = f"{source}.attention_output"
    yield from _renamed("encoders", output, f"{target}.self_attn.o_proj", (hidden, hidden), encoder.biases)
    parts = ("gate_proj", "up_proj") if encoder.is_gated else ("up_proj",)
    for name in encoder.feed_forwards(layer):
        old, new = (
            f"{source}.feed_forwards.{name}",
            f"{target}.mlp" + ("" if name == "shared" else f".{name}"),
        )
        first = {f"{new}.{part}": wide for part in parts}
        yield from _fused("encoders", f"{old}.ffn_in", first, hidden, 1, encoder.biases)
        second = f"{old}.ffn_out"
        yield from _renamed("encoders", second, f"{new}.down_proj", (hidden, wide), encoder.biases)


def _same(component: str, source: str, target: str, leaf: str, shape: Shape) -> Rule:
    return _one(component, f"{source}.{leaf}", f"{target}.{leaf}", shape)


def _one(component: str, source: str, target: str, shape: Shape) -> Rule:
    return Rule(component, source, shape, {target: shape}, lambda whole: [whole], lambda parts: parts[0])


def _renamed(
    component: str, source: str, target: str, weight: Shape, has_bias: bool = True
) -> Iterator[Rule]:
    """Weight and bias of a module that only changes its name."""
    yield _same(component, source, target, "weight", weight)
    if has_bias:
        yield _same(component, source, target, "bias", weight[:1])


def _embedding(component: str, name: str, target: str, config: ModelConfig, hidden: int) -> Rule:
    real, padded = config.vocab_size, config.padded_vocab_size
    return Rule(
        component,
        name,
        (padded, hidden),
        {f"{target}.weight": (real, hidden)},
        lambda whole: [whole[:real]],
        lambda parts: functional.pad(parts[0], (0, 0, 0, padded - real)),
    )


def _fused(
    component: str,
    source: str,
    targets: dict[str, int],
    hidden: int,
    num_groups: int,
    has_bias: bool = True,
) -> Iterator[Rule]:
    """Several projections in one: of each group the rows of the first, then of the second, and so on.

    Args:
        source: the fused module.
        targets: by module, its rows in one group.
        num_groups: how often the targets take turns.
    """
    sizes = list(targets.values())
    for leaf, rest in (("weight", (hidden,)), ("bias", ()))[: 2 if has_bias else 1]:

        def split(whole: Tensor) -> list[Tensor]:
            rest = whole.shape[1:]  # fewer columns in an adapter's factor of the same rows
            parts = whole.view(num_groups, sum(sizes), *rest).split(sizes, dim=1)
            return [part.reshape(-1, *rest) for part in parts]

        def join(parts: Sequence[Tensor], rest: Shape = rest) -> Tensor:
            grouped = [part.view(num_groups, -1, *rest) for part in parts]
            return torch.cat(grouped, dim=1).reshape(-1, *rest)

        names = {f"{module}.{leaf}": (num_groups * size, *rest) for module, size in targets.items()}
        yield Rule(component, f"{source}.{leaf}", (num_groups * sum(sizes), *rest), names, split, join)
