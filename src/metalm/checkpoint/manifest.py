"""The manifest of a checkpoint folder, and the steps by which a folder becomes a checkpoint.

A folder is written as `step_N.partial`, gets a manifest (size and sha256 of every other file), is
renamed, and then `latest` is replaced: whoever sees `step_N` sees all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from metalm.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest"
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    size: int
    sha256: str


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
    _sync(path)
    _sync(folder)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The manifest of a published checkpoint.

    Raises:
        CheckpointError: there is none, or it is malformed.
    """
    path = folder / MANIFEST_NAME
    try:
        files = json.loads(path.read_text())["files"]
        return {name: FileRecord(int(r["size"]), str(r["sha256"])) for name, r in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from None


def check_files(folder: Path, files: Iterable[tuple[str, FileRecord]]) -> list[str]:
    """What is wrong with these files of a folder, one line each; nothing if they are as recorded."""
    problems = []
    for name, record in files:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name} lies outside the checkpoint")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record.size:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {record.size}")
        elif record_file(path).sha256 != record.sha256:
            problems.append(f"{name} is damaged (its sha256 differs)")
    return problems


def publish(partial: Path) -> Path:
    """Turn a complete `step_N.partial` into `step_N` and point `latest` at it."""
    folder = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    partial.replace(folder)
    _sync(folder.parent)
    latest = folder.parent / (LATEST_NAME + PARTIAL_SUFFIX)
    latest.write_text(folder.name + "\n")
    _sync(latest)
    latest.replace(folder.parent / LATEST_NAME)
    _sync(folder.parent)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
