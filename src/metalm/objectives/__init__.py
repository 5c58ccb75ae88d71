"""What a run learns. An objective is one file with one class of the interface in `objective`."""

from __future__ import annotations

from metalm.config import RunConfig
from metalm.errors import ConfigError
from metalm.objectives.objective import Losses, Model, Objective, encode
from metalm.objectives.replaced_tokens import ReplacedTokens
from metalm.objectives.semi_causal import SemiCausal

__all__ = ["Losses", "Model", "Objective", "build_objective", "encode"]


def build_objective(config: RunConfig) -> Objective:
    """The objective of a run: that whose section `training` has, else the semi-causal one.

    Raises:
        ConfigError: the config does not suit it.
    """
    settings = config.training.replaced_tokens
    objective = SemiCausal() if settings is None else ReplacedTokens(config, settings)
    if problems := list(objective.problems(config)):
        lines = [f"  {problem}" for problem in problems]
        raise ConfigError("\n".join([f"the configuration does not suit {objective.name}", *lines]))
    return objective
