"""Where a run comes from: the code and the versions that it was started with."""

from __future__ import annotations

import functools
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from metalm import __version__
from metalm.commit import git_commit

_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "webdataset", "numpy")


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions and commit, as a resolved config records them."""
    return {
        "commit": git_commit(),
        "python": sys.version.split()[0],
        "versions": {"metalm": __version__, **{package: _version(package) for package in _PACKAGES}},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the library runs from a plain folder, too, by PYTHONPATH
        return "not installed"
