"""What must hold before ranks are joined or anything is written.

It is checked before torch, DeepSpeed and Megatron are imported: a start that is refused is refused at once.
"""

from __future__ import annotations

from metalm.config import RunConfig
from metalm.config.rules import check_topology
from metalm.data.media import clip_reader
from metalm.data.sources import open_sources
from metalm.data.tokenizer import load_tokenizer
from metalm.errors import ConfigError


def check_start(config: RunConfig, world_size: int) -> None:
    """Check that the ranks can hold the run, and open every source and the tokenizer once.

    Raises:
        TopologyError: so many ranks cannot hold the run.
        DataError: a source or the tokenizer cannot be used, or they do not belong together.
        ConfigError: the tokenizer has more ids than the model, or an encoder of audio lacks what it needs.
    """
    check_topology(config, world_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} "
            f"has {tokenizer.size} ids"
        )
    open_sources(config.data.sources, tokenizer)
    open_sources(config.data.evaluation, tokenizer)
    for encoder in config.model.encoders.values():
        if encoder.audio is not None:
            clip_reader(encoder)
