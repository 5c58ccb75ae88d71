"""What the configs' activations are, in the kernels' terms."""

from __future__ import annotations

from metalm.kernels import ActivationKind

ACTIVATIONS: dict[str, tuple[ActivationKind, bool]] = {
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "swiglu": ("silu", True),
    "geglu_tanh": ("gelu_tanh", True),
}
"""By name: the function, and whether it acts on a gate beside the value."""
