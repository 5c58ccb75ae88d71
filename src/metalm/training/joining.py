"""The ranks of a job come together, and what the first rank of each node has read reaches the others.

Config, tokenizer, shards and held-out sources are read and checked once a node, before anything that is slow
to load is imported; a job of many ranks asks a shared file system no more than one of few. What one node's
first rank refuses, all ranks refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from metalm.data.corpus import Corpus
from metalm.errors import MetaLMError
from metalm.parallel.agreement import raise_together
from metalm.parallel.launch import Launch, open_process_group

_JOINING_MINUTES = 30
"""Of ranks that do not know the config yet; those that do end earlier, and a launcher then ends all."""


@dataclass(frozen=True)
class Joined:
    """A rank in the job's process group."""

    launch: Launch
    device: torch.device
    corpus: Corpus


def join(launch: Launch, own: Corpus | MetaLMError | None) -> Joined:
    """Open the process group, and share what has been read.

    Args:
        launch: this rank's.
        own: what the first rank of a node has read, or why it refuses; None on the other ranks.

    Raises:
        MetaLMError: of the first rank that refuses.

    Collective: every rank of the job.
    """
    minutes = own.config.parallel.timeout_minutes if isinstance(own, Corpus) else _JOINING_MINUTES
    device = open_process_group(launch, minutes)
    try:
        raise_together(own if isinstance(own, MetaLMError) else None)
    except MetaLMError:
        dist.destroy_process_group()  # a process that ends with an open one is aborted by gloo's threads
        raise
    corpus = _share(own if isinstance(own, Corpus) else None)
    # The others have learnt only now how long they are to wait for each other.
    timeout = timedelta(minutes=corpus.config.parallel.timeout_minutes)
    dist.distributed_c10d._set_pg_timeout(timeout, dist.distributed_c10d._get_default_group())
    return Joined(launch, device, corpus)


def _share(own: Corpus | None) -> Corpus:
    """Collective: every rank of the job."""
    shared: list[Any] = [None if own is None else (own.config, own.tokenizer.definition)]
    dist.broadcast_object_list(shared, device=torch.device("cpu"))
    if own is not None:
        return own
    config, definition = shared[0]
    return Corpus(config, check_sizes=False, tokenizer_definition=definition)
