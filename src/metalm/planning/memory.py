"""Bytes per rank, by engine and by kind.

Weights, gradients and optimizer follow from ZeRO's rules alone; buffers are what DeepSpeed and the output
layer hold for a while; activations are what autograd keeps for the backward pass, counted tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from metalm.config import RunConfig
from metalm.loss_chunks import chunk_positions
from metalm.model.flops import Work, trains_output
from metalm.model.parameters import ParameterCount, count_decoder, count_encoders
from metalm.planning.zero import ZeroSettings, zero_settings
from metalm.share_lengths import share_length

MASTER_AND_MOMENTS = 12
"""Bytes per parameter: fp32 master and two moments; DeepSpeed keeps masters in fp32 training, too."""
MASTER_BYTES = 4
"""Of it, what is saved of a frozen parameter, too."""
AVERAGE_BYTES = 4
"""Per parameter, of a moving average of the weights."""
INNER_KEPT = {"gelu": 2, "gelu_tanh": 2, "swiglu": 4, "geglu_tanh": 4}
"""Tensors of the inner width that a feed-forward keeps, by activation."""
INNER_RECOMPUTED = {"gelu": 1, "gelu_tanh": 1, "swiglu": 2, "geglu_tanh": 2}
"""Those of them that selective recomputation makes again: all but what the first layer gives."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of one engine on one rank."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        """Of all kinds."""
        return sum(dataclasses.astuple(self))


KINDS = tuple(field.name for field in dataclasses.fields(Bytes))


@dataclass(frozen=True)
class EnginePlan:
    """One engine: its parameters, how it is sharded, and what a rank holds of it."""

    count: ParameterCount
    zero: ZeroSettings
    shards: int
    """Ranks that ZeRO shards over."""
    held: Bytes
    has_average: bool = False
    """Of its weights."""

    @property
    def state_bytes(self) -> int:
        """Masters, moments and average of a rank's shard, in device or host memory."""
        each = MASTER_AND_MOMENTS + AVERAGE_BYTES * self.has_average
        return each * math.ceil(self.count.trained_per_rank / self.shards)

    @property
    def host_bytes(self) -> int:
        """Of them, what lies in host memory."""
        return self.state_bytes if self.zero.offloads_optimizer else 0

    @property
    def snapshot_bytes(self) -> int:
        """Host memory that a rank takes its part of a checkpoint into, and keeps from the first one on."""
        frozen = self.count.per_rank - self.count.trained_per_rank
        return self.state_bytes + MASTER_BYTES * math.ceil(frozen / self.shards)


def element_size(config: RunConfig) -> int:
    """Bytes of a weight, gradient or activation."""
    return 2 if config.training.precision == "bf16" else 4


def gradient_size(config: RunConfig) -> int:
    """Bytes of a gradient, in memory and on its way."""
    return 4 if config.training.adds_up_in_fp32 else element_size(config)


def plan_engines(config: RunConfig, world_size: int, micro_batch: Work) -> dict[str, EnginePlan]:
    """Both engines, by component.

    Args:
        config: fits on so many ranks.
        micro_batch: the mean work of one micro-batch.
    """
    tensor, size, gradient = config.parallel.tensor, element_size(config), gradient_size(config)
    decoder = count_decoder(config.model, tensor)
    activations = decoder_activations(config, size)
    plans = {
        "decoder": _engine(
            decoder,
            zero_settings(config.deepspeed.decoder),
            world_size // tensor,
            size,
            gradient,
            activations,
            _loss_buffers(config, size),
        )
    }
    if config.model.encoders:
        kept = sum(
            encoder_activations(
                config, name, share_elements(micro_batch, name, config.parallel.rows_size), size
            )
            for name in config.model.encoders
        )
        zero = zero_settings(config.deepspeed.encoders)
        count = count_encoders(config.model)
        plans["encoders"] = _engine(count, zero, world_size, size, gradient, kept, 0.0)
    if config.training.average is not None:
        plans = {component: _with_average(plan) for component, plan in plans.items()}
    return plans


def share_elements(micro_batch: Work, encoder: str, num_shares: int) -> int:
    """Elements of one rank's share of a micro-batch, with padding."""
    return share_length(math.ceil(micro_batch.encoders[encoder].elements / num_shares))


def shard_bytes(
    count: ParameterCount, zero: ZeroSettings, shards: int, size: int, gradient: int | None = None
) -> Bytes:
    """Weights, gradients and optimizer of one engine on one rank under ZeRO.

    Args:
        count: of the component; what one tensor-parallel rank holds.
        zero: stage 1 shards the optimizer, 2 gradients as well, 3 weights as well.
        shards: ranks that ZeRO shards over.
        size: bytes of a weight.
        gradient: bytes of a gradient, if other than of a weight.
    """
    held, trained = count.per_rank, count.trained_per_rank
    trained_shard = math.ceil(trained / shards)
    return Bytes(
        weights=size * _weights_held(held, zero, shards),
        gradients=(gradient or size) * (trained_shard if zero.stage >= 2 else trained),
        optimizer=0 if zero.offloads_optimizer else MASTER_AND_MOMENTS * trained_shard,
        buffers=0.0,
        activations=0.0,
    )


def _weights_held(count: int, zero: ZeroSettings, shards: int) -> int:
    """Under stage 3 a shard, and another one where each node has a copy of its own."""
    if zero.stage < 3:
        return count
    copy = math.ceil(count / zero.node_shards) if zero.node_shards > 1 else 0
    return math.ceil(count / shards) + copy


def decoder_activations(config: RunConfig, size: int) -> float:
    """What autograd keeps of the decoder for one micro-batch on one rank.

    Frozen layers keep no inputs of their products; with nothing trained below them, nothing at all.
    """
    decoder, context = config.model.decoder, config.parallel.context
    positions = config.training.micro_batch_size * config.data.sequence_length / context
    tensor, hidden = config.parallel.tensor, decoder.hidden_size
    # Split over TP: query, key, value, attended, with context ranks before their exchange and behind it; and
    # what the feed-forward keeps of its inner width.
    inner = INNER_KEPT[decoder.activation]
    key_values = 2 * exchanged_key_heads(config) * decoder.head_size
    attention = (2 if context == 1 else 3) * decoder.attention_size + key_values
    split = (attention + inner * decoder.feed_forward_size) / tensor
    # On every TP rank: both norms' inputs and outputs, unless sequence parallelism splits them, too.
    repeated = 4 * hidden / (tensor if config.parallel.sequence_parallel else 1)
    ends = 2 * hidden  # the docked input, and what the output layer reads
    layer = split + repeated
    frozen = 0 if decoder.adapter is not None else decoder.num_frozen_layers
    frozen_layer = 0.0
    if any(encoder.is_trained for encoder in config.model.encoders.values()):
        frozen_layer = layer - decoder.feed_forward_size / tensor - repeated / 2
    again = 0.0
    if decoder.recompute == "selective":
        again = INNER_RECOMPUTED[decoder.activation] * decoder.feed_forward_size / tensor + repeated / 2
    if decoder.recompute is True:
        kept = frozen if frozen_layer else 0
        per_position = (decoder.num_layers - frozen + kept) * hidden + max(layer, frozen_layer) + ends
    else:
        per_position = (decoder.num_layers - frozen) * (layer - again) + frozen * frozen_layer + ends
        per_position += again if frozen < decoder.num_layers else 0.0
    return size * positions * per_position


def exchanged_key_heads(config: RunConfig) -> int:
    """Key heads of all tensor-parallel ranks, with the copies that let each context rank have one."""
    heads, parallel = config.model.decoder.key_value_heads, config.parallel
    return parallel.tensor * math.lcm(heads // parallel.tensor, parallel.context)


def encoder_activations(config: RunConfig, name: str, elements: int, size: int) -> float:
    """What autograd keeps of one encoder and its connector for one share of so many elements."""
    encoder = config.model.encoders[name]
    if not encoder.is_trained:
        return 0.0
    hidden = encoder.hidden_size
    # What the connector reads, and what its inner layers' activations read and give.
    connector = hidden + 4 * config.model.decoder.hidden_size * (encoder.connector == "feed_forward")
    trained = encoder.num_layers - (0 if encoder.adapter is not None else encoder.num_frozen_layers)
    # Both norms' inputs and outputs, query, attended; key, value; what the feed-forward keeps.
    layer = 6 * hidden + 2 * encoder.key_value_heads * encoder.head_size
    layer += INNER_KEPT[encoder.activation] * encoder.feed_forward_size
    layers = trained * hidden + layer * min(trained, 1) if encoder.recompute else trained * layer
    return size * elements * (layers + connector)


def _engine(
    count: ParameterCount,
    zero: ZeroSettings,
    shards: int,
    size: int,
    gradient: int,
    activations: float,
    loss: float,
) -> EnginePlan:
    held = shard_bytes(count, zero, shards, size, gradient)
    buffers = loss
    if count.trained_per_rank:
        buffers += gradient * zero.bucket_elements * (2 if zero.overlap and zero.stage < 3 else 1)
    if not zero.offloads_optimizer:
        buffers += 4 * math.ceil(count.trained_per_rank / shards)  # the update's fp32 gradient
    if zero.stage == 3:
        buffers += size * min(count.per_rank, zero.max_live_elements)  # gathered weights
    held = dataclasses.replace(held, buffers=buffers, activations=activations)
    return EnginePlan(count, zero, shards, held)


def _with_average(plan: EnginePlan) -> EnginePlan:
    plan = dataclasses.replace(plan, has_average=True)
    if plan.zero.offloads_optimizer:
        return plan
    return dataclasses.replace(plan, held=dataclasses.replace(plan.held, optimizer=plan.state_bytes))


def _loss_buffers(config: RunConfig, size: int) -> float:
    """Of the output layer's backward: a chunk of logits, and the weight's gradient, fp32 if it is a sum."""
    rows = config.model.padded_vocab_size // config.parallel.tensor
    all_positions = config.training.micro_batch_size * config.data.sequence_length // config.parallel.context
    positions = min(chunk_positions(rows, size, on_cpu=False), all_positions)
    gradient = rows * config.model.decoder.hidden_size * (size if positions == all_positions else 4)
    if not trains_output(config.model.decoder):
        gradient = 0
    return gradient + positions * rows * size
