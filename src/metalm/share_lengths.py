"""How long an encoder's share of a micro-batch is, padded: the collator pads to it, a plan counts it."""

from __future__ import annotations

_MULTIPLE = 16
_STEPS = 8
"""Lengths from one power of two to the next."""


def share_length(num_elements: int) -> int:
    """Elements of a share that holds so many, which may be none."""
    return padded_length(max(_MULTIPLE, num_elements), _STEPS, _MULTIPLE)


def padded_length(length: int, num_steps: int, multiple: int = 1) -> int:
    """The next of few lengths, for each of which CUDA graphs are recorded.

    Args:
        length: that is needed.
        num_steps: lengths from one power of two to the next, itself a power of two.
        multiple: a power of two that divides all lengths.
    """
    step = max(multiple, (1 << max(0, (length - 1).bit_length() - 1)) // num_steps, 1)
    return -(-length // step) * step
