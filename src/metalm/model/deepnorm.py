"""DeepNorm's two constants for one stack of layers (Wang et al., 2022; PAPER section 4)."""

from __future__ import annotations


def deepnorm_alpha(num_layers: int) -> float:
    """Weight of the residual branch: LN(alpha * x + f(x))."""
    return (2 * num_layers) ** 0.25


def deepnorm_divisor(num_layers: int) -> float:
    """What the Xavier-initialised value, output and feed-forward weights are divided by."""
    return (8 * num_layers) ** 0.25
