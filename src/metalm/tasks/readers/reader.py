"""What readers yield."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from metalm.errors import ConfigError, DataError
from metalm.tasks.data_files import DataFiles

Record = dict[str, Any]
"""Of what JSON can hold."""


class BadRecord(NamedTuple):
    """A record that cannot be used: it is left out and counted."""

    cause: str
    place: str
    """File, and line or key there."""


@dataclass(frozen=True)
class MediaFile:
    """An image or a clip, not read yet."""

    files: DataFiles
    name: str

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            DataError: it is not there.
        """
        return self.files.read(self.name)


Reader = Callable[..., Iterator[Record | BadRecord]]
"""Of (files, names, split, **settings)."""


def load_json(files: DataFiles, name: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it is not there, or no JSON.
    """
    try:
        return json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{files.folder / name} is not JSON: {error}") from None


def expected(files: DataFiles, name: str, form: str) -> DataError:
    """A file is not of its reader's form."""
    return DataError(f"{files.folder / name} is not of the form that its reader takes: {form}")


def in_pairs(names: Sequence[str], what: str) -> Iterator[tuple[str, str]]:
    """Names by twos.

    Raises:
        ConfigError: their number is odd.
    """
    if len(names) % 2:
        raise ConfigError(f"data.files: give {what}, in turn; there are {len(names)} file(s)")
    return zip(names[::2], names[1::2], strict=True)
