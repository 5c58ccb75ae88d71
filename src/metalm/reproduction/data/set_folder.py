"""The folder of one data set: it appears whole or not at all, and says what it holds and where that is from.

OUTPUT/NAME/tasks/TASK.yaml, TASK/{train,validation,test}.jsonl
OUTPUT/NAME/text/*.jsonl      documents in the Pile's form, of training sides alone
OUTPUT/NAME/pairs/            pictures, and {train,validation,test}.jsonl with paths and captions
OUTPUT/NAME/images.zip        pictures of tasks
OUTPUT/NAME/encoder/          a pretrained encoder
OUTPUT/NAME/SOURCE.json       packages, licences, counts
OUTPUT/NAME/SHA256SUMS        of all other files, as `sha256sum --check` takes it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metalm.errors import BusyError, DataError, FaultError
from metalm.file_lock import try_lock
from metalm.reproduction.data.getting import sha256_of
from metalm.reproduction.data.packages import Package

SOURCE_NAME, SUMS_NAME = "SOURCE.json", "SHA256SUMS"
FORM = 2
"""Counted up when what is written changes."""
_TASK_FILES = Path(__file__).parent / "task_files"
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)

Record = Mapping[str, Any]


class SetFolder:
    """Writes the files of one data set, and keeps their hashes and counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, int] = {}
        """By file, its records."""
        self.labels: dict[str, dict[str, int]] = {}
        """By file of a task with options, how often each answer occurs."""
        self._sums: dict[str, str] = {}

    def write(self, name: str, content: bytes) -> None:
        """A file as it is."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        self._sums[name] = hashlib.sha256(content).hexdigest()

    def write_lines(self, name: str, records: Iterable[Record]) -> None:
        """A file of JSON objects."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        self.write(name, "".join(lines).encode())
        self.counts[name] = len(lines)

    def write_task(self, task: str, sides: Mapping[str, Sequence[Record]], label: str | None = None) -> None:
        """The records of a task, and its task file.

        Args:
            label: the field whose values are counted in SOURCE.json.
        """
        self.write(f"tasks/{task}.yaml", (_TASK_FILES / f"{task}.yaml").read_bytes())
        for split, records in sides.items():
            name = f"tasks/{task}/{split}.jsonl"
            self.write_lines(name, records)
            if label is not None:
                values = [str(record[label]) for record in records]
                self.labels[name] = {value: values.count(value) for value in sorted(set(values))}

    def write_text(self, name: str, texts: Iterable[str]) -> None:
        """Documents in the Pile's form."""
        meta = {"pile_set_name": name}
        self.write_lines(f"text/{name}.jsonl", ({"text": text, "meta": meta} for text in texts))

    def write_zip(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        """Pictures, which are compressed already, in one file."""
        count = 0
        with zipfile.ZipFile(self.path / name, "w", zipfile.ZIP_STORED) as packed:
            for member, content in files:
                packed.writestr(zipfile.ZipInfo(member, _ZIP_DATE), content)
                count += 1
        self._sums[name] = sha256_of(self.path / name)
        self.counts[name] = count

    def finish(self, source: Mapping[str, Any]) -> None:
        """Writes what the folder holds and where it is from."""
        content = {**source, "counts": self.counts, "labels": self.labels}
        self.write(SOURCE_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._sums.items()))
        self.write(SUMS_NAME, lines.encode())


@contextmanager
def new_set(output: Path, name: str, packages: Sequence[Package]) -> Iterator[SetFolder]:
    """A folder to write a data set into, which becomes OUTPUT/NAME at the end of the block.

    Raises:
        BusyError: another program is writing the same one.
        FaultError: it cannot be written, such as when the disk is full.
    """
    partial = output / f".{name}.partial"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _claimed(output):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                folder = SetFolder(partial)
                yield folder
                folder.finish(_source(name, packages))
                partial.rename(output / name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise FaultError(
            f"{output / name} cannot be written: {error.strerror or error}; make room, or name another "
            "folder by --output"
        ) from error


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Keeps other programs out: of what is fetched, too."""
    descriptor = os.open(output, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if try_lock(descriptor) is False:
            raise BusyError(f"another program is writing into {output}: wait for it")
        yield
    finally:
        os.close(descriptor)


def check_set(folder: Path, name: str, packages: Sequence[Package]) -> dict[str, Any]:
    """What a data set that is there holds, by its SOURCE.json, after a look at every file.

    Raises:
        DataError: it is not whole, or of another version.
    """
    again = f"delete {folder} and fetch {name} again"
    try:
        source = json.loads((folder / SOURCE_NAME).read_bytes())
        sums = (folder / SUMS_NAME).read_text(encoding="utf-8").splitlines()
        for digest, _, file in (line.partition("  ") for line in sums):
            if sha256_of(folder / file) != digest:
                raise DataError(f"{folder / file} has been changed: {again}")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not whole ({error}): {again}") from None
    expected = _source(name, packages)
    if any(source.get(key) != value for key, value in expected.items()):
        raise DataError(f"{folder} was written by another version of this program: {again}")
    return source


def _source(name: str, packages: Sequence[Package]) -> dict[str, Any]:
    listed = [
        {
            "package": package.name,
            "manager": package.manager,
            "version": package.version,
            "released": package.released,
            "file": package.file,
            "bytes": package.num_bytes,
            "sha256": package.sha256,
            "licence": package.licence,
        }
        for package in packages
    ]
    return {"name": name, "form": FORM, "packages": listed}
