"""What is learnt from a micro-batch: the semi-causal objective, or replaced-token detection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from metalm.batch import EncoderBatch, SemiCausalBatch
from metalm.config import ReplacedTokensConfig
from metalm.parallel.regions import gather_encoded
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch."""

    weighted: Tensor
    """[B, S] float32. Their sum over the global batch, divided by its trained positions, is the loss."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """What the loss is made of, to be looked at: by name, a sum and a count, [2] float64."""


Objective = Callable[[Engines, SemiCausalBatch, Topology], Losses]
"""Collective: all ranks (ZeRO) and the TP group."""


def build_objective(replaced_tokens: ReplacedTokensConfig | None) -> Objective:
    """The objective of a run, by its `training.replaced_tokens`."""
    if replaced_tokens is None:
        return semi_causal_losses
    return partial(replaced_token_losses, settings=replaced_tokens)


def encode(engines: Engines, batch: SemiCausalBatch, topology: Topology) -> dict[str, Tensor]:
    """All span vectors of a micro-batch, by encoder: [T * L, D] each.

    Collective: all ranks (ZeRO) and the TP group.
    """
    if engines.encoders is None:
        return {}
    shares = {name: spans.shares[topology.tensor_rank] for name, spans in batch.encoders.items()}
    return {name: gather_encoded(mine, topology) for name, mine in engines.encoders(shares).items()}


def semi_causal_losses(engines: Engines, batch: SemiCausalBatch, topology: Topology) -> Losses:
    """Spans are encoded, the rest is generated (PAPER section 3)."""
    return Losses(engines.decoder(batch, encode(engines, batch, topology)) * batch.loss_mask)


def replaced_token_losses(
    engines: Engines, batch: SemiCausalBatch, topology: Topology, settings: ReplacedTokensConfig
) -> Losses:
    """The decoder fills in masked tokens, and the encoder tells which tokens it has put in (ELECTRA).

    No gradient goes from the detection through the choice of tokens.
    """
    losses, logits = engines.decoder(
        replace(batch, encoders={}), {}, logits_at=batch.masked_positions, with_losses=True
    )
    masked = losses * batch.loss_mask
    original = torch.where(batch.loss_mask > 0, batch.labels, batch.tokens).flatten()
    chosen = take_by_probability(logits, batch.replacement_draws)
    replaced = original.index_copy(0, batch.masked_positions, chosen)
    ((name, spans),) = batch.encoders.items()
    vectors = encode(engines, replace(batch, encoders={name: _with_tokens(spans, replaced)}), topology)[name]
    scores = vectors.index_select(0, spans.dock_vectors).squeeze(1).float()
    is_replaced = (replaced != original).index_select(0, spans.dock_positions)
    detection = functional.binary_cross_entropy_with_logits(scores, is_replaced.float(), reduction="none")
    by_position = torch.zeros_like(masked).flatten().index_copy(0, spans.dock_positions, detection)
    # Masked positions are counted, not all: a mean over all tokens is its sum times the masked share.
    weight = settings.detection_weight * settings.mask_fraction
    correct, found = (scores > 0) == is_replaced, (scores > 0) & is_replaced
    return Losses(
        masked + weight * by_position.view_as(masked),
        {
            "masked_token_loss": _sum_and_count(masked, batch.masked_positions),
            "detection_loss": _sum_and_count(detection, detection),
            "detection_accuracy": _sum_and_count(correct, correct),
            "detection_recall": torch.stack([found.sum(), is_replaced.sum()]).double(),
            "replaced_share": _sum_and_count(is_replaced, is_replaced),
        },
    )


def take_by_probability(logits: Tensor, draws: Tensor) -> Tensor:
    """A token for each row of logits [M, V]: where the cumulated probabilities pass its draw [M] in [0, 1).

    Returns:
        [M] int64.
    """
    # Not in double precision, which takes gigabytes at 64k tokens.
    cumulated = logits.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
    wanted = (draws * cumulated[:, -1])[:, None].float()
    return torch.searchsorted(cumulated, wanted, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _with_tokens(spans: EncoderBatch, tokens: Tensor) -> EncoderBatch:
    """The same spans with the tokens [B * S] of their positions."""
    shares = spans.shares
    ids = torch.cat([share.token_ids for share in shares])
    ids = ids.index_copy(0, spans.dock_vectors, tokens.index_select(0, spans.dock_positions))
    new = zip(shares, ids.chunk(len(shares)), strict=True)
    return replace(spans, shares=tuple(replace(share, token_ids=own) for share, own in new))


def _sum_and_count(values: Tensor, counted: Tensor) -> Tensor:
    total = values.detach().sum(dtype=torch.float64)
    return torch.stack([total, torch.full_like(total, counted.numel())])
