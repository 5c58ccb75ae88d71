"""Held-out losses of a run: of its weights and, if asked, of their moving average."""

from __future__ import annotations

from collections.abc import Callable

from metalm.data.corpus import Corpus
from metalm.evaluation.losses import AVERAGE_SUFFIX, held_out_losses
from metalm.objectives import Objective
from metalm.parallel.topology import Topology
from metalm.training.average import averaged
from metalm.training.engines import Engines


def measure_held_out(
    engines: Engines,
    topology: Topology,
    corpus: Corpus,
    objective: Objective,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Held-out losses, see `held_out_losses`; with `training.average.evaluate` also as `NAME/average`.

    Args:
        beat: is called while it goes on.

    Collective: all ranks.
    """
    losses = held_out_losses(engines, topology, corpus, objective, beat)
    average = corpus.config.training.average
    if average is not None and average.evaluate:
        with averaged(engines):
            of_average = held_out_losses(engines, topology, corpus, objective, beat)
        losses |= {name + AVERAGE_SUFFIX: loss for name, loss in of_average.items()}
    return losses
