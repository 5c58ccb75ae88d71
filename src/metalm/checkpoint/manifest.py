"""The manifest of a checkpoint folder, and the steps by which a folder becomes a checkpoint.

A folder is written as `step_N.partial`, gets a manifest (size and sha256 of every other file), is
renamed, and then `latest` is replaced: whoever sees `step_N` sees all of it. What the manifest does not
list is no part of the checkpoint. `latest` is for people: no program of ours asks it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from metalm.checkpoint.names import PARTIAL_SUFFIX
from metalm.checkpoint.state import first_mistake
from metalm.errors import CheckpointError
from metalm.progress import Phase
from metalm.regular_files import force, read_regular, replace_file

MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest"
REPLACED_SUFFIX = ".replaced" + PARTIAL_SUFFIX
"""Of a folder that a checkpoint of the same step has taken the place of."""


def _inside(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or name != "/".join(parts) or {"..", "."} & set(parts) or "/" in parts:
        raise ValueError(f"{name!r} is no file inside the checkpoint")
    return name


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    version: Literal[1]
    files: Annotated[dict[Annotated[str, AfterValidator(_inside)], FileRecord], Field(min_length=1)]


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file as it is on disk."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def write_manifest(folder: Path, files: dict[str, FileRecord]) -> None:
    """Write the manifest of a folder and force it and the folder to disk."""
    path = folder / MANIFEST_NAME
    path.write_text(
        json.dumps({"version": 1, "files": {name: asdict(record) for name, record in files.items()}})
    )
    force(path)
    force(folder)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The manifest of a published checkpoint.

    Raises:
        CheckpointError: there is none, it is malformed, lists nothing, or names a file outside the folder.
    """
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST_NAME}")
    try:
        return _Manifest.model_validate_json(read_regular_file(path)).files
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {first_mistake(error)}") from None


def read_regular_file(path: Path) -> bytes:
    """The content of a file of a checkpoint; never waits, as opening a named pipe does.

    Raises:
        CheckpointError: it is missing, unreadable or no regular file.
    """
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def check_files(folder: Path, files: Iterable[tuple[str, FileRecord]], *, hashed: bool = True) -> list[str]:
    """What is wrong with these files of a folder, one line each; nothing if they are as recorded.

    Args:
        folder: a checkpoint.
        files: names and records of its manifest.
        hashed: compare contents; else sizes alone.
    """
    problems, files = [], list(files)
    with Phase(f"hashing {folder}", sum(record.size for _, record in files), "MB", 1e6) as phase:
        for name, record in files:
            try:
                problem = _check_file(folder, name, record, hashed)
            except OSError as error:
                problem = f"{name} cannot be read: {error.strerror}"
            if problem:
                problems.append(problem)
            phase.advance(record.size)
    return problems


def _check_file(folder: Path, name: str, record: FileRecord, hashed: bool) -> str | None:
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return f"{name} lies outside the checkpoint"
    if not path.exists():
        return f"{name} is missing"
    if not path.is_file():
        return f"{name} is no regular file"
    if path.stat().st_size != record.size:
        return f"{name} has {path.stat().st_size} bytes, expected {record.size}"
    if hashed and record_file(path).sha256 != record.sha256:
        return f"{name} is damaged (its sha256 differs)"
    return None


def publish(partial: Path) -> Path:
    """Turn a complete `step_N.partial` into `step_N` and write its name into `latest`.

    A `step_N` that is there already, such as a damaged one that was passed over, gives way; pruning
    removes it.
    """
    folder = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    if os.path.lexists(folder):
        replaced = folder.with_name(folder.name + REPLACED_SUFFIX)
        remove(replaced)
        folder.replace(replaced)
    partial.replace(folder)
    force(folder.parent)
    replace_file(folder.parent / LATEST_NAME, folder.name + "\n", forced=True)
    return folder


def remove(path: Path) -> None:
    """Remove a folder, or a link to one: what a link points to stays. Nothing to remove is fine.

    Raises:
        OSError: something of it could not be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
