"""Metrics of answered examples by name, each with its standard error and count."""

from __future__ import annotations

from collections.abc import Sequence

from metalm.errors import ConfigError
from metalm.tasks.metrics.bleu import BLEU
from metalm.tasks.metrics.boxes import BOXES
from metalm.tasks.metrics.captions import CAPTIONS
from metalm.tasks.metrics.drop import DROP
from metalm.tasks.metrics.exact import EXACT
from metalm.tasks.metrics.jars import JARS
from metalm.tasks.metrics.labels import LABELS
from metalm.tasks.metrics.metric import Answered, Metric, Score, bootstrap
from metalm.tasks.metrics.rouge import ROUGE
from metalm.tasks.metrics.squad import SQUAD
from metalm.tasks.metrics.vqa import VQA

__all__ = ["METRICS", "Answered", "Metric", "Score", "find_metric", "measure"]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (*EXACT, *SQUAD, *DROP, *VQA, *ROUGE, *BLEU, *CAPTIONS, *JARS, *LABELS, *BOXES)
}


def find_metric(name: str) -> Metric:
    """The metric that task files call `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in METRICS:
        raise ConfigError(f"there is no metric {name!r}; the metrics are {', '.join(sorted(METRICS))}")
    return METRICS[name]


def measure(name: str, answered: Sequence[Answered], *, resamples: int = 1000, seed: int = 0) -> Score:
    """The metric `name` of the examples, with its standard error by `resamples` draws with replacement.

    Raises:
        ConfigError: there is no such metric, or what it needs (a package, a jar) is not there.
        DataError: there are no examples, one has no reference, or the references do not suit the metric.
    """
    return bootstrap(find_metric(name), answered, resamples=resamples, seed=seed)
