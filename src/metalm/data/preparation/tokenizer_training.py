"""The texts that a tokenizer is trained on: an even sample of text files, and all captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from metalm.data.preparation.jsonl import check_files
from metalm.data.preparation.pair_sources import read_list
from metalm.data.preparation.text_document import PILE_FIELDS, TextFields
from metalm.data.preparation.text_files import documents, open_text_files


def training_texts(
    inputs: Sequence[Path],
    caption_tables: Sequence[Path],
    max_bytes: int,
    *,
    fields: TextFields = PILE_FIELDS,
    from_tokenizer: Path | None = None,
) -> Iterator[str]:
    """The first documents of each file, `max_bytes` of text in all; then the captions of the tables.

    Args:
        fields, from_tokenizer: see `open_text_files`.

    Raises:
        ConfigError: as `open_text_files`.
        DataError: a file cannot be read.
    """
    check_files(caption_tables)
    for file in open_text_files(inputs, fields, from_tokenizer):
        size = 0
        for document in documents([file]):
            if size >= max_bytes / len(inputs):
                break
            size += document.num_bytes
            yield document.text
    for table in caption_tables:
        for record in read_list(table, table.parent, "path", None):
            yield from record.captions or ()
