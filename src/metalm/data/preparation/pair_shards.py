"""Pairs to shards. The unit of work is some thousand files with captions, a tar, or row groups of parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.data.preparation.folder import CONTENTS, PreparationFolder, digest_of
from metalm.data.preparation.jsonl import check_files
from metalm.data.preparation.pair_sources import (
    COCO_SUFFIX,
    TABLE_SUFFIXES,
    Pair,
    PairRecord,
    list_records,
    read_record,
    read_tar,
)
from metalm.data.preparation.parquet_pairs import ParquetPairs, parquet_tasks
from metalm.data.preparation.parquet_rows import PARQUET_SUFFIX
from metalm.data.preparation.shard_writer import ShardWriter
from metalm.data.preparation.tally import Place, Tally
from metalm.data.preparation.task_pool import Advance, run_tasks
from metalm.data.storage.index import warn_of_compressed
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities import Convert, Media
from metalm.progress import Phase

PAIRS_PER_MESSAGE = 64


@dataclass(frozen=True)
class ListedPairs:
    """A task: some files."""

    unit: str
    source: str
    modality: Media
    records: tuple[PairRecord, ...]

    def pairs(self) -> Iterator[tuple[float, Pair | str, Place]]:
        """Each pair or its cause of absence, with the share of the task that is done, and its place."""
        for number, record in enumerate(self.records, start=1):
            place: Place = {"file": str(record.media)}
            if record.line is not None:
                place = {"file": self.source, "line": record.line, "path": str(record.media)}
            yield number / len(self.records), read_record(record, self.modality), place


@dataclass(frozen=True)
class TarredPairs:
    """A task: one tar of files and captions."""

    unit: str
    source: str
    modality: Media
    tar: Path

    def pairs(self) -> Iterator[tuple[float, Pair | str, Place]]:
        """Each pair or its cause of absence, with the share of the task that is done, and its place."""
        for share, pair in read_tar(self.tar, self.modality):
            yield share, pair, {"file": str(self.tar)}


PairTask = ListedPairs | TarredPairs | ParquetPairs


@dataclass(frozen=True)
class PairPreparation:
    """What every worker process needs to know."""

    folder: PreparationFolder
    shard_bytes: int
    convert: Convert
    unit_of_count: str

    def __call__(self, task: PairTask, advance: Advance) -> None:
        """Writes the shards and the receipt of one task."""
        tally = Tally()
        reported = 0.0
        with ShardWriter(self.folder.path, task.unit, self.shard_bytes) as writer:
            for number, (share, pair, place) in enumerate(task.pairs()):
                try:
                    writer.write(f"{task.unit}-{number:06d}", self._members(pair, task.source, tally))
                except BadSample as bad:
                    tally.drop(bad.cause, place)
                if number % PAIRS_PER_MESSAGE == 0:
                    advance(share - reported)
                    reported = share
        self.folder.record(task.unit, writer.shards, tally)
        advance(1.0 - reported)

    def _members(self, pair: Pair | str, source: str, tally: Tally) -> dict[str, bytes]:
        if isinstance(pair, str):
            raise BadSample(pair)
        captions = [text for caption in pair.captions if (text := _one_line(caption))]
        if not captions:
            raise BadSample("missing_caption")
        suffix, media = self.convert(pair.media)
        tally.keep(source, **{self.unit_of_count: 1}, captions=len(captions), bytes=len(media))
        if len(captions) == 1:
            return {suffix: media, "txt": captions[0].encode()}
        return {suffix: media, "json": json.dumps({"captions": captions}).encode()}


def prepare_pairs(
    inputs: Sequence[Path],
    out: Path,
    *,
    modality: Media,
    convert: Convert,
    settings: Mapping[str, Any],
    media_folder: Path | None = None,
    path_column: str = "path",
    caption_column: str | None = None,
    pairs_per_unit: int = 4096,
    shard_bytes: int = 512 << 20,
    first_number: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes shards of pairs, their index and a report.

    Args:
        inputs: see `pair_sources` and `parquet_pairs`.
        out: folder of the shards. If an earlier call was interrupted, the same call goes on.
        convert: checks a file, and makes its member of it.
        settings: those of `convert`; with others, an interrupted call does not go on.
        media_folder: what paths of COCO files and tables are relative to; default: their folder.
        path_column, caption_column: of tables and parquet; of captions None: `captions`, or `caption`.
        pairs_per_unit: most files per shard, except that tars and row groups of the input are kept together.
        shard_bytes: largest size of a shard.
        first_number: of the first input, in names of shards and keys of samples, as in `prepare_text`.
        processes: how many work at once; the output does not depend on it.

    Returns:
        The content of report.json: images or clips, captions and bytes, all that was dropped by cause, per
        input.

    Raises:
        ConfigError: options that contradict the folder.
        DataError: an input cannot be read, or nothing was kept.
    """
    if not inputs:
        raise ConfigError("no input was given")
    columns: dict[str, Any] = {"path_column": path_column, "caption_column": caption_column}
    tasks: list[PairTask] = []
    for number, source in enumerate(Phase.over("listing the inputs", inputs, "inputs"), start=first_number):
        tasks += _tasks(
            number, source, modality, pairs_per_unit, shard_bytes, media_folder=media_folder, **columns
        )
    folder = PreparationFolder(out)
    plan = {
        "kind": modality.kind,
        "inputs": [source.name for source in inputs],
        "listing": _digest(tasks),
        CONTENTS: _contents(tasks),
        **settings,
        f"{modality.unit}_per_unit": pairs_per_unit,
        "shard_bytes": shard_bytes,
        "first_number": first_number,
    }
    with folder.claim(plan):
        tasks = [task for task in tasks if not folder.is_done(task.unit)]
        if tasks:
            folder.drop_index()
            with Phase(f"preparing {out}", len(tasks), "batches") as phase:
                run_tasks(
                    tasks,
                    PairPreparation(folder, shard_bytes, convert, modality.unit),
                    processes=processes,
                    advance=phase.advance,
                    preload=__name__,
                )
        return folder.finish(kind=modality.kind, tokenizer_fingerprint=None, processes=processes)


def _tasks(
    number: int, source: Path, modality: Media, pairs_per_unit: int, shard_bytes: int, **listing: Any
) -> Iterator[PairTask]:
    if source.suffix == PARQUET_SUFFIX and not source.is_dir():
        yield from parquet_tasks(number, source, modality, run_bytes=shard_bytes, **listing)
        return
    if not source.is_dir() and source.suffix not in (COCO_SUFFIX, *TABLE_SUFFIXES):
        raise DataError(
            f"{source}: expected a folder, a COCO {COCO_SUFFIX}, or one of "
            f"{', '.join((*TABLE_SUFFIXES, PARQUET_SUFFIX))}"
        )
    if source.is_dir():
        warn_of_compressed(source)
    if source.is_dir() and (tars := sorted(source.glob("*.tar"))):
        check_files(tars)
        for position, tar in enumerate(tars):
            yield TarredPairs(f"{number:04d}-{position:05d}", source.name, modality, tar)
        return
    records = list_records(source, modality, **listing)
    for position, start in enumerate(range(0, len(records), pairs_per_unit)):
        chunk = tuple(records[start : start + pairs_per_unit])
        yield ListedPairs(f"{number:04d}-{position:05d}", source.name, modality, chunk)


def _digest(tasks: Sequence[PairTask]) -> str:
    """Tells one list of files and captions from another."""
    digest = hashlib.sha256()
    for task in tasks:
        if isinstance(task, TarredPairs):
            digest.update(f"{task.tar.name} {task.tar.stat().st_size}\n".encode())
        elif isinstance(task, ParquetPairs):
            beside = [] if task.media_folder == task.path.parent else [str(task.media_folder.absolute())]
            read = (task.path.name, task.path.stat().st_size, task.groups, *beside)
            digest.update(f"{read} {task.media_column} {task.caption_column}\n".encode())
        else:
            for record in task.records:
                digest.update(f"{record.media}\0{record.captions}\n".encode())
    return digest.hexdigest()


def _contents(tasks: Sequence[PairTask]) -> str:
    """A digest of all files that can be told before they are read.

    Single images, clips and captions can be millions: of them it is of sizes and times.
    """
    digest = hashlib.sha256()
    for task in Phase.over("looking at what the files hold", tasks, "batches"):
        if isinstance(task, TarredPairs):
            digest.update(digest_of(task.tar).encode())
        elif isinstance(task, ParquetPairs):
            digest.update(digest_of(task.path).encode())
        else:
            for path in _files(task.records):
                digest.update(_size_and_time(path).encode())
    return digest.hexdigest()


def _files(records: Iterable[PairRecord]) -> Iterator[Path]:
    for record in records:
        yield record.media
        if record.captions is None:
            yield from (record.media.with_suffix(suffix) for suffix in (".txt", ".json"))


def _size_and_time(path: Path) -> str:
    try:
        status = path.stat()
    except (OSError, ValueError):  # it is counted as missing when it is read
        return "none\n"
    return f"{status.st_size} {status.st_mtime_ns}\n"


def _one_line(caption: str) -> str:
    return " ".join(caption.split())
