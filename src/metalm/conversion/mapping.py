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
    hidden = decoder.hidden_size
    yield _embedding("decoder", "gpt.embedding.word_embeddings.weight", "model.embed_tokens", config, hidden)
    names = _decoder_layer_names(decoder)
    for layer in range(decoder.num_layers):
        source, target = f"gpt.decoder.layers.{layer}", f"model.layers.{layer}"
        yield from _fused_qkv(
            "decoder", f"{source}.self_attention.linear_qkv", f"{target}.self_attn", hidden, decoder.num_heads
        )
        for old, new, shape in names:
            yield from _renamed("decoder", f"{source}.{old}", f"{target}.{new}", shape)
    if decoder.normalization == "pre_ln":
        yield from _renamed("decoder", "gpt.decoder.final_layernorm", "model.final_norm", (hidden,))


def _decoder_layer_names(decoder: DecoderConfig) -> list[tuple[str, str, Shape]]:
    """Megatron's and our names of a layer's modules, with the shape of the weight."""
    hidden, wide = decoder.hidden_size, decoder.feed_forward_size
    post_norm = decoder.normalization == "deepnorm"
    return [
        ("self_attention.linear_proj", "self_attn.o_proj", (hidden, hidden)),
        ("attention_norm" if post_norm else "input_layernorm", "attention_norm", (hidden,)),
        ("mlp.linear_fc1", "mlp.up_proj", (wide, hidden)),
        ("mlp.linear_fc2", "mlp.down_proj", (hidden, wide)),
        ("mlp_norm" if post_norm else "pre_mlp_layernorm", "mlp_norm", (hidden,)),
    ]


def _encoder_rules(config: ModelConfig) -> Iterator[Rule]:
    decoder_hidden = config.decoder.hidden_size
    for name, encoder in config.encoders.items():
        hidden = encoder.hidden_size
        source, target = f"encoders.{name}", f"model.encoders.{name}"
        yield _embedding(
            "encoders", f"{source}.token_embedding.weight", f"{target}.token_embedding", config, hidden
        )
        yield _same("encoders", source, target, "text_positions.weight", (encoder.max_text_positions, hidden))
        if encoder.image:
            patch = (hidden, 3 * encoder.image.patch_size**2)
            yield from _renamed("encoders", f"{source}.patch_embedding", f"{target}.patch_embedding", patch)
            grid = (encoder.image.num_patches, hidden)
            yield _same("encoders", source, target, "image_positions.weight", grid)
        if encoder.relative_bias:
            name_of_bias = f"{target}.relative_bias.weight"
            table = (encoder.relative_bias.num_buckets, encoder.num_heads)
            yield _one("encoders", f"{source}.relative_bias.table.weight", name_of_bias, table)
        for layer in range(encoder.num_layers):
            names = _encoder_layer_names(encoder, layer)
            old, new = f"{source}.layers.{layer}", f"{target}.layers.{layer}"
            # Our own fused projection is not interleaved by head: all queries, all keys, all values.
            yield from _fused_qkv("encoders", f"{old}.qkv", f"{new}.self_attn", hidden, num_groups=1)
            for old_name, new_name, shape in names:
                yield from _renamed("encoders", f"{old}.{old_name}", f"{new}.{new_name}", shape)
        if encoder.normalization == "pre_ln":
            yield from _renamed("encoders", f"{source}.final_norm", f"{target}.final_norm", (hidden,))
        depths = (0,) if encoder.connector == "linear" else (0, 2, 4)
        for depth in depths:
            shape = (decoder_hidden, decoder_hidden if depth else hidden)
            yield from _renamed(
                "encoders", f"{source}.connector.{depth}", f"{target}.connector.{depth}", shape
            )


def _encoder_layer_names(encoder: EncoderConfig, layer: int) -> list[tuple[str, str, Shape]]:
    """Both names of a layer's modules, with the shape of the weight."""
    hidden, wide = encoder.hidden_size, encoder.feed_forward_size
    names: list[tuple[str, str, Shape]] = [
        ("attention_output", "self_attn.o_proj", (hidden, hidden)),
        ("attention_norm", "attention_norm", (hidden,)),
        ("ffn_norm", "mlp_norm", (hidden,)),
    ]
    for part in encoder.feed_forwards(layer):
        old, new = f"feed_forwards.{part}", "mlp" if part == "shared" else f"mlp.{part}"
        names.append((f"{old}.ffn_in", f"{new}.up_proj", (wide, hidden)))
        names.append((f"{old}.ffn_out", f"{new}.down_proj", (hidden, wide)))
    return names


def _same(component: str, source: str, target: str, leaf: str, shape: Shape) -> Rule:
    return _one(component, f"{source}.{leaf}", f"{target}.{leaf}", shape)


def _one(component: str, source: str, target: str, shape: Shape) -> Rule:
    return Rule(component, source, shape, {target: shape}, lambda whole: [whole], lambda parts: parts[0])


def _renamed(component: str, source: str, target: str, weight: Shape) -> Iterator[Rule]:
    """Weight and bias of a module that only changes its name."""
    yield _same(component, source, target, "weight", weight)
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


def _fused_qkv(component: str, source: str, target: str, hidden: int, num_groups: int) -> Iterator[Rule]:
    """A fused projection [groups, (query, key, value), rows, ...], weight and bias."""
    rows = hidden // num_groups
    for leaf, rest in (("weight", (hidden,)), ("bias", ())):

        def split(whole: Tensor, rest: Shape = rest) -> list[Tensor]:
            parts = whole.view(num_groups, 3, rows, *rest)
            return [parts[:, index].reshape(hidden, *rest) for index in range(3)]

        def join(parts: Sequence[Tensor], rest: Shape = rest) -> Tensor:
            grouped = [part.view(num_groups, rows, *rest) for part in parts]
            return torch.stack(grouped, dim=1).reshape(3 * hidden, *rest)

        names = {f"{target}.{part}_proj.{leaf}": (hidden, *rest) for part in "qkv"}
        yield Rule(component, f"{source}.{leaf}", (3 * hidden, *rest), names, split, join)
