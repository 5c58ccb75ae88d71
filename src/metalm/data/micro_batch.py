"""From packed rows to a micro-batch, by the objective of the run."""

from __future__ import annotations

from collections.abc import Sequence

from metalm.batch import SemiCausalBatch
from metalm.config.schema import RunConfig
from metalm.data.collate import collate
from metalm.data.replaced_tokens import documents_as_spans, mask_tokens
from metalm.data.rows import Row
from metalm.data.tokenizer import Tokenizer


def with_spans(rows: Sequence[Row], config: RunConfig) -> list[Row]:
    """The rows with the spans that the run's objective has the encoders see."""
    if config.training.replaced_tokens is None:
        return list(rows)
    (encoder,) = config.model.encoders
    return documents_as_spans(rows, encoder)


def make_micro_batch(
    rows: Sequence[Row], config: RunConfig, tokenizer: Tokenizer, tp_size: int
) -> SemiCausalBatch:
    """A micro-batch of rows from `with_spans`; see `collate`."""
    batch = collate(
        rows,
        model_config=config.model,
        sequence_length=config.data.sequence_length,
        tp_size=tp_size,
        pad_id=tokenizer.pad_id,
    )
    settings = config.training.replaced_tokens
    if settings is None:
        return batch
    return mask_tokens(batch, rows, settings.mask_fraction, tokenizer.special_ids, tokenizer.pad_id)
