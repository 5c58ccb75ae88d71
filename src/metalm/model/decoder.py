"""The causal decoder: Megatron's GPTModel, with span vectors docked into its input.

The input of the first layer is made of two kinds of vectors, token embeddings and docked encoder
vectors; sinusoidal positions are added to both (PAPER section 2). The output layer is the embedding.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from metalm.batch import EncoderBatch, SemiCausalBatch
from metalm.config import DecoderConfig, ModelConfig
from metalm.kernels import IntervalMask, linear_cross_entropy
from metalm.model.decoder_layer import decoder_block_spec
from metalm.model.deepnorm import deepnorm_divisor
from metalm.model.initialization import Draw, constant, normal, xavier_std
from metalm.model.positions import sinusoidal_positions
from metalm.parallel.regions import gather_last_dimension
from metalm.parallel.topology import Topology

PRE_LN_STD = 0.02


class Decoder(nn.Module):
    """This rank's tensor-parallel shard of the decoder."""

    def __init__(self, config: ModelConfig, sequence_length: int, topology: Topology) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.hidden_size = config.decoder.hidden_size
        self.tensor_group = topology.tensor_group
        self.gpt = GPTModel(
            _megatron_config(config.decoder, topology.tensor_size),
            decoder_block_spec(config.decoder),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=sequence_length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="none",
        )
        mark_sharded_parameters(self)

    def forward(
        self, batch: SemiCausalBatch, encoded: dict[str, Tensor], logits_at: Tensor | None = None
    ) -> Tensor:
        """Losses of all positions, or the logits of some.

        Args:
            batch: one micro-batch, on the parameters' device.
            encoded: by encoder name, the vectors [T * L, D] of all TP ranks.
            logits_at: [M] int64, indices into the flattened [B * S] positions.

        Returns:
            Losses [B, S] float32, of every position, trained or not; or logits [M, vocabulary], whole on
            every TP rank and without gradients.

        Collective: the TP group.
        """
        hidden = self._hidden(batch, encoded)
        weight = self.gpt.embedding.word_embeddings.weight
        if logits_at is not None:
            logits = functional.linear(hidden.index_select(0, logits_at), weight)
            return gather_last_dimension(logits, self.tensor_group)[:, : self.vocab_size]
        losses = linear_cross_entropy(
            hidden, weight, batch.labels.flatten(), group=self.tensor_group, vocab_size=self.vocab_size
        )
        return losses.view_as(batch.labels)

    def _hidden(self, batch: SemiCausalBatch, encoded: dict[str, Tensor]) -> Tensor:
        """Last layer's output, [B * S, D]."""
        rows, length = batch.tokens.shape
        embedded = self.gpt.embedding.word_embeddings(batch.tokens) * self.hidden_size**0.5
        docked = dock(embedded.view(rows * length, -1), encoded, batch.encoders)
        positions = sinusoidal_positions(batch.positions, self.hidden_size).to(docked.dtype)
        hidden = docked.view(rows, length, -1) + positions
        mask = IntervalMask(batch.attention_start, batch.attention_end, length)
        hidden = self.gpt.decoder(hidden.transpose(0, 1).contiguous(), mask)  # [S, B, D]
        return hidden.transpose(0, 1).reshape(rows * length, -1)


def dock(embedded: Tensor, encoded: dict[str, Tensor], spans: dict[str, EncoderBatch]) -> Tensor:
    """Put the span vectors where their spans stand, in place of the token embeddings.

    Args:
        embedded: [B * S, D].
        encoded: by encoder name, [T * L, D].
        spans: by encoder name, which vector goes where.

    Returns:
        [B * S, D] in the dtype of `embedded`.
    """
    for name, span in spans.items():
        vectors = encoded[name].index_select(0, span.dock_vectors).to(embedded.dtype)
        embedded = embedded.index_copy(0, span.dock_positions, vectors)
    return embedded


def decoder_draw(config: DecoderConfig, name: str) -> Draw:
    """How a parameter of the Decoder starts; tied embedding of unit variance after its scale (*open*)."""
    hidden, feed_forward = config.hidden_size, config.feed_forward_size
    leaf, kind = name.split(".")[-2:]
    if kind == "bias":
        return constant(0.0)
    if leaf.endswith("norm"):
        return constant(1.0)
    if leaf == "word_embeddings":
        return normal(hidden**-0.5)
    if config.normalization == "pre_ln":
        depth = 2 * config.num_layers if leaf in ("linear_proj", "linear_fc2") else 1
        return normal(PRE_LN_STD / depth**0.5)
    divisor = deepnorm_divisor(config.num_layers)
    if leaf == "linear_qkv":
        return lambda whole, generator: _deepnorm_qkv(whole, generator, config.num_heads, divisor)
    fan_out = feed_forward if leaf in ("linear_fc1", "linear_fc2") else hidden
    return normal(xavier_std(hidden, fan_out) / divisor)


def _deepnorm_qkv(whole: Tensor, generator: torch.Generator, num_heads: int, divisor: float) -> None:
    """Megatron interleaves query, key and value by head: [H * 3 * K, D]."""
    hidden = whole.shape[1]
    whole.normal_(0.0, xavier_std(hidden, hidden), generator=generator)
    whole.view(num_heads, 3, hidden // num_heads, hidden)[:, 2] /= divisor


def mark_sharded_parameters(module: nn.Module) -> None:
    """Say which dimension of which parameter is split, where Megatron says it only while initialising."""
    dimensions = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for part in module.modules():
        dimension = dimensions.get(type(part))
        if dimension is not None and part.weight is not None:
            set_tensor_model_parallel_attributes(part.weight, True, dimension, 1)


def _megatron_config(config: DecoderConfig, tensor_size: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        ffn_hidden_size=config.feed_forward_size,
        tensor_model_parallel_size=tensor_size,
        # Weights come from initialize_parameters, drawn on the CPU alike for every topology.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
