"""What must hold before ranks are joined or anything is written.

It is checked before torch, DeepSpeed and Megatron are imported: a start that is refused is refused at once.
"""

from __future__ import annotations

from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints
from metalm.config import RunConfig
from metalm.config.rules import check_topology
from metalm.data.corpus import Corpus
from metalm.objectives import build_objective


def check_start(config: RunConfig, world_size: int) -> Corpus:
    """Check that the ranks can hold the run, and open all of its data once; find what a new run starts from.

    Raises:
        TopologyError: so many ranks cannot hold the run.
        ConfigError: objective, sources, encoders and tokenizer do not fit each other.
        DataError: a source or the tokenizer cannot be used.
        CheckpointError: there are no weights where a new run is to take its own from.
    """
    check_topology(config, world_size)
    build_objective(config)
    corpus = Corpus(config)
    corpus.check()
    if not list_checkpoints(config.run.folder / config.run.name / CHECKPOINTS_NAME):
        for path in (config.initialize.decoder, config.initialize.encoders):
            if path is not None:
                find_checkpoint(path)
    return corpus
