"""Files of text in forms of their own."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

from metalm.errors import ConfigError, DataError
from metalm.tasks.data_files import DataFiles
from metalm.tasks.readers.reader import BadRecord, Record, expected, load_json


def read_lines(
    files: DataFiles, names: Sequence[str], split: str, *, pattern: str, encoding: str = "utf-8"
) -> Iterator[Record | BadRecord]:
    """A record in each line.

    Args:
        pattern: a regular expression of a line, whose named groups are the fields.
    """
    form = _compiled(pattern)
    for name in names:
        for number, line in enumerate(_text(files, name, encoding).split("\n"), start=1):
            match = form.fullmatch(line)
            if match:
                yield match.groupdict()
            elif line.strip():
                yield BadRecord("unlike_the_pattern", f"{name}:{number}")


def read_blocks(
    files: DataFiles, names: Sequence[str], split: str, *, fields: Sequence[str], encoding: str = "utf-8"
) -> Iterator[Record | BadRecord]:
    """Records of one line per field, with blank lines between them."""
    for name in names:
        for number, block in enumerate(re.split(r"\n\s*\n", _text(files, name, encoding).strip())):
            lines = [line.strip() for line in block.splitlines()]
            if len(lines) == len(fields):
                yield dict(zip(fields, lines, strict=True))
            else:
                yield BadRecord("wrong_number_of_lines", f"{name}, block {number + 1}")


def read_folder(
    files: DataFiles, names: Sequence[str], split: str, *, pattern: str, encoding: str = "utf-8"
) -> Iterator[Record | BadRecord]:
    """A text in each file, as `text`.

    Args:
        pattern: a regular expression that is looked for in the path, whose named groups are fields.
    """
    form = _compiled(pattern)
    for name in names:
        match = form.search(name)
        if match is None:
            yield BadRecord("unlike_the_pattern", name)
        else:
            yield {**match.groupdict(), "text": _text(files, name, encoding)}


def read_sections(
    files: DataFiles,
    names: Sequence[str],
    split: str,
    *,
    mark: str,
    ids_file: str | None = None,
    encoding: str = "utf-8",
) -> Iterator[Record | BadRecord]:
    """A record in each file, in sections under lines that name them; what stands before them is `body`.

    Args:
        mark: a regular expression of such a line, whose group is the name; fields are in lower case.
        ids_file: JSON with the names of each split's files, without their suffixes.
    """
    form = _compiled(mark)
    wanted = None
    if ids_file is not None:
        content = load_json(files, ids_file)
        if not isinstance(content, dict) or not isinstance(content.get(split), list):
            raise expected(files, ids_file, f"a list of ids at {split}")
        wanted = set(map(str, content[split]))
    found = set()
    for name in names:
        stem = PurePosixPath(name).stem
        if wanted is not None and stem not in wanted:
            continue
        found.add(stem)
        sections: dict[str, list[str]] = {"body": []}
        current = sections["body"]
        for line in _text(files, name, encoding).splitlines():
            if match := form.fullmatch(line.strip()):
                current = sections.setdefault(match.group(1).lower(), [])
            else:
                current.append(line)
        yield {"id": stem, **{key: "\n".join(lines).strip() for key, lines in sections.items()}}
    for stem in sorted((wanted or set()) - found):
        yield BadRecord("no_file", f"{ids_file}, {stem}")


def read_xml(
    files: DataFiles, names: Sequence[str], split: str, *, at: str, first: int | None = None
) -> Iterator[Record | BadRecord]:
    """The elements of one name in an XML file: children as fields, several of one name as a list.

    Args:
        first: only so many.
    """
    for name in names:
        try:
            root = ElementTree.parse(io.BytesIO(files.read(name))).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"{files.folder / name} is not XML: {error}") from None
        for element in root.findall(f".//{at}")[:first]:
            content = _content(element)
            if isinstance(content, dict):
                yield content
            else:
                yield BadRecord("no_fields", f"{name}, {at}")


def _content(element: ElementTree.Element) -> Any:
    if not len(element):
        return " ".join((element.text or "").split())
    fields: dict[str, Any] = {}
    for child in element:
        value = _content(child)
        if child.tag not in fields:
            fields[child.tag] = value
        elif isinstance(fields[child.tag], list):
            fields[child.tag].append(value)
        else:
            fields[child.tag] = [fields[child.tag], value]
    return fields


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None


def _text(files: DataFiles, name: str, encoding: str) -> str:
    try:
        return files.read(name).decode(encoding).replace("\r\n", "\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{files.folder / name} is not {encoding}: {error}") from None
