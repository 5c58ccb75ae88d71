"""Bytes that one rank sends per optimizer step, by kind and by group, for ring collectives.

Over n ranks a ring sends (n - 1) / n of the whole for a gather or a reduce-scatter, twice that for an
all-reduce. DeepSpeed reduces gradients at stages 1 and 2 by all-reduce, at 3 by reduce-scatter; at stage 1
once per step, else once per micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metalm.config import RunConfig
from metalm.model.flops import Work
from metalm.planning.memory import (
    EnginePlan,
    element_size,
    exchanged_key_heads,
    gradient_size,
    share_elements,
)


@dataclass(frozen=True)
class Traffic:
    """One kind of communication."""

    kind: str
    group_size: int
    spans_nodes: bool
    """Whether the group's ranks are spread over nodes (when there are several)."""
    num_bytes: float
    """That one rank sends per optimizer step."""
    calls: float
    """Collectives per optimizer step."""
    hidden: bool
    """Whether it runs beside the computation."""


def plan_traffic(
    config: RunConfig, world_size: int, engines: dict[str, EnginePlan], micro_batch: Work, per_node: int
) -> list[Traffic]:
    """All communication of a step, that of groups of one rank left out."""
    tensor, sharing = config.parallel.tensor, config.parallel.rows_size
    accumulation = config.training.global_batch_size // (
        world_size // sharing * config.training.micro_batch_size
    )
    size = element_size(config)
    num_bytes, calls = _tensor_parallel_bytes(config, size)
    traffic = [
        Traffic(
            "decoder all-reduces",
            tensor,
            tensor > per_node,
            accumulation * num_bytes,
            accumulation * calls,
            hidden=False,
        )
    ]
    vectors = sum(sharing * share_elements(micro_batch, name, sharing) for name in config.model.encoders)
    traffic.append(
        Traffic(
            "gather_encoded",
            sharing,
            sharing > per_node,
            accumulation * _gather(sharing) * vectors * config.model.decoder.hidden_size * size,
            accumulation * len(config.model.encoders),
            hidden=False,
        )
    )
    context_bytes, context_calls = _context_parallel_bytes(config, vectors, size)
    traffic.append(
        Traffic(
            "context exchanges",
            config.parallel.context,
            sharing > per_node,
            accumulation * context_bytes,
            accumulation * context_calls,
            hidden=False,
        )
    )
    for name, engine in engines.items():
        encoder_layers = sum(one.num_layers for one in config.model.encoders.values())
        layers = config.model.decoder.num_layers if name == "decoder" else encoder_layers
        sizes = (size, gradient_size(config))
        traffic += _zero_traffic(name, engine, accumulation, sizes, layers, world_size, per_node)
    return [part for part in traffic if part.group_size > 1 and part.num_bytes]


def _gather(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor_parallel_bytes(config: RunConfig, size: int) -> tuple[float, int]:
    """Bytes and collectives per micro-batch.

    Attention and feed-forward are summed once forward and once backward in each layer, the embedding forward,
    the output layer backward. With sequence parallelism each sum is a reduce-scatter and a gather, and the
    backward gathers both branches' inputs once more.
    """
    decoder, tensor = config.model.decoder, config.parallel.tensor
    tensor_bytes = size * _positions(config) * decoder.hidden_size
    sums = 4 * decoder.num_layers + 2 + (2 * decoder.num_layers if decoder.recompute is True else 0)
    gathers = 2 * decoder.num_layers if config.parallel.sequence_parallel else 0
    calls = sums * (2 if config.parallel.sequence_parallel else 1) + gathers
    return tensor_bytes * _gather(tensor) * (2 * sums + gathers), calls


def _context_parallel_bytes(config: RunConfig, vectors: int, size: int) -> tuple[float, int]:
    """Bytes and collectives per micro-batch.

    Around each layer's attention queries, keys and values, and what is attended, are exchanged forward and
    backward; the gradients of the encoders' vectors once.
    """
    decoder, parallel = config.model.decoder, config.parallel
    heads = 2 * decoder.num_heads + 2 * exchanged_key_heads(config)
    exchanged = _positions(config) * heads * decoder.head_size / parallel.tensor
    passes = decoder.num_layers * (3 if decoder.recompute is True else 2)
    gradients = vectors / parallel.tensor * decoder.hidden_size
    num_bytes = size * _gather(parallel.context) * (passes * exchanged + gradients)
    return num_bytes, 2 * passes + len(config.model.encoders)


def _positions(config: RunConfig) -> float:
    """Of a micro-batch on one rank."""
    return config.training.micro_batch_size * config.data.sequence_length / config.parallel.context


def _zero_traffic(
    name: str,
    engine: EnginePlan,
    accumulation: int,
    sizes: tuple[int, int],
    layers: int,
    world_size: int,
    per_node: int,
) -> list[Traffic]:
    """Of one engine; `sizes` are the bytes of a weight and of a gradient."""
    size, gradient = sizes
    zero, ranks, count = engine.zero, engine.shards, engine.count
    spans_nodes = world_size > per_node
    reductions = 1 if zero.stage == 1 else accumulation
    reduced = _gather(ranks) * (1 if zero.stage == 3 else 2) * gradient * count.trained_per_rank
    buckets = math.ceil(count.trained_per_rank / zero.bucket_elements)
    found = [
        Traffic(
            f"{name} gradients",
            ranks,
            spans_nodes,
            reductions * reduced,
            reductions * buckets,
            hidden=zero.overlap,
        )
    ]
    whole = _gather(ranks) * size
    if zero.stage < 3:  # once, after the update
        gathered = Traffic(
            f"{name} weights", ranks, spans_nodes, whole * count.trained_per_rank, buckets, hidden=False
        )
        return [*found, gathered]
    # For the forward, and for the backward again unless all is still there.
    kept = 2 * count.per_rank <= zero.max_reuse_elements
    passes = accumulation * (1 if kept or zero.node_shards > 1 else 2)
    found.append(
        Traffic(
            f"{name} weights",
            ranks,
            spans_nodes,
            passes * whole * count.per_rank,
            passes * layers,
            hidden=True,
        )
    )
    if zero.node_shards > 1 and not kept:
        found.append(
            Traffic(
                f"{name} weights, backward",
                zero.node_shards,
                zero.node_shards > per_node,
                accumulation * _gather(zero.node_shards) * size * count.per_rank,
                accumulation * layers,
                hidden=True,
            )
        )
    return found
