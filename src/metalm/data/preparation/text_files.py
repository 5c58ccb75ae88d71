"""Files of text in the forms that corpora come in, cut into stretches that are prepared apart.

    .jsonl .ndjson .json    an object per line; also .gz, .zst, .bz2
    .parquet                a column of texts
    .bin with .idx          Megatron's token datasets, back to text by the tokenizer that made them

A stretch is what begins in [k * n, (k + 1) * n): of the lines' bytes, of the texts of row groups, of the ids.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from metalm.data.preparation.jsonl import (
    COMPRESSED_SUFFIXES,
    JsonLinesFile,
    check_files,
    is_compressed,
    parse_document,
)
from metalm.data.preparation.megatron_text import TokensText
from metalm.data.preparation.megatron_tokens import TOKENS_SUFFIX, open_token_dataset
from metalm.data.preparation.parquet_rows import PARQUET_SUFFIX
from metalm.data.preparation.parquet_text import ParquetText
from metalm.data.preparation.text_document import Document, TextFields, TextRecord
from metalm.data.tokenizer import parse_tokenizer
from metalm.errors import ConfigError, DataError
from metalm.regular_files import read_regular

LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")


class TextFile(Protocol):
    """A file that texts are read from. Only its name and settings, for it travels to processes."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int:
        """Bytes, as stored."""
        ...

    @property
    def is_stream(self) -> bool:
        """Whether it is read from its beginning alone, all stretches by each who reads it."""
        ...

    def num_stretches(self, stretch_bytes: int) -> int:
        """Of a file that is no stream."""
        ...

    def stretches(self, stretch_bytes: int, number: int) -> Iterator[tuple[int, Iterator[TextRecord]]]:
        """All stretches of a stream, or the one of that number, each with its number and records.

        Raises:
            DataError: the file cannot be read, or is damaged.
        """
        ...


@dataclass(frozen=True)
class LinesText:
    """Objects of a file of lines."""

    path: Path
    size: int
    fields: TextFields

    @property
    def is_stream(self) -> bool:
        return is_compressed(self.path)

    def num_stretches(self, stretch_bytes: int) -> int:
        return math.ceil(self.size / stretch_bytes)

    def stretches(self, stretch_bytes: int, number: int) -> Iterator[tuple[int, Iterator[TextRecord]]]:
        start, end = number * stretch_bytes, (number + 1) * stretch_bytes
        bounds = (0, None) if self.is_stream else (start, end)
        amount = self.size if self.is_stream else min(end, self.size) - start
        with JsonLinesFile(self.path) as file:
            lines = file.lines(start=bounds[0], end=bounds[1])
            for stretch, group in itertools.groupby(lines, key=lambda item: item[0] // stretch_bytes):
                records = (
                    TextRecord(
                        offset,
                        {"line": line_number},
                        parse_document(line, self.fields),
                        min(1.0, (file.position - bounds[0]) / amount),
                    )
                    for line_number, (offset, line) in enumerate(group, start=1)
                )
                yield stretch, records


def open_text_files(
    inputs: Sequence[Path], fields: TextFields, from_tokenizer: Path | None = None
) -> list[TextFile]:
    """The files, in their order.

    Args:
        from_tokenizer: folder or tokenizer.json, of the ids in token datasets.

    Raises:
        ConfigError: there is none, or a token dataset without its tokenizer, or a tokenizer without one.
        DataError: one cannot be read, or is of an unknown form.
    """
    if not inputs:
        raise ConfigError("no input file was given")
    check_files(inputs)
    tokenized = [path for path in inputs if path.suffix == TOKENS_SUFFIX]
    if tokenized and from_tokenizer is None:
        raise ConfigError(f"{tokenized[0]} holds token ids: name their tokenizer with --from-tokenizer")
    if from_tokenizer is not None and not tokenized:
        raise ConfigError(f"--from-tokenizer is of token ids, but no input is a {TOKENS_SUFFIX}")
    definition = b"" if from_tokenizer is None else _definition(from_tokenizer)
    return [_open_text_file(path, fields, definition) for path in inputs]


def _open_text_file(path: Path, fields: TextFields, definition: bytes) -> TextFile:
    size = path.stat().st_size
    form = path.with_suffix("").suffix if is_compressed(path) else path.suffix
    if form in LINES_SUFFIXES:
        return LinesText(path, size, fields)
    if path.suffix == PARQUET_SUFFIX:
        return ParquetText(path, size, fields)
    if path.suffix == TOKENS_SUFFIX:
        return TokensText(open_token_dataset(path), definition)
    raise DataError(
        f"{path}: its form is unknown; expected lines of JSON ({', '.join(LINES_SUFFIXES)}, also "
        f"{', '.join(COMPRESSED_SUFFIXES)}), {PARQUET_SUFFIX}, or the {TOKENS_SUFFIX} of a "
        "token dataset of Megatron; the name says which"
    )


def _definition(path: Path) -> bytes:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        definition = read_regular(file)
        parse_tokenizer(definition)
    except OSError as error:
        raise DataError(f"no tokenizer at {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    return definition


def paths_of(files: Iterable[TextFile]) -> Iterator[Path]:
    """All that is read, the indices of token datasets, too."""
    for file in files:
        yield file.path
        if isinstance(file, TokensText):
            yield file.dataset.index_path


def tokenizer_digest(files: Iterable[TextFile]) -> str | None:
    """Tells one tokenizer of token datasets from another; None: there is no such dataset."""
    found = {file.tokenizer for file in files if isinstance(file, TokensText)}
    return hashlib.sha256(found.pop()).hexdigest() if found else None


def documents(files: Iterable[TextFile]) -> Iterator[Document]:
    """All documents of some files, one after the other; records without one are passed over."""
    for file in files:
        stretch_bytes = max(1, file.size)
        for number in range(1 if file.is_stream else file.num_stretches(stretch_bytes)):
            for _, records in file.stretches(stretch_bytes, number):
                for record in records:
                    if isinstance(record.document, Document):
                        yield record.document
