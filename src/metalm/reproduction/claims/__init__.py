"""The claims that can be tried, by letter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from metalm.reproduction.arms import Setting
from metalm.reproduction.claim import Claim
from metalm.reproduction.claims.added_encoder import added_encoder
from metalm.reproduction.claims.captions import captions
from metalm.reproduction.claims.frozen_decoder import frozen_decoder
from metalm.reproduction.claims.in_context import in_context
from metalm.reproduction.claims.instruction_tuning import instruction_tuning
from metalm.reproduction.claims.multitask import multitask
from metalm.reproduction.claims.pair_comparison import pair_comparison
from metalm.reproduction.claims.questions_about_images import questions_about_images
from metalm.reproduction.claims.questions_about_photographs import questions_about_photographs

CLAIMS: Mapping[str, Callable[[Setting], Claim]] = {
    "a": pair_comparison,
    "b": frozen_decoder,
    "c": instruction_tuning,
    "d": in_context,
    "e": captions,
    "f": questions_about_images,
    "g": added_encoder,
    "h": questions_about_photographs,
    "i": multitask,
}

USUAL = ("a", "b", "c", "d", "e", "f", "g")
"""Those that are tried unless others are named: what h and i ask, f and a ask in less time."""
