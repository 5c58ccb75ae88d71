"""The semi-causal objective with a share of the loss of a uniform guess, as label smoothing has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from metalm.config import RunConfig
from metalm.config.schema import SmoothedConfig
from metalm.objectives.objective import Losses, Model
from metalm.objectives.semi_causal import SemiCausal

if TYPE_CHECKING:
    from metalm.batch import SemiCausalBatch
    from metalm.parallel.topology import Topology


class Smoothed(SemiCausal):
    name = "smoothed"

    def __init__(self, config: RunConfig, settings: SmoothedConfig) -> None:
        self._share, self._uniform = settings.share, math.log(config.model.vocab_size)

    def losses(self, model: Model, batch: SemiCausalBatch, topology: Topology) -> Losses:
        own = super().losses(model, batch, topology).weighted
        return Losses((1 - self._share) * own + self._share * self._uniform * batch.loss_weights)
