"""Replaced-token detection (ELECTRA, arXiv 2003.10555), which pretrains a text encoder.

The decoder, which attends to whole documents, fills masked tokens in; the one encoder detects which tokens
are not the original ones. Each document is one span of the encoder. No gradient goes from the detection
through the choice of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from metalm.config import ReplacedTokensConfig, RunConfig
from metalm.data.row import Row, RowSpans
from metalm.data.tokenizer import Tokenizer
from metalm.model.flops import EncoderWork, Work
from metalm.objectives.objective import Losses, Model, encode

if TYPE_CHECKING:
    from torch import Tensor

    from metalm.batch import EncoderBatch, SemiCausalBatch
    from metalm.parallel.topology import Topology


class ReplacedTokens:
    """Masked tokens are trained, and each predicts itself; all tokens are judged by the encoder."""

    name = "replaced_tokens"
    generates = False
    loss_unit = ""

    def __init__(self, config: RunConfig, settings: ReplacedTokensConfig) -> None:
        self._settings = settings
        self._encoder = next(iter(config.model.encoders), "")

    def problems(self, config: RunConfig) -> Iterator[str]:
        encoders, where = config.model.encoders, "training.replaced_tokens"
        if len(encoders) != 1:
            yield f"{where} trains one encoder; model.encoders has {len(encoders)}"
        for name, encoder in encoders.items():
            if encoder.media or encoder.pretrained or encoder.trained_layers != "all":
                yield f"{where}: model.encoders.{name} must be of text, our own, and trained in all layers"
            if encoder.connector != "detection":
                yield f"{where}: model.encoders.{name}.connector must be detection, not {encoder.connector}"
            if config.data.sequence_length > encoder.max_text_positions:
                yield (
                    f"{where}: data.sequence_length = {config.data.sequence_length} is above "
                    f"model.encoders.{name}.max_text_positions = {encoder.max_text_positions}"
                )
        if config.parallel.context > 1:
            yield f"{where}: parallel.context must be 1, not {config.parallel.context}: rows are not cut here"
        if config.model.decoder.spans != "bidirectional":
            yield f"{where}: model.decoder.spans must be bidirectional"
        for group in ("sources", "evaluation"):
            for name, source in getattr(config.data, group).items():
                if source.readers or source.overflow is not None:
                    yield f"{where}: data.{group}.{name} must be text without readers of its own"

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with each of their documents as a span of the encoder."""
        arranged = []
        for row in rows:
            ends = np.array(row.document_ends, np.int64)
            bounds = np.stack([np.concatenate(([0], ends))[:-1], ends], axis=1)
            spans = RowSpans(bounds, np.zeros(len(ends), np.int64))
            arranged.append(replace(row, spans={self._encoder: spans}))
        return arranged

    def complete(self, batch: SemiCausalBatch, rows: Sequence[Row], tokenizer: Tokenizer) -> SemiCausalBatch:
        """The batch with some tokens of each row masked; special tokens never are.

        What is masked depends on the row alone, wherever and whenever it is trained on. The decoder sees the
        padding id at masked positions.
        """
        import torch

        pad_id, fraction = tokenizer.pad_id, self._settings.mask_fraction
        tokens = np.full(tuple(batch.tokens.shape), pad_id, np.int64)
        positions, draws = [], []
        for b, row in enumerate(rows):
            tokens[b, : len(row.tokens)] = row.tokens
            random = np.random.Generator(np.random.Philox(key=row.dropout_seed % 2**64))
            candidates = np.flatnonzero(~np.isin(row.tokens, tokenizer.special_ids))
            count = min(max(round(fraction * len(row.tokens)), 1), len(candidates))
            chosen = np.sort(random.choice(candidates, count, replace=False)) if count else candidates
            positions.append(b * batch.tokens.shape[1] + chosen)
            draws.append(random.random(count))
        masked = np.concatenate(positions)
        is_masked = np.zeros(tokens.shape, bool)
        is_masked.reshape(-1)[masked] = True
        return replace(
            batch,
            tokens=torch.from_numpy(np.where(is_masked, pad_id, tokens)),
            labels=torch.from_numpy(np.where(is_masked, tokens, pad_id)),
            loss_weights=torch.from_numpy(is_masked.astype(np.float32)),
            masked_positions=torch.from_numpy(masked),
            replacement_draws=torch.from_numpy(np.concatenate(draws)),
        )

    def losses(self, model: Model, batch: SemiCausalBatch, topology: Topology) -> Losses:
        import torch
        from torch.nn import functional

        losses, logits = model.decoder(
            replace(batch, encoders={}), {}, logits_at=batch.masked_positions, with_losses=True
        )
        masked = losses * batch.loss_weights
        original = torch.where(batch.loss_weights > 0, batch.labels, batch.tokens).flatten()
        chosen = take_by_probability(logits, batch.replacement_draws)
        replaced = original.index_copy(0, batch.masked_positions, chosen)
        ((name, spans),) = batch.encoders.items()
        seen = replace(batch, encoders={name: _with_tokens(spans, replaced)})
        vectors = encode(model, seen, topology)[name]
        scores = vectors.index_select(0, spans.dock_vectors).squeeze(1).float()
        is_replaced = (replaced != original).index_select(0, spans.dock_positions)
        detection = functional.binary_cross_entropy_with_logits(scores, is_replaced.float(), reduction="none")
        by_position = torch.zeros_like(masked).flatten().index_copy(0, spans.dock_positions, detection)
        # Masked positions are counted, not all: a mean over all tokens is its sum times the masked share.
        weight = self._settings.detection_weight * self._settings.mask_fraction
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

    def row_work(self, config: RunConfig, work: Work) -> Work:
        length = config.data.sequence_length
        whole = EncoderWork(length, length**2, 0.0)
        return Work(length, length**2, dict.fromkeys(work.encoders, whole))


def take_by_probability(logits: Tensor, draws: Tensor) -> Tensor:
    """A token for each row of logits [M, V]: where the cumulated probabilities pass its draw [M] in [0, 1).

    Returns:
        [M] int64.
    """
    import torch

    # Not in double precision, which takes gigabytes at 64k tokens.
    cumulated = logits.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
    wanted = (draws * cumulated[:, -1])[:, None].float()
    return torch.searchsorted(cumulated, wanted, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _with_tokens(spans: EncoderBatch, tokens: Tensor) -> EncoderBatch:
    """The same spans with the tokens [B * S] of their positions."""
    import torch

    shares = spans.shares
    ids = torch.cat([share.token_ids for share in shares])
    ids = ids.index_copy(0, spans.dock_vectors, tokens.index_select(0, spans.dock_positions))
    new = zip(shares, ids.chunk(len(shares)), strict=True)
    return replace(spans, shares=tuple(replace(share, token_ids=own) for share, own in new))


def _sum_and_count(values: Tensor, counted: Tensor) -> Tensor:
    import torch

    total = values.detach().sum(dtype=torch.float64)
    return torch.stack([total, torch.full_like(total, counted.numel())])
