"""The texts that a tokenizer is trained on: an even sample of text files, and all captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from metalm.data.preparation.jsonl import documents
from metalm.data.preparation.pair_sources import read_list
from metalm.errors import DataError


def training_texts(inputs: Sequence[Path], caption_tables: Sequence[Path], max_bytes: int) -> Iterator[str]:
    """The first documents of each file, `max_bytes` of text in all; then the captions of the tables.

    Raises:
        DataError: a file cannot be read.
    """
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise DataError(f"no such input file: {', '.join(missing)}")
    for path in inputs:
        size = 0
        for document in documents([path]):
            if size >= max_bytes / len(inputs):
                break
            size += document.num_bytes
            yield document.text
    for table in caption_tables:
        for record in read_list(table, table.parent, "path", "caption"):
            yield from record.captions or ()
