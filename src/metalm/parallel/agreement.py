"""What the ranks decide together between steps: to go on, to stop, or to fail with one message."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from metalm.errors import MetaLMError

if TYPE_CHECKING:  # it imports Megatron, which a start that is refused need not wait for
    from metalm.parallel.topology import Topology


class Verdict(enum.IntEnum):
    """In the order of urgency: the highest that any rank asks for holds for all."""

    GO_ON = 0
    STOP = 1
    FAIL = 2
    """To end with an error; what was trained up to here is sound."""
    LOST = 3
    """To end with an error, and leave the run's folder alone: it is another's."""


def agree(own: Verdict, news: bool, topology: Topology) -> tuple[Verdict, bool]:
    """The most urgent verdict of all ranks, and whether any rank has an event that concerns all.

    Asked for before every step, and in host memory, so that the device is not waited for. A ring over all
    ranks takes as many messages one after the other as there are ranks, twice; the tensor-parallel ranks and
    then the data-parallel ones take as many as the two sizes' sum.

    Collective: all ranks, over gloo.
    """
    asked = torch.tensor([int(own), int(news)])
    for group in (topology.tensor_host_group, topology.replica_host_group):
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group)
    verdict, has_news = asked.numpy()
    return Verdict(verdict), bool(has_news)


def raise_together(error: MetaLMError | None) -> None:
    """Raise on every rank what any rank met, so that none waits for one that is gone.

    Raises:
        MetaLMError: of the first rank that has one.

    Collective: all ranks.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, None if error is None else (type(error), str(error)))
    for found in gathered:
        if found is not None:
            kind, message = found
            raise kind(message) from error


@contextmanager
def together() -> Iterator[None]:
    """A block without collectives whose MetaLMError, met by any rank, is raised by every rank.

    Raises:
        MetaLMError: of the first rank that has one.

    Collective: all ranks, at the end of the block.
    """
    error = None
    try:
        yield
    except MetaLMError as found:
        error = found
    raise_together(error)
