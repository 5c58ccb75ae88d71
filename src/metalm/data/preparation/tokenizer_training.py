"""The texts that a tokenizer is trained on: an even sample of text files, and all captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from metalm.data.preparation.jsonl import check_files, documents
from metalm.data.preparation.pair_sources import read_list


def training_texts(inputs: Sequence[Path], caption_tables: Sequence[Path], max_bytes: int) -> Iterator[str]:
    """The first documents of each file, `max_bytes` of text in all; then the captions of the tables.

    Raises:
        DataError: a file cannot be read.
    """
    check_files([*inputs, *caption_tables])
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
