"""From packed rows to a micro-batch, as the objective of the run has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from metalm.batch import SemiCausalBatch
from metalm.data.collate import collate
from metalm.data.corpus import Corpus
from metalm.data.row import Row
from metalm.data.tokenizer import Tokenizer


class RowObjective(Protocol):
    """What an objective does to rows on their way to a batch."""

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the spans that the objective has the encoders see."""
        ...

    def complete(self, batch: SemiCausalBatch, rows: Sequence[Row], tokenizer: Tokenizer) -> SemiCausalBatch:
        """The batch of arranged rows with what else the objective needs of them."""
        ...


def make_micro_batch(
    rows: Sequence[Row], corpus: Corpus, objective: RowObjective, tp_size: int, cp_size: int = 1
) -> SemiCausalBatch:
    """A micro-batch of arranged rows: see `collate`."""
    config = corpus.config
    batch = collate(
        rows,
        model_config=config.model,
        sequence_length=config.data.sequence_length,
        tp_size=tp_size,
        pad_id=corpus.tokenizer.pad_id,
        cp_size=cp_size,
    )
    return objective.complete(batch, rows, corpus.tokenizer)
