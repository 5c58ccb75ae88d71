"""The tiny model of the multi-rank tests with parts of it frozen."""

from __future__ import annotations

from typing import Any

from distributed.tiny import tiny_config
from metalm.config import RunConfig


def changed_config(folder: str, shape: dict[str, Any], pair: str = "1,1") -> RunConfig:
    """The tiny run on a layout: `tensor`, `micro_batch_size`, perhaps `sequence_parallel`, `options`,
    the decoder's own `deepspeed` file, and `changes` of the config by dotted key."""
    decoder, encoders = pair.split(",")
    content = tiny_config(
        folder,
        tensor=shape["tensor"],
        micro_batch_size=shape["micro_batch_size"],
        sequence_parallel=shape.get("sequence_parallel", False),
        options=shape.get("options", "paper"),
        decoder=shape.get("deepspeed", f"deepspeed_configs/decoder_zero{decoder}.json"),
        encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
    ).model_dump(mode="json", exclude_unset=True)
    for key, value in shape.get("changes", {}).items():
        *sections, last = key.split(".")
        section = content
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return RunConfig.model_validate(content)
