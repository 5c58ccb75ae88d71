"""Megatron imported without torch's compiler, whose own import would cost a second of each rank's start."""

from __future__ import annotations

import os
import warnings

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


def import_megatron() -> None:
    """Import what a run takes of it. Its notes on what is not installed stay off the terminal.

    Megatron has functions compiled as it defines them, none of which a run calls: they stay as they are. What
    is compiled afterwards is compiled.
    """
    if is_unset := _NO_COMPILER not in os.environ:
        os.environ[_NO_COMPILER] = "1"
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
    import megatron.core.models.gpt.gpt_model  # noqa: F401

    if is_unset:
        del os.environ[_NO_COMPILER]
