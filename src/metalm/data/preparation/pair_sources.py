"""Images or clips with their captions, from the forms in which such data sets come.

    folder of tars        img2dataset's or audio2dataset's `webdataset` output: file, .txt or .json per sample
    folder of files       their `files` output, and the like: file with .txt or .json beside it
    .json                 COCO captions
    .csv .tsv .jsonl      one path and caption per row, or "captions" with a list (.jsonl)

Rows about the same file become one sample with several captions.
"""

from __future__ import annotations

import csv
import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.data.shards import MAX_MEMBER_BYTES, scan_shard
from metalm.errors import DataError
from metalm.modalities import Media

COCO_SUFFIX = ".json"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class PairRecord:
    """An image or audio file and its captions; None: they are in a .txt or .json file beside it."""

    media: Path
    captions: tuple[str, ...] | None


@dataclass(frozen=True)
class Pair:
    """The bytes of an image or audio file, and what was said about it."""

    media: bytes
    captions: tuple[str, ...]


def read_record(record: PairRecord, modality: Media) -> Pair | str:
    """The pair of a record, or the cause of its absence."""
    name = modality.name
    try:
        if record.media.stat().st_size > MAX_MEMBER_BYTES:
            return f"oversize_{name}"
        captions = record.captions
        if captions is None:
            text, description = record.media.with_suffix(".txt"), record.media.with_suffix(".json")
            captions = _captions(
                text.read_bytes() if text.is_file() else b"",
                description.read_bytes() if description.is_file() else b"",
            )
        return Pair(record.media.read_bytes(), captions)
    except FileNotFoundError:
        return f"missing_{name}"
    except OSError:
        return f"unreadable_{name}"


def read_tar(path: Path, modality: Media) -> Iterator[tuple[float, Pair | str]]:
    """The pairs of a shard in order, or causes of absence, each with the share of the file so far.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        shard, records = scan_shard(path, modality.kind)
        with path.open("rb") as file:
            for cause, count in shard.skipped.items():
                for _ in range(count):
                    yield 0.0, cause
            if not len(records):
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for record in records:
                    start = int(record["offset"])
                    media, text, description = (
                        _member(data, start + int(record[f"{name}_offset"]), int(record[f"{name}_size"]))
                        for name in ("main", "caption", "json")
                    )
                    yield (start + int(record["size"])) / len(data), Pair(media, _captions(text, description))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _member(data: mmap.mmap, offset: int, size: int) -> bytes:
    return data[offset : offset + size]


def list_records(
    source: Path,
    modality: Media,
    *,
    path_column: str,
    caption_column: str,
    media_folder: Path | None = None,
) -> list[PairRecord]:
    """The files of a folder, a COCO file or a table. Their paths are relative to `media_folder`; without one,
    to the folder of the list.

    Raises:
        DataError: the source cannot be read, has another form, or lists nothing.
    """
    if source.is_dir():
        try:
            files = (file for file in source.rglob("*") if file.suffix[1:].lower() in modality.formats)
            records = [PairRecord(file, None) for file in sorted(files)]
        except OSError as error:
            raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    else:
        records = read_list(source, media_folder or source.parent, path_column, caption_column)
    if not records:
        raise DataError(f"{source} lists no {modality.name}")
    return records


def read_list(source: Path, root: Path, path_column: str, caption_column: str) -> list[PairRecord]:
    """What a COCO file or a table lists, with paths relative to `root`.

    Raises:
        DataError: it cannot be read, or has another form.
    """
    try:
        if source.suffix == COCO_SUFFIX:
            return _coco_records(source, root)
        return _table_records(source, root, path_column, caption_column)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error}") from error


def _coco_records(source: Path, root: Path) -> list[PairRecord]:
    try:
        content = json.loads(source.read_bytes())
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(str(annotation["caption"]))
        return [
            PairRecord(root / image["file_name"], tuple(captions[image["id"]])) for image in content["images"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{source} is no COCO captions file, which has "images" (id, file_name) and "annotations" '
            f"(image_id, caption): {error!r}"
        ) from error


def _table_records(source: Path, root: Path, path_column: str, caption_column: str) -> list[PairRecord]:
    captions: dict[str, list[str]] = {}
    for line, row in _rows(source):
        try:
            found = row["captions"] if isinstance(row.get("captions"), list) else [row[caption_column]]
            captions.setdefault(str(row[path_column]), []).extend(map(str, found))
        except KeyError as error:
            raise DataError(
                f"{source}, line {line}: there is no {error}; it has {', '.join(map(str, row))}. Name the "
                "columns with --path-column and --caption-column."
            ) from error
    return [PairRecord(root / path, tuple(texts)) for path, texts in captions.items()]


def _rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a table by column name, with line numbers."""
    with source.open(encoding="utf-8", newline="") as file:
        if source.suffix != ".jsonl":
            rows = csv.DictReader(file, delimiter="\t" if source.suffix == ".tsv" else ",")
            yield from ((rows.line_num, row) for row in rows)
            return
        for number, text in enumerate(file, start=1):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise DataError(f"{source}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{source}, line {number}: expected an object, found {type(row).__name__}")
            yield number, row


def _captions(text: bytes, description: bytes) -> tuple[str, ...]:
    """Captions from the content of a .txt and a .json: all "captions", else the text, else "caption"."""
    try:
        parsed = json.loads(description) if description else {}
    except (ValueError, RecursionError):
        parsed = {}
    fields = parsed if isinstance(parsed, dict) else {}
    found = fields.get("captions")
    if not isinstance(found, list):
        found = [text.decode("utf-8", "replace")] if text else [fields.get("caption")]
    return tuple(caption for caption in found if isinstance(caption, str))
