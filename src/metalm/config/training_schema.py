"""What of a component is trained: its last layers, or an adapter beside frozen weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from metalm.config.section import PositiveFloat, PositiveInt, Section

TARGETS = ("query_key_value", "attention_output", "feed_forward_in", "feed_forward_out")
"""Linear maps of a layer, by the names that adapters know them by."""
SCALED_BY_IA3 = ("query_key_value", "feed_forward_out")
"""IA3 scales keys and values, and what the second map of a feed-forward reads."""


class AdapterConfig(Section):
    """Few weights that are trained beside frozen ones: LoRA (arXiv 2106.09685) or IA3 (arXiv 2205.05638)."""

    kind: Literal["lora", "ia3"] = "lora"
    """`lora` adds a product of two factors to a map; `ia3` multiplies by a vector."""
    rank: PositiveInt | None = None
    """Of LoRA's factors; default: 8."""
    alpha: PositiveFloat | None = None
    """LoRA's product is multiplied by this over the rank; default: twice the rank."""
    targets: tuple[str, ...] = ()
    """Which maps of each layer: `query_key_value`, `attention_output`, `feed_forward_in`, `feed_forward_out`;
    of an encoder from transformers, the ends of its modules' names, such as `query`. Default: all of our own
    that the kind can adapt."""

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> AdapterConfig:
        if self.kind == "ia3" and (self.rank is not None or self.alpha is not None):
            raise ValueError("rank and alpha are lora's; ia3 has neither")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("a target is given twice")
        return self

    @property
    def factor_rank(self) -> int:
        """Rank of LoRA's factors."""
        return self.rank or 8

    @property
    def scale(self) -> float:
        """What LoRA's product is multiplied by."""
        return (self.alpha or 2 * self.factor_rank) / self.factor_rank

    @property
    def own_targets(self) -> tuple[str, ...]:
        """Of a decoder or an encoder of ours."""
        return self.targets or (TARGETS if self.kind == "lora" else SCALED_BY_IA3)


class TrainableSection(Section):
    """A stack of layers of which all, the last ones or none are trained, or an adapter instead."""

    num_layers: PositiveInt
    trained_layers: PositiveInt | Literal["all", "none"] = "all"
    """A number n trains the last n layers and what stands behind them: a final norm, the decoder's output
    layer where it is not the token embedding. Embeddings and lower layers stay as they were loaded.
    With an adapter `none`, which is then the default."""
    adapter: AdapterConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _freeze_beside_adapter(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("adapter") is not None:
            return {"trained_layers": "none"} | content
        return content

    @model_validator(mode="after")
    def _is_frozen_beside_adapter(self) -> TrainableSection:
        if self.adapter is not None and self.trained_layers != "none":
            raise ValueError(
                f"trained_layers = {self.trained_layers} with an adapter, beside which all layers are "
                "frozen: leave one of them out"
            )
        return self

    @property
    def is_trained(self) -> bool:
        """Whether anything of it is trained."""
        return self.trained_layers != "none" or self.adapter is not None

    @property
    def num_frozen_layers(self) -> int:
        """Leading layers that are not trained."""
        if isinstance(self.trained_layers, int):
            return self.num_layers - self.trained_layers
        return 0 if self.trained_layers == "all" else self.num_layers
