"""Plain single-process training of the reference model: AdamW, one clipping norm, one loss per step."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from metalm.config import RunConfig
from reference.model import Weights, loss_sum
from reference.rows import PlainRow


def _as_they_are(weights: Weights) -> Weights:
    return weights


def gradients(
    rows: list[PlainRow],
    weights: Weights,
    config: RunConfig,
    merged: Callable[[Weights], Weights] = _as_they_are,
) -> tuple[float, Weights]:
    """Mean loss over the trained tokens of all rows, and its gradient by every weight."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    whole = merged(leaves)
    sums, counts = zip(*(loss_sum(row, whole, config.model) for row in rows), strict=True)
    loss = torch.stack(sums).sum() / sum(counts)
    loss.backward()
    found = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in leaves.items()}
    return loss.item(), found


def train(
    batches: list[list[PlainRow]],
    weights: Weights,
    config: RunConfig,
    rates: list[float],
    frozen: Collection[str] = (),
    *,
    merged: Callable[[Weights], Weights] = _as_they_are,
    factors: Callable[[str], float] = lambda name: 1.0,
) -> tuple[list[float], Weights]:
    """Losses before each update, and the weights after the last; frozen ones do not move.

    Args:
        merged: what the model computes with, of weights with those of adapters.
        factors: what the learning rate is multiplied by, by name.
    """
    optimizer_config = config.training.optimizer
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": optimizer_config.weight_decay if p.dim() > 1 else 0.0,
                "factor": factors(name),
            }
            for name, p in parameters.items()
            if name not in frozen
        ],
        betas=optimizer_config.betas,
        eps=optimizer_config.eps,
    )
    losses = []
    for rows, rate in zip(batches, rates, strict=True):
        loss, found = gradients(rows, {n: p.data for n, p in parameters.items()}, config, merged)
        losses.append(loss)
        for name, parameter in parameters.items():
            parameter.grad = None if name in frozen else found[name]
        torch.nn.utils.clip_grad_norm_(parameters.values(), optimizer_config.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
    return losses, {name: parameter.data for name, parameter in parameters.items()}
