"""Held-out losses: the same rows of each source on every topology."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from metalm.data.corpus import Corpus
from metalm.data.held_out import PackedRows, evaluation_batches, pack_held_out
from metalm.data.sources import Source
from metalm.evaluation.generation import EvaluatedModel, evaluating
from metalm.objectives import Objective
from metalm.parallel.agreement import together
from metalm.parallel.topology import Topology
from metalm.progress import Phase

AVERAGE_SUFFIX = "/average"
"""Ends the names of losses of the moving average of the weights, where they are measured, too."""


def held_out_losses(
    model: EvaluatedModel,
    topology: Topology,
    corpus: Corpus,
    objective: Objective,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The loss per trained token of each held-out source; of pairs also with the images or clips exchanged.

    Keys: `SOURCE` and, for pairs, `SOURCE/wrong_image` or `SOURCE/wrong_audio`; with an objective whose loss
    has parts, also `SOURCE/PART`.

    Args:
        beat: is called after every batch.

    Collective: all ranks.
    """
    losses: dict[str, float] = {}
    for name, source in corpus.held_out.items():
        if name not in corpus.packed:
            corpus.packed[name] = _packed(corpus, source)
        with Phase(f"measuring the loss on {name}"):
            losses |= _measure(model, topology, corpus, objective, source, name, beat, wrong_media=False)
        if source.media is not None:
            key = f"{name}/wrong_{source.media.name}"
            with Phase(f"measuring the loss on {key}"):
                losses |= _measure(model, topology, corpus, objective, source, key, beat, wrong_media=True)
    return losses


def _packed(corpus: Corpus, source: Source) -> PackedRows | None:
    """The samples of the source's rows, as the first rank finds them; all others read their own rows alone.

    Collective: all ranks.
    """
    found: list[PackedRows | None] = [None]
    with Phase(f"finding the held-out rows of {source.name}"), together():
        if dist.get_rank() == 0:
            found = [pack_held_out(corpus, source, corpus.config.monitor.evaluation_rows)]
    dist.broadcast_object_list(found)
    return found[0]


def _measure(
    model: EvaluatedModel,
    topology: Topology,
    corpus: Corpus,
    objective: Objective,
    source: Source,
    key: str,
    beat: Callable[[], None],
    *,
    wrong_media: bool,
) -> dict[str, float]:
    """Means over a held-out source: the loss as `key`, and its parts as `key/PART`."""
    totals = {key: torch.zeros(2, dtype=torch.float64, device=topology.device)}
    with evaluating(model):
        for batch in evaluation_batches(
            corpus,
            source,
            objective,
            num_rows=corpus.config.monitor.evaluation_rows,
            packed=corpus.packed[source.name],
            dp_rank=topology.data_rank,
            dp_size=topology.data_size,
            tp_size=topology.tensor_size,
            cp_size=topology.context_size,
            wrong_media=wrong_media,
        ):
            batch = batch.to(topology.device)
            losses = objective.losses(model, batch, topology)
            # Each context rank has the losses of its own positions, and the weights of all.
            weights = batch.loss_weights.double().sum() / topology.context_size
            totals[key] += torch.stack([losses.weighted.double().sum(), weights])
            for part, measured in losses.parts.items():
                totals[f"{key}/{part}"] = totals.get(f"{key}/{part}", 0.0) + measured
            beat()
    for total in totals.values():
        dist.all_reduce(total, group=topology.replica_group)
    return {name: float(total[0] / total[1].clamp(min=1)) for name, total in totals.items()}
