"""Images and captions to shards. The unit of work is some thousand images, or one tar of the input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.data.failures import BadSample
from metalm.data.preparation.folder import PreparationFolder
from metalm.data.preparation.image_sources import (
    TABLE_SUFFIXES,
    ImageRecord,
    Pair,
    list_records,
    read_record,
    read_tar,
)
from metalm.data.preparation.images import prepare_image
from metalm.data.preparation.progress import ProgressLine
from metalm.data.preparation.report import Tally
from metalm.data.preparation.shards import ShardWriter
from metalm.data.preparation.workers import Advance, run_tasks
from metalm.errors import ConfigError, DataError

IMAGES_PER_MESSAGE = 64


@dataclass(frozen=True)
class ListedImages:
    """A task: some image files."""

    unit: str
    source: str
    records: tuple[ImageRecord, ...]

    def pairs(self) -> Iterator[tuple[float, Pair | str]]:
        """Each pair or its cause of absence, with the share of the task that is done."""
        for number, record in enumerate(self.records, start=1):
            yield number / len(self.records), read_record(record)


@dataclass(frozen=True)
class TarredImages:
    """A task: one tar of images and captions."""

    unit: str
    source: str
    tar: Path

    def pairs(self) -> Iterator[tuple[float, Pair | str]]:
        """Each pair or its cause of absence, with the share of the task that is done."""
        return read_tar(self.tar)


ImageTask = ListedImages | TarredImages


@dataclass(frozen=True)
class ImagePreparation:
    """What every worker process needs to know."""

    folder: PreparationFolder
    shard_bytes: int
    shorter_side: int | None

    def __call__(self, task: ImageTask, advance: Advance) -> None:
        """Writes the shards and the receipt of one task."""
        tally = Tally()
        told = 0.0
        with ShardWriter(self.folder.path, task.unit, self.shard_bytes) as writer:
            for number, (share, pair) in enumerate(task.pairs()):
                try:
                    writer.write(f"{task.unit}-{number:06d}", self._members(pair, task.source, tally))
                except BadSample as bad:
                    tally.drop(bad.cause)
                if number % IMAGES_PER_MESSAGE == 0:
                    advance(share - told)
                    told = share
        self.folder.record(task.unit, writer.shards, tally)
        advance(1.0 - told)

    def _members(self, pair: Pair | str, source: str, tally: Tally) -> dict[str, bytes]:
        if isinstance(pair, str):
            raise BadSample(pair)
        captions = [text for caption in pair.captions if (text := _one_line(caption))]
        if not captions:
            raise BadSample("missing_caption")
        suffix, image = prepare_image(pair.image, self.shorter_side)
        tally.keep(source, images=1, captions=len(captions), bytes=len(image))
        if len(captions) == 1:
            return {suffix: image, "txt": captions[0].encode()}
        return {suffix: image, "json": json.dumps({"captions": captions}).encode()}


def prepare_image_text(
    inputs: Sequence[Path],
    out: Path,
    *,
    image_folder: Path | None = None,
    path_column: str = "path",
    caption_column: str = "caption",
    shorter_side: int | None = None,
    images_per_unit: int = 4096,
    shard_bytes: int = 512 << 20,
    first_number: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes image-text shards, their index and a report.

    Args:
        inputs: see `image_sources`.
        out: folder of the shards. If an earlier call was interrupted, the same call goes on.
        image_folder: what image paths of COCO files and tables are relative to; default: their folder.
        path_column, caption_column: of tables.
        shorter_side: shrink larger images to this many pixels on their shorter side.
        images_per_unit: most images per shard, except that a tar of the input is kept together.
        shard_bytes: largest size of a shard.
        first_number: of the first input, in names of shards and keys of samples, as in `prepare_text`.
        processes: how many work at once; the output does not depend on it.

    Returns:
        The content of report.json: images, captions and bytes, all that was dropped by cause, per input.

    Raises:
        ConfigError: options that contradict the folder.
        DataError: an input cannot be read, or nothing was kept.
    """
    if not inputs:
        raise ConfigError("no input was given")
    tasks: list[ImageTask] = []
    for number, source in enumerate(inputs, start=first_number):
        tasks += _tasks(number, source, images_per_unit, image_folder, path_column, caption_column)
    folder = PreparationFolder(out)
    plan = {
        "kind": "image_text",
        "inputs": [source.name for source in inputs],
        "listing": _digest(tasks),
        "shorter_side": shorter_side,
        "images_per_unit": images_per_unit,
        "shard_bytes": shard_bytes,
        "first_number": first_number,
    }
    with folder.claim(plan):
        tasks = [task for task in tasks if not folder.is_done(task.unit)]
        if tasks:
            folder.drop_index()
            progress = ProgressLine(len(tasks), "batches")
            run_tasks(
                tasks,
                ImagePreparation(folder, shard_bytes, shorter_side),
                processes=processes,
                advance=progress.advance,
                preload=__name__,
            )
            progress.close()
        return folder.finish(kind="image_text", tokenizer_fingerprint=None, processes=processes)


def _tasks(
    number: int,
    source: Path,
    images_per_unit: int,
    image_folder: Path | None,
    path_column: str,
    caption_column: str,
) -> Iterator[ImageTask]:
    if not source.is_dir() and source.suffix not in (".json", *TABLE_SUFFIXES):
        raise DataError(f"{source}: expected a folder, a COCO .json, or one of {', '.join(TABLE_SUFFIXES)}")
    if source.is_dir() and (tars := sorted(source.glob("*.tar"))):
        for position, tar in enumerate(tars):
            yield TarredImages(f"{number:04d}-{position:05d}", source.name, tar)
        return
    records = list_records(
        source, image_folder=image_folder, path_column=path_column, caption_column=caption_column
    )
    for position, start in enumerate(range(0, len(records), images_per_unit)):
        chunk = tuple(records[start : start + images_per_unit])
        yield ListedImages(f"{number:04d}-{position:05d}", source.name, chunk)


def _digest(tasks: Sequence[ImageTask]) -> str:
    """Tells one list of images and captions from another."""
    digest = hashlib.sha256()
    for task in tasks:
        if isinstance(task, TarredImages):
            digest.update(f"{task.tar.name} {task.tar.stat().st_size}\n".encode())
        else:
            for record in task.records:
                digest.update(f"{record.image}\0{record.captions}\n".encode())
    return digest.hexdigest()


def _one_line(caption: str) -> str:
    return " ".join(caption.split())
