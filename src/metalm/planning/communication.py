"""Bytes that one rank sends per optimizer step, by kind and by group, for ring collectives.

Over n ranks a ring sends (n - 1) / n of the whole for a gather or a reduce-scatter, twice that for an
all-reduce. DeepSpeed reduces gradients at stages 1 and 2 by all-reduce, at 3 by reduce-scatter; at stage 1
once per step, else once per micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from metalm.config import RunConfig
from metalm.model.flops import Work
from metalm.planning.memory import EnginePlan, element_size, exchanged_key_heads, share_elements


@dataclass(frozen=True)
class Traffic:
    """One kind of communication."""

    kind: str
    group_size: int
    spans_nodes: bool
    """Whether the group's ranks are spread over nodes (when there are several)."""
    num_bytes: float
    """That one rank sends per optimizer step."""
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
    traffic = [
        Traffic(
            "decoder all-reduces",
            tensor,
            tensor > per_node,
            accumulation * _tensor_parallel_bytes(config, size),
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
            hidden=False,
        )
    )
    traffic.append(
        Traffic(
            "context exchanges",
            config.parallel.context,
            sharing > per_node,
            accumulation * _context_parallel_bytes(config, vectors, size),
            hidden=False,
        )
    )
    for name, engine in engines.items():
        traffic += _zero_traffic(name, engine, accumulation, size, spans_nodes=world_size > per_node)
    return [part for part in traffic if part.group_size > 1 and part.num_bytes]


def _gather(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor_parallel_bytes(config: RunConfig, size: int) -> float:
    """Per micro-batch: attention and feed-forward are summed once forward and once backward in each layer,
    the embedding forward, the output layer backward. With sequence parallelism each sum is a reduce-scatter
    and a gather, and the backward gathers both branches' inputs once more."""
    decoder, tensor = config.model.decoder, config.parallel.tensor
    tensor_bytes = size * _positions(config) * decoder.hidden_size
    sums = 4 * decoder.num_layers + 2 + (2 * decoder.num_layers if decoder.recompute else 0)
    gathers = 2 * decoder.num_layers if config.parallel.sequence_parallel else 0
    return tensor_bytes * _gather(tensor) * (2 * sums + gathers)


def _context_parallel_bytes(config: RunConfig, vectors: int, size: int) -> float:
    """Per micro-batch: around each layer's attention queries, keys and values, and what is attended, are
    exchanged forward and backward; the gradients of the encoders' vectors once."""
    decoder, parallel = config.model.decoder, config.parallel
    heads = 2 * decoder.num_heads + 2 * exchanged_key_heads(config)
    exchanged = _positions(config) * heads * decoder.head_size / parallel.tensor
    passes = decoder.num_layers * (3 if decoder.recompute else 2)
    gradients = vectors / parallel.tensor * decoder.hidden_size
    return size * _gather(parallel.context) * (passes * exchanged + gradients)


def _positions(config: RunConfig) -> float:
    """Of a micro-batch on one rank."""
    return config.training.micro_batch_size * config.data.sequence_length / config.parallel.context


def _zero_traffic(
    name: str, engine: EnginePlan, accumulation: int, size: int, *, spans_nodes: bool
) -> list[Traffic]:
    stage, ranks, count = engine.zero.stage, engine.shards, engine.count
    reductions = 1 if stage == 1 else accumulation
    reduced = _gather(ranks) * (1 if stage == 3 else 2) * size * count.trained_per_rank
    gathered = count.trained_per_rank  # stages 1 and 2: once, after the update
    if stage == 3:
        # For the forward, and for the backward again unless all is still there.
        kept = 2 * count.per_rank <= engine.zero.max_reuse_elements
        gathered = accumulation * count.per_rank * (1 if kept else 2)
    return [
        Traffic(
            f"{name} gradients",
            ranks,
            spans_nodes,
            reductions * reduced,
            hidden=engine.zero.overlap,
        ),
        Traffic(
            f"{name} weights",
            ranks,
            spans_nodes,
            _gather(ranks) * size * gathered,
            hidden=stage == 3,
        ),
    ]
