"""Images or clips with their captions, from the forms in which such data sets come.

    folder of tars        img2dataset's or audio2dataset's `webdataset` output: file, .txt or .json per sample
    folder of files       their `files` output, and the like: file with .txt or .json beside it
    .json                 COCO captions
    .csv .tsv .jsonl      one path and caption per row, or "captions" with a list (.jsonl)

Rows about the same file become one sample with several captions.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.data.captions import listed, read_captions, usable_captions
from metalm.data.storage.shard_scan import MAX_MEMBER_BYTES, scan_shard
from metalm.errors import BadSample, DataError
from metalm.modalities import Media
from metalm.regular_files import open_regular, read_regular

COCO_SUFFIX = ".json"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
CAPTION_COLUMNS = ("captions", "caption")
"""Of tables and parquet, where none is named: the first that has any."""
_STATISTICS_SUFFIX = "_stats.json"
"""What img2dataset writes beside its folders."""


@dataclass(frozen=True)
class PairRecord:
    """An image or audio file and its captions; None: they are in a .txt or .json file beside it."""

    media: Path
    captions: tuple[str, ...] | None
    line: int | None = None
    """Of a table, from 1."""
    absent: str | None = None
    """Why there is no pair, where the listing shows it."""


@dataclass(frozen=True)
class Pair:
    """The bytes of an image or audio file, and what was said about it."""

    media: bytes
    captions: tuple[str, ...]


def read_record(record: PairRecord, modality: Media) -> Pair | str:
    """The pair of a record, or the cause of its absence."""
    name = modality.name
    if record.absent is not None:
        return record.absent
    try:
        status = record.media.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return f"unreadable_{name}"
        if status.st_size > MAX_MEMBER_BYTES:
            return f"oversize_{name}"
        captions = record.captions
        if captions is None:
            text, description = record.media.with_suffix(".txt"), record.media.with_suffix(".json")
            captions = tuple(
                read_captions(
                    text.read_bytes() if text.is_file() else b"",
                    description.read_bytes() if description.is_file() else b"",
                )
            )
        return Pair(record.media.read_bytes(), captions)
    except BadSample as bad:
        return bad.cause
    except FileNotFoundError:
        return f"missing_{name}"
    except (OSError, ValueError):  # a path that no file can have is a ValueError
        return f"unreadable_{name}"


def read_tar(path: Path, modality: Media) -> Iterator[tuple[float, Pair | str]]:
    """Causes of absence, then the pairs of a shard in order, each with the share of the file so far.

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
                    yield (start + int(record["size"])) / len(data), _pair(media, text, description)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _pair(media: bytes, text: bytes, description: bytes) -> Pair | str:
    try:
        return Pair(media, tuple(read_captions(text, description)))
    except BadSample as bad:
        return bad.cause


def _member(data: mmap.mmap, offset: int, size: int) -> bytes:
    return data[offset : offset + size]


def list_records(
    source: Path,
    modality: Media,
    *,
    path_column: str,
    caption_column: str | None,
    media_folder: Path | None = None,
) -> list[PairRecord]:
    """The files of a folder, a COCO file or a table. Their paths are relative to `media_folder`; without one,
    to the folder of the list.

    Raises:
        DataError: the source cannot be read, has another form, or lists nothing.
    """
    if source.is_dir():
        try:
            records = _folder_records(source, modality)
        except OSError as error:
            raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    else:
        records = read_list(source, media_folder or source.parent, path_column, caption_column)
    if not any(record.absent is None for record in records):
        others = Counter(str(record.absent) for record in records)
        found = f", but {', '.join(f'{count} {cause}' for cause, count in others.items())}" if others else ""
        raise DataError(f"{source} lists no {modality.name}{found}")
    return records


def _folder_records(source: Path, modality: Media) -> list[PairRecord]:
    """All files that can be read; behind them those of other formats, and captions of nothing."""
    files = sorted(source.rglob("*"))
    readable = modality.formats.keys() | modality.converted_suffixes
    media = [file for file in files if file.suffix[1:].lower() in readable]
    others = [file for file in files if file.suffix[1:].lower() in modality.other_suffixes - readable]
    captioned = {file.with_suffix("") for file in (*media, *others)}
    orphans = [
        file
        for file in files
        if file.suffix in (".txt", ".json")
        and file.with_suffix("") not in captioned
        and not file.name.endswith(_STATISTICS_SUFFIX)
    ]
    return [
        *(PairRecord(file, None) for file in media),
        *(PairRecord(file, None, absent=f"unsupported_{modality.name}") for file in others),
        *(PairRecord(file, None, absent=f"missing_{modality.name}") for file in orphans),
    ]


def read_list(source: Path, root: Path, path_column: str, caption_column: str | None) -> list[PairRecord]:
    """What a COCO file or a table lists, with paths relative to `root`.

    Args:
        path_column, caption_column: as of `prepare_pairs`.

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
        content = json.loads(read_regular(source))
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            found = usable_captions([annotation["caption"]])
            captions.get(annotation["image_id"], []).extend(found)  # subsets may list fewer images
        return [
            PairRecord(root / image["file_name"], tuple(captions[image["id"]])) for image in content["images"]
        ]
    except UnicodeDecodeError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f'{source} is no COCO captions file, which has "images" (id, file_name) and "annotations" '
            f"(image_id, caption): {error!r}"
        ) from error


def _table_records(
    source: Path, root: Path, path_column: str, caption_column: str | None
) -> list[PairRecord]:
    captions: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    without_path: list[PairRecord] = []
    for line, row in table_rows(source):
        columns = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        named = [column for column in columns if column in row]
        if not named or path_column not in row:
            lacking = repr(path_column) if named else " or ".join(map(repr, columns))
            raise DataError(
                f"{source}, line {line}: there is no {lacking}; it has {', '.join(map(str, row))}. Name the "
                "columns with --path-column and --caption-column."
            )
        path = row[path_column]
        if not isinstance(path, str) or not path:
            without_path.append(PairRecord(source, (), line, absent="missing_path"))
            continue
        found = next(filter(None, (usable_captions(listed(row[column])) for column in named)), [])
        captions.setdefault(path, []).extend(found)
        lines.setdefault(path, line)
    records = [PairRecord(root / path, tuple(texts), lines[path]) for path, texts in captions.items()]
    return [*records, *without_path]


def table_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a table by column name, with line numbers.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read as text.
        DataError: it is no table.
    """
    with io.TextIOWrapper(open_regular(source), encoding="utf-8-sig", newline="") as file:
        if source.suffix != ".jsonl":
            csv.field_size_limit(MAX_MEMBER_BYTES)
            rows: csv.DictReader[str]
            if source.suffix == ".tsv":  # where a quote is a character like any other
                rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                rows = csv.DictReader(file, strict=True)
            try:
                yield from ((rows.line_num, row) for row in rows)
            except csv.Error as error:
                raise DataError(f"{source}, line {rows.line_num}: {error}") from error
            return
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{source}, line {number}: expected an object, found {type(row).__name__}")
            yield number, row
