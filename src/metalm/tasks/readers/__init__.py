"""How files become records: one function for each form in which owners distribute their data.

A reader takes the files, the names of those of one split, the split's name, and its settings as keyword
arguments, and yields records, and `BadRecord` for what cannot be used.
"""

from __future__ import annotations

import codecs
import inspect
import typing
from collections.abc import Iterator

from pydantic import TypeAdapter, ValidationError

from metalm.errors import ConfigError
from metalm.tasks.data_files import DataFiles
from metalm.tasks.readers.captions import read_karpathy, read_nocaps
from metalm.tasks.readers.questions import read_drop, read_squad, read_vqa
from metalm.tasks.readers.reader import BadRecord, MediaFile, Reader, Record
from metalm.tasks.readers.tables import read_csv, read_json, read_jsonl, read_parquet, read_tsv
from metalm.tasks.readers.texts import read_blocks, read_folder, read_lines, read_sections, read_xml
from metalm.tasks.readers.wordings import read_mrpc, read_piqa, read_winograd, read_winogrande, read_wsc
from metalm.tasks.task_file import DataSection

READERS: dict[str, Reader] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "lines": read_lines,
    "blocks": read_blocks,
    "folder": read_folder,
    "sections": read_sections,
    "xml": read_xml,
    "squad": read_squad,
    "drop": read_drop,
    "mrpc": read_mrpc,
    "piqa": read_piqa,
    "winograd": read_winograd,
    "winogrande": read_winogrande,
    "wsc": read_wsc,
    "karpathy": read_karpathy,
    "nocaps": read_nocaps,
    "vqa": read_vqa,
}
"""By the name in task files."""

__all__ = ["READERS", "BadRecord", "MediaFile", "Record", "check_reader", "read_records"]


def check_reader(data: DataSection) -> None:
    """
    Raises:
        ConfigError: there is no such reader, or its settings are not as it takes them.
    """
    if data.reader not in READERS:
        raise ConfigError(f"data.reader: there is no {data.reader!r}; there are {', '.join(READERS)}")
    parameters = list(inspect.signature(READERS[data.reader]).parameters.values())[3:]
    known = [parameter.name for parameter in parameters]
    if unknown := data.settings.keys() - set(known):
        raise ConfigError(
            f"data.settings: the reader {data.reader} has no {', '.join(sorted(unknown))}; "
            f"it has {', '.join(known) or 'none'}"
        )
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if missing := set(needed) - data.settings.keys():
        raise ConfigError(f"data.settings: the reader {data.reader} needs {', '.join(sorted(missing))}")
    hints = typing.get_type_hints(READERS[data.reader])
    for name, value in data.settings.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
            if name == "encoding":
                codecs.lookup(value)
        except (ValidationError, LookupError, ValueError) as error:
            expected = "the name of an encoding" if name == "encoding" else str(hints[name])
            raise ConfigError(f"data.settings.{name}: got {value!r}, expected {expected}") from error


def read_records(data: DataSection, files: DataFiles, split: str) -> Iterator[Record | BadRecord]:
    """The records of one of the splits that have files of their own.

    Raises:
        ConfigError: as `check_reader`.
        DataError: a file is not there, or not of the reader's form.
    """
    check_reader(data)
    names = list(files.all_names(data.files_of(split)))
    return READERS[data.reader](files, names, split, **data.settings)
