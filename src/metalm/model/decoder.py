"""The causal decoder: Megatron's GPTModel, with span vectors docked into its input.

The input of the first layer is made of two kinds of vectors, token embeddings and docked encoder
vectors; positions are added to both (PAPER section 2), or turn the queries and keys of both.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from metalm.batch import EncoderBatch, SemiCausalBatch
from metalm.config import DecoderConfig, ModelConfig
from metalm.kernels import linear_cross_entropy
from metalm.model.adapters import adapter_draw, is_adapter
from metalm.model.decoder_cache import DecoderCache
from metalm.model.decoder_layer import (
    DecoderActivation,
    DecoderNorm,
    ResidualNorm,
    Visibility,
    decoder_block_spec,
)
from metalm.model.decoder_linear import adapt_decoder
from metalm.model.deepnorm import deepnorm_divisor
from metalm.model.graph_inputs import decoder_inputs
from metalm.model.graphs import LayerGraphs, Run
from metalm.model.hidden_dropout import SITES_PER_LAYER, RowDropout
from metalm.model.initialization import Draw, constant, mirrored, normal, xavier_std
from metalm.model.megatron_config import mark_sharded_parameters, megatron_config
from metalm.model.positions import rotary_angles, rotation, sinusoidal_positions
from metalm.model.recompute import Recompute
from metalm.model.visibility import batch_mask
from metalm.parallel.megatron_on_cpu import let_megatron_allocate_on_cpu
from metalm.parallel.regions import gather_last_dimension, gather_positions
from metalm.parallel.topology import Topology

PRE_LN_STD = 0.02


class Decoder(nn.Module):
    """This rank's tensor-parallel shard of the decoder.

    The positions of a micro-batch's rows, laid end to end, are cut into a run for each context-parallel rank;
    a run is what embeddings, layers and loss of the rank see.
    """

    def __init__(
        self,
        config: ModelConfig,
        sequence_length: int,
        topology: Topology,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        """Build the shard, without initial weights.

        Args:
            config: of the model.
            sequence_length: longest row.
            topology: this rank's place.
            sequence_parallel: split the positions between the layers' matrix products over the TP group;
                the group's size must divide the row length, or its share of a context rank.
        """
        super().__init__()
        self.config = config.decoder
        self.vocab_size = config.vocab_size
        self.topology, self.tensor_group = topology, topology.tensor_group
        self.sequence_parallel = sequence_parallel and topology.tensor_size > 1
        if self.sequence_parallel:
            let_megatron_allocate_on_cpu()
        self.gpt = GPTModel(
            megatron_config(config.decoder, topology.tensor_size, sequence_parallel=self.sequence_parallel),
            decoder_block_spec(config.decoder),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.decoder.max_positions or sequence_length,
            share_embeddings_and_output_weights=config.decoder.tied_output,
            position_embedding_type="learned_absolute" if config.decoder.positions == "learned" else "none",
            scatter_embedding_sequence_parallel=False,
        )
        self.graphs: LayerGraphs | None = None
        """What runs the layers in training, where they can run so."""
        self._again = Recompute() if config.decoder.recompute == "selective" else None
        for module in self.gpt.decoder.layers.modules():
            if isinstance(module, DecoderNorm | ResidualNorm | DecoderActivation):
                module.again = self._again
        mark_sharded_parameters(self, config.decoder)
        if config.decoder.adapter is not None:
            adapt_decoder(self, config.decoder, topology.tensor_size)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(config.decoder, name))

    @property
    def output_weight(self) -> nn.Parameter:
        """[vocabulary / tp, D] of the output layer."""
        gpt = self.gpt
        return gpt.embedding.word_embeddings.weight if self.config.tied_output else gpt.output_layer.weight

    def forward(
        self,
        batch: SemiCausalBatch,
        encoded: dict[str, Tensor],
        logits_at: Tensor | None = None,
        *,
        with_losses: bool = False,
        cache: DecoderCache | None = None,
    ) -> Any:
        """Losses of all positions, or the logits of some, or both.

        Args:
            batch: one micro-batch, on the parameters' device.
            encoded: by encoder name, the vectors [R * L, D] of all ranks with these rows.
            logits_at: [M] int64, indices into the flattened [B * S] positions.
            with_losses: both, as a pair.
            cache: of rows that are continued; the batch is the rows, or made by `DecoderCache.next_batch`.

        Returns:
            Losses [B, S] float32, of every position, trained or not, but 0 where another context rank has the
            position; or logits [M, vocabulary], whole on every rank with these rows and without gradients.

        Collective: the ranks with these rows.
        """
        if self.config.scale_docked_vectors:
            encoded = {name: vectors * self._scale(vectors) for name, vectors in encoded.items()}
        hidden = self._layers(self._input(batch, encoded), batch, cache)
        logits = None
        if logits_at is not None:
            chosen = gather_positions(hidden, logits_at, self.topology)
            shard = functional.linear(chosen, self.output_weight.detach())
            logits = gather_last_dimension(shard, self.tensor_group)[:, : self.vocab_size]
            if not with_losses:
                return logits
        held = self._held(batch)
        losses = linear_cross_entropy(
            hidden,
            self.output_weight,
            batch.labels.flatten()[held],
            group=self.tensor_group,
            vocab_size=self.vocab_size,
        )
        losses = functional.pad(losses, (held.start, batch.labels.numel() - held.stop)).view_as(batch.labels)
        return losses if logits is None else (losses, logits)

    def _held(self, batch: SemiCausalBatch) -> slice:
        """This context rank's run of the B * S positions."""
        share = batch.tokens.numel() // self.topology.context_size
        return slice(self.topology.context_rank * share, (self.topology.context_rank + 1) * share)

    def _input(self, batch: SemiCausalBatch, encoded: dict[str, Tensor]) -> Tensor:
        """Input of the first layer, [B * S / C, 1, D], whole on every TP rank.

        To Megatron a micro-batch is one row, in which the mask keeps apart what is apart: the rows laid end
        to end are what attention takes without copies.
        """
        held = self._held(batch)
        config, embedding = self.config, self.gpt.embedding
        embedded = embedding.word_embeddings(batch.tokens.flatten()[held])
        if config.scale_embedding:
            embedded = embedded * self._scale(embedded)
        hidden = dock(embedded, encoded, batch.encoders, self.topology.context_rank)
        positions = batch.positions.flatten()[held]
        if config.positions == "sinusoidal":
            hidden = hidden + sinusoidal_positions(positions, config.hidden_size).to(hidden.dtype)
        elif config.positions == "learned":
            hidden = hidden + embedding.position_embeddings(positions)
        return hidden[:, None]

    def _scale(self, vectors: Tensor) -> float:
        """What the vectors of the input are multiplied by where they are scaled."""
        scale: float = self.config.hidden_size**0.5
        if self.config.scale_embedding == "rounded":
            return torch.tensor(scale).to(vectors.dtype).item()  # on the host
        return scale

    def _layers(self, hidden: Tensor, batch: SemiCausalBatch, cache: DecoderCache | None = None) -> Tensor:
        """Output of the last layer, [B * S / C, D].

        Megatron's layers are called here, to recompute them if asked: its own recomputation, and its block's
        forward under sequence parallelism, need CUDA.
        """
        block, rotary = self.gpt.decoder, self._rotary(batch)
        dropout = self._dropout(batch)
        topology = self.topology
        context_group = topology.context_group if topology.context_size > 1 else None
        mask = cache.mask(batch) if cache is not None else None
        seen = Visibility(mask or batch_mask(batch), dropout, context_group, cache)

        def launch(layer: nn.Module, hidden: Tensor) -> Tensor:
            output: Tensor = layer(hidden, attention_mask=seen, rotary_pos_emb=rotary)[0]
            return output

        run: Run = launch
        if self.graphs is not None and self.training and torch.is_grad_enabled():
            run = self.graphs.start(launch, hidden, decoder_inputs(seen, rotary))
        if self.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tensor_group)
        if dropout is not None:
            hidden = dropout.at(SITES_PER_LAYER * len(block.layers)).drop(hidden)
        for layer in block.layers:
            if self.config.recompute is True:  # no layer draws from torch's generator
                hidden = checkpoint(run, layer, hidden, use_reentrant=False, preserve_rng_state=False)
            elif self._again is not None:
                with self._again:
                    hidden = run(layer, hidden)
                self._again.end_layer(hidden)
            else:
                hidden = run(layer, hidden)
        if self._again is not None:
            self._again.end()
        if block.final_layernorm is not None:
            hidden = block.final_layernorm(hidden)
        if self.sequence_parallel:
            # Every rank gets the whole gradient from the loss, so the backward only cuts.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        return hidden.squeeze(1)

    def _dropout(self, batch: SemiCausalBatch) -> RowDropout | None:
        config, topology = self.config, self.topology
        if not self.training or not config.dropout:
            return None
        rows, length = batch.tokens.shape
        positions = torch.arange(length, dtype=torch.int32, device=batch.tokens.device).repeat(rows)
        held = self._held(batch)
        if self.sequence_parallel:
            share = (held.stop - held.start) // topology.tensor_size
            first = held.start + topology.tensor_rank * share
            held = slice(first, first + share)
        share_of_heads = topology.tensor_rank * topology.context_size + topology.context_rank
        first_head = share_of_heads * config.num_heads // topology.rows_size
        seeds = batch.dropout_seeds.repeat_interleave(length, output_size=rows * length)
        return RowDropout(config.dropout, seeds, positions, held, first_head)

    def _rotary(self, batch: SemiCausalBatch) -> Tensor | None:
        """By what each row's own positions are turned, [2, B * S / C, K / 2]."""
        config = self.config
        if config.positions != "rope":
            return None
        positions = batch.positions.flatten()[self._held(batch)]
        angles = rotary_angles(positions, config.rotary_size, config.rope_base, config.rope_scaling)
        return rotation(angles)


def dock(
    embedded: Tensor, encoded: dict[str, Tensor], spans: dict[str, EncoderBatch], context_rank: int = 0
) -> Tensor:
    """Put the span vectors where their spans stand, in place of the token embeddings.

    Args:
        embedded: [B * S / C, D], of a context rank's run of positions.
        encoded: by encoder name, [R * L, D].
        spans: by encoder name, which vector goes where.
        context_rank: which run it is.

    Returns:
        [B * S / C, D] in the dtype of `embedded`.
    """
    first = context_rank * embedded.shape[0]
    for name, span in spans.items():
        here = slice(*span.dock_bounds[context_rank : context_rank + 2])
        vectors = encoded[name].index_select(0, span.dock_vectors[here]).to(embedded.dtype)
        positions = span.dock_positions[here] - first if first else span.dock_positions[here]
        embedded = embedded.index_copy(0, positions, vectors)
    return embedded


def is_trained(config: DecoderConfig, name: str) -> bool:
    """Whether a parameter of the Decoder is trained: see `DecoderConfig.trained_layers`."""
    if config.trained_layers == "all" or is_adapter(name):
        return True
    _, part, *rest = name.split(".")
    if part == "decoder" and rest[0] == "layers":
        return int(rest[1]) >= config.num_frozen_layers
    return part != "embedding" and config.num_frozen_layers < config.num_layers


def decoder_draw(config: DecoderConfig, name: str) -> Draw:
    """How a parameter of the Decoder starts.

    Embeddings that are scaled have unit variance afterwards, and so have the logits (*open*). Where they are
    the output layer as well, the last norm keeps positions from predicting their own token: see README.md.
    """
    if (draw := adapter_draw(name)) is not None:
        return draw
    hidden = config.hidden_size
    leaf, kind = name.split(".")[-2:]
    if kind == "bias":
        return constant(0.0)
    if leaf.endswith("norm"):
        return mirrored if _is_mirrored(config, name) else constant(1.0)
    if leaf in ("word_embeddings", "output_layer") and config.scale_embedding:
        return normal(hidden**-0.5)
    if leaf in ("word_embeddings", "output_layer", "position_embeddings"):
        return normal(PRE_LN_STD)
    if config.normalization == "pre_ln":
        depth = 2 * config.num_layers if leaf in ("linear_proj", "linear_fc2") else 1
        return normal(PRE_LN_STD / depth**0.5)
    if leaf == "linear_qkv":
        return lambda whole, generator: _deepnorm_qkv(whole, generator, config)
    width = config.feed_forward_size if leaf in ("linear_fc1", "linear_fc2") else config.attention_size
    return normal(xavier_std(hidden, width) / deepnorm_divisor(config.num_layers))


def _is_mirrored(config: DecoderConfig, name: str) -> bool:
    """Whether these are the gains of the last norm, and the output layer's start asks for it."""
    last = (
        f"layers.{config.num_layers - 1}.mlp_norm"
        if config.normalization == "deepnorm"
        else "final_layernorm"
    )
    is_open = config.start == "mirrored" and config.tied_output and bool(config.scale_embedding)
    return is_open and name.endswith(f"{last}.weight")


def _deepnorm_qkv(whole: Tensor, generator: torch.Generator, config: DecoderConfig) -> None:
    """Megatron groups by key head: [Hkv * (its queries, key, value) * K, D]."""
    hidden, groups = config.hidden_size, config.key_value_heads
    whole.normal_(generator=generator)
    parts = whole.view(groups, -1, config.head_size, hidden)
    parts[:, :-2] *= xavier_std(hidden, config.attention_size)
    parts[:, -2:] *= xavier_std(hidden, groups * config.head_size)
    parts[:, -1] /= deepnorm_divisor(config.num_layers)
