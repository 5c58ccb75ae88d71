"""The interface of objectives: rows, what a batch holds for them, losses, and whether they generate.

A plan and a refused start ask objectives, too, so torch is imported where tensors are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from metalm.config import RunConfig
from metalm.data.row import Row
from metalm.data.tokenizer import Tokenizer
from metalm.model.flops import Work

if TYPE_CHECKING:
    from torch import Tensor

    from metalm.batch import SemiCausalBatch
    from metalm.parallel.topology import Topology


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch."""

    weighted: Tensor
    """[B, S] float32, 0 where another context rank has the position. Their sum over the global batch, over
    the sum of its loss weights, is the loss."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """What the loss is made of, to be looked at: by name, a sum and a count, [2] float64."""


class Model(Protocol):
    """Decoder and encoders as modules, or as the engines that run them."""

    @property
    def decoder(self) -> Any:
        """See `model.decoder.Decoder`."""
        ...

    @property
    def encoders(self) -> Any | None:
        """See `model.encoder.EncoderBank`; None: a decoder alone."""
        ...


class Objective(Protocol):
    """What is learnt from rows. `arrange` and `complete` run in the data path, without a device."""

    name: str
    """Of its figures."""
    generates: bool
    """Whether the model learns to continue a prompt."""
    loss_unit: str
    """Of the loss, for people."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What in a config does not suit the objective."""
        ...

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the spans that the objective has the encoders see."""
        ...

    def complete(self, batch: SemiCausalBatch, rows: Sequence[Row], tokenizer: Tokenizer) -> SemiCausalBatch:
        """The batch of arranged rows with what else the objective needs of them."""
        ...

    def losses(self, model: Model, batch: SemiCausalBatch, topology: Topology) -> Losses:
        """Of a micro-batch on the device.

        Collective: all ranks (ZeRO), and those with the same rows.
        """
        ...

    def row_work(self, config: RunConfig, work: Work) -> Work:
        """What a row needs of which `work` is what the semi-causal objective needs."""
        ...


def encode(model: Model, batch: SemiCausalBatch, topology: Topology) -> dict[str, Tensor]:
    """All span vectors of a micro-batch, by encoder: [R * L, D] each.

    Collective: all ranks (ZeRO), and those with the same rows.
    """
    from metalm.parallel.regions import gather_encoded

    if model.encoders is None:
        return {}
    shares = {name: spans.shares[topology.rows_rank] for name, spans in batch.encoders.items()}
    return {name: gather_encoded(mine, topology) for name, mine in model.encoders(shares).items()}
