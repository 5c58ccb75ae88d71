"""The data sets by name, and how one is fetched."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from metalm.errors import ConfigError
from metalm.progress import Phase
from metalm.reproduction.data import (
    bigbench,
    easy_vqa,
    fashion_mnist,
    minilm,
    openmoji,
    tuxpaint,
    vader,
    wordnet,
)
from metalm.reproduction.data.getting import get_package
from metalm.reproduction.data.set_folder import check_set, new_set

SETS: dict[str, ModuleType] = {
    "vader": vader,
    "minilm": minilm,
    "easy-vqa": easy_vqa,
    "bigbench": bigbench,
    "wordnet": wordnet,
    "openmoji": openmoji,
    "fashion-mnist": fashion_mnist,
    "tuxpaint": tuxpaint,
}
"""By name, the module with its `PACKAGES` and `write`."""


def fetch_set(name: str, output: Path, given: Path | None = None) -> dict[str, Any]:
    """Write OUTPUT/NAME, or check it if it is there.

    Args:
        given: a folder where package files are already; nothing is fetched then.

    Returns:
        The content of its SOURCE.json.

    Raises:
        ConfigError: there is no such data set.
        DataError: a package or the data set is not what it must be.
        FaultError: a package cannot be fetched, or the folder not be written.
    """
    if name not in SETS:
        raise ConfigError(f"there is no data set {name}; there are {', '.join(SETS)}")
    module = SETS[name]
    if not (output / name).exists():
        with new_set(output, name, module.PACKAGES) as folder:
            files = {package.name: get_package(package, output, given) for package in module.PACKAGES}
            print(f"writing {output / name}", flush=True)
            with Phase(f"writing {output / name}"):
                module.write(files, folder)
    else:
        print(f"{output / name} is there: checking it", flush=True)
    with Phase(f"checking {output / name}"):
        return check_set(output / name, name, module.PACKAGES)
