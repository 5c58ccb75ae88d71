"""Packages that only some metrics need: imported when such a metric is computed."""

from __future__ import annotations

import importlib
from typing import Any

from metalm.errors import ConfigError


def optional(module: str) -> Any:
    """The module `module` of a package of the extra `tasks`.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this metric needs the package {error.name}, which is not installed: pip install 'metalm[tasks]'"
        ) from None
