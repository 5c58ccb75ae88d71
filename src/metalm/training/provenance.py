"""Where a run comes from: the code and the versions that it was started with."""

from __future__ import annotations

import functools
import sys
from importlib.metadata import version
from typing import Any

from metalm.commit import git_commit

_PACKAGES = ("metalm", "torch", "deepspeed", "megatron-core", "transformers", "webdataset", "numpy")


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions and commit, as a resolved config records them."""
    return {
        "commit": git_commit(),
        "python": sys.version.split()[0],
        "versions": {package: version(package) for package in _PACKAGES},
    }
