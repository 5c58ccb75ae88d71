"""The semi-causal objective: spans are encoded, the rest is generated (PAPER section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from metalm.config import RunConfig
from metalm.data.row import Row
from metalm.data.tokenizer import Tokenizer
from metalm.model.flops import Work
from metalm.objectives.objective import Losses, Model, encode

if TYPE_CHECKING:
    from metalm.batch import SemiCausalBatch
    from metalm.parallel.topology import Topology


class SemiCausal:
    """Next-token prediction wherever a row's loss weights say so."""

    name = "semi_causal"
    generates = True
    loss_unit = "nats per token"

    def problems(self, config: RunConfig) -> Iterator[str]:
        for name, encoder in config.model.encoders.items():
            if encoder.connector == "detection":
                yield f"model.encoders.{name}.connector: detection is for a run with training.replaced_tokens"

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def complete(self, batch: SemiCausalBatch, rows: Sequence[Row], tokenizer: Tokenizer) -> SemiCausalBatch:
        return batch

    def losses(self, model: Model, batch: SemiCausalBatch, topology: Topology) -> Losses:
        return Losses(model.decoder(batch, encode(model, batch, topology)) * batch.loss_weights)

    def row_work(self, config: RunConfig, work: Work) -> Work:
        return work
