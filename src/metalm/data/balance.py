"""Encoder work evened out: over the TP ranks of a micro-batch, and over the micro-batches of a step.

All ranks meet in every micro-batch, which lasts as long as on the rank with most work. A rank cannot give
rows away (its lanes own them), but it can give all its micro-batches about the same work; what is left is
the difference between the ranks' whole steps. The loss is a sum over rows, so it does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from metalm.config.model_schema import EncoderConfig
from metalm.data.row import Row
from metalm.modalities import modality_of_encoder


def span_costs(lengths: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """Relative cost [K] of encoding spans of so many elements: projections and feed-forward, attention."""
    lengths = modality_of_encoder(config).cost_lengths(lengths, config)
    hidden = config.hidden_size
    linear = 4 * hidden * hidden + 2 * hidden * config.feed_forward_size
    return config.num_layers * (lengths * linear + 2 * hidden * lengths * lengths)


def assign_spans(costs: np.ndarray, num_shares: int) -> np.ndarray:
    """The share [K] of each span: longest first, each to the share with the least cost so far."""
    shares = np.zeros(len(costs), np.int64)
    if num_shares == 1:
        return shares
    loads = [0.0] * num_shares
    for span in np.argsort(-costs, kind="stable").tolist():
        least = min(range(num_shares), key=loads.__getitem__)
        loads[least] += float(costs[span])
        shares[span] = least
    return shares


def row_costs(rows: Sequence[Row], encoders: Mapping[str, EncoderConfig]) -> np.ndarray:
    """Relative cost [rows, encoders] of encoding the spans of each row."""
    costs = np.zeros((len(rows), len(encoders)))
    for number, row in enumerate(rows):
        for column, (name, config) in enumerate(encoders.items()):
            if name in row.spans:
                bounds = row.spans[name].bounds
                costs[number, column] = span_costs(bounds[:, 1] - bounds[:, 0], config).sum()
    return costs


def group_rows(costs: np.ndarray, group_size: int) -> list[list[int]]:
    """Rows in groups of one size and about one cost, in each encoder.

    The costliest rows come first, each to the group with room that has the least of the row's kind of work.

    Args:
        costs: [rows, encoders]; the rows divide by `group_size`.

    Returns:
        The rows of each group, in their order.
    """
    groups: list[list[int]] = [[] for _ in range(len(costs) // group_size)]
    loads, sizes = np.zeros((len(groups), costs.shape[1])), np.zeros(len(groups), np.int64)
    for row in np.argsort(-costs.sum(axis=1), kind="stable").tolist():
        work = np.where(sizes < group_size, loads @ costs[row], np.inf)
        least = np.flatnonzero(work == work.min())
        group = int(least[sizes[least].argmin()])
        groups[group].append(row)
        loads[group] += costs[row]
        sizes[group] += 1
    return [sorted(group) for group in groups]


def imbalance_over_ranks(costs: np.ndarray) -> np.ndarray:
    """How much longer each encoder takes than if all ranks had equal work: [encoders], 0 is even.

    Args:
        costs: [ranks, micro-batches, encoders].
    """
    even = costs.mean(axis=0).sum(axis=0)
    return costs.max(axis=0).sum(axis=0) / np.where(even > 0, even, 1.0) - (even > 0)
