"""A folder as transformers saves models, from anywhere: refused before a loader of theirs follows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from metalm.config.plain_files import read_json_object
from metalm.errors import CheckpointError, ConfigError

WEIGHT_INDEX_NAME = "model.safetensors.index.json"

_IMPLEMENTATION = re.compile("_?[a-z]+_implementation(_internal)?")
_PLAIN_WORD = re.compile("[a-z0-9_]+")


def read_foreign_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder whose files may be given to a loader.

    Raises:
        ConfigError: there is none or it is damaged, it names a repository as its attention, or something in
            the folder is no file.
        CheckpointError: as `read_weight_map`.
    """
    path = folder / "config.json"
    config = read_json_object(path, "the model's config")
    _refuse_code_by_name(config, path)
    for entry in folder.iterdir():
        if not entry.is_dir() and not entry.is_file():
            raise ConfigError(f"{entry} is no regular file: take it out")
    if (index := folder / WEIGHT_INDEX_NAME).exists():
        read_weight_map(index)
    return config


def read_weight_map(path: Path) -> dict[str, str]:
    """The files of a folder's tensors by name, from the index beside them.

    Raises:
        ConfigError: it is damaged.
        CheckpointError: it is no such index, or names a file that is not beside it.
    """
    files = read_json_object(path, "the index of weights").get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} is not an index of weights, which has a weight_map of names and files")
    for file in files.values():
        if Path(file).name != file or file in ("", "..") or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} points outside its folder, to {file[:80]!r}: expected safetensors files beside it"
            )
    return files


def _refuse_code_by_name(content: Any, path: Path) -> None:
    """Refuse a config whose attention is a repository: transformers would fetch code from there."""
    if isinstance(content, list):
        for part in content:
            _refuse_code_by_name(part, path)
    for key, value in content.items() if isinstance(content, dict) else ():
        if _IMPLEMENTATION.fullmatch(key):
            words = value.values() if isinstance(value, dict) else [value]
            if wrong := [w for w in words if w is not None and not _PLAIN_WORD.fullmatch(str(w))]:
                raise ConfigError(
                    f"{path}: {key} is {str(wrong[0])[:80]!r}, which would fetch code from there: expected a "
                    "word such as 'sdpa' or 'eager'; take the key out"
                )
        else:
            _refuse_code_by_name(value, path)
