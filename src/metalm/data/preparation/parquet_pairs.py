"""Pairs of parquet files, as mirrors of image and audio data sets have them: a row has the file, or its path.

A file stands in a column as bytes, or as `bytes` and `path` of a structure; a caption, or a list of several,
in another. A task is a run of row groups of about a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metalm.data.captions import listed, usable_captions
from metalm.data.preparation.pair_sources import CAPTION_COLUMNS, Pair, PairRecord, read_record
from metalm.data.preparation.parquet_rows import ParquetFile, RowGroup, runs_of_groups
from metalm.data.preparation.tally import Place
from metalm.data.storage.shard_scan import MAX_MEMBER_BYTES
from metalm.errors import DataError
from metalm.modalities import Media


@dataclass(frozen=True)
class ParquetPairs:
    """A task: some row groups of a file."""

    unit: str
    source: str
    modality: Media
    path: Path
    media_column: str
    caption_column: str
    media_folder: Path
    """That paths are relative to."""
    groups: tuple[RowGroup, ...]

    def pairs(self) -> Iterator[tuple[float, Pair | str, Place]]:
        """Each pair or its cause of absence, with the share of the task that is done, and its place.

        Raises:
            DataError: the file is damaged.
        """
        num_rows, num_read = sum(group.num_rows for group in self.groups), 0
        with ParquetFile(self.path) as file:
            for group in self.groups:
                rows = file.rows(group, [self.media_column, self.caption_column])
                for number, row in enumerate(rows):
                    num_read += 1
                    place: Place = {"file": self.source, "row_group": group.number, "row": number}
                    yield num_read / num_rows, self._pair(row), place

    def _pair(self, row: dict[str, Any] | None) -> Pair | str:
        if row is None:
            return "invalid_unicode"
        captions = tuple(usable_captions(listed(row[self.caption_column])))
        name, media = self.modality.name, row[self.media_column]
        if isinstance(media, dict):
            media = media.get("bytes") or media.get("path")
        if isinstance(media, str):
            return read_record(PairRecord(self.media_folder / media, captions), self.modality)
        if not media:
            return f"missing_{name}"
        if not isinstance(media, bytes):
            return f"unreadable_{name}"
        return Pair(media, captions) if len(media) <= MAX_MEMBER_BYTES else f"oversize_{name}"


def parquet_tasks(
    number: int,
    source: Path,
    modality: Media,
    *,
    run_bytes: int,
    path_column: str,
    caption_column: str | None,
    media_folder: Path | None,
) -> Iterator[ParquetPairs]:
    """The tasks of a parquet file.

    Args:
        number: of the file, in names of shards.
        source: the file.
        modality: of its images or clips.
        run_bytes: of a task, before compression.
        path_column: has them, or their paths; where there is none of that name, the modality's own is taken.
        caption_column: has the captions; None: `captions`, or `caption`.
        media_folder: what paths are relative to; None: the folder of the file.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: it cannot be read, or lacks a column.
    """
    with ParquetFile(source) as file:
        names, found = file.names, []
        captions = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        for wanted in ((path_column, modality.name), captions):
            if not (there := [name for name in wanted if name in names]):
                raise DataError(
                    f"{source}: there is no column {' or '.join(dict.fromkeys(wanted))}; it has "
                    f"{', '.join(names)}. Name the columns with --path-column and --caption-column."
                )
            found.append(there[0])
        groups = file.groups()
        leaves = [leaf for leaf in file.columns if leaf == found[0] or leaf.startswith(f"{found[0]}.")]
        sizes = np.sum([file.column_bytes(leaf) for leaf in leaves], axis=0)
        for position, run in enumerate(runs_of_groups(sizes, run_bytes)):
            yield ParquetPairs(
                f"{number:04d}-{position:05d}",
                source.name,
                modality,
                source,
                found[0],
                found[1],
                media_folder or source.parent,
                tuple(groups[run]),
            )
