"""Rules about adapters: which maps of which component they can stand beside."""

from __future__ import annotations

from collections.abc import Iterator

from metalm.config.model_schema import ModelConfig
from metalm.config.training_schema import SCALED_BY_IA3, TARGETS, AdapterConfig


def adapter_problems(model: ModelConfig) -> Iterator[str]:
    """What is wrong with the adapters of a model."""
    if model.decoder.adapter is not None:
        yield from _own_problems("model.decoder.adapter", model.decoder.adapter)
    for name, encoder in model.encoders.items():
        where, adapter = f"model.encoders.{name}.adapter", encoder.adapter
        if adapter is None:
            continue
        if encoder.pretrained is None:
            yield from _own_problems(where, adapter)
        elif adapter.kind != "lora":
            yield f"{where}.kind = {adapter.kind}: an encoder of transformers can have a lora adapter alone"
        elif not adapter.targets:
            yield f"{where}.targets is needed: ends of the linear modules' names, such as [query, value]"


def _own_problems(where: str, adapter: AdapterConfig) -> Iterator[str]:
    known = TARGETS if adapter.kind == "lora" else SCALED_BY_IA3
    for target in adapter.targets:
        if target not in known:
            yield f"{where}.targets: {target!r} is none of {', '.join(known)}, which {adapter.kind} can adapt"
