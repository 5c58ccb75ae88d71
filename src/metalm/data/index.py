"""The index beside the shards: where every sample lies, so that any sample is one byte range away.

`index.json` names the shards (size, sha256, number of samples) and an array file with one record per
sample, which is memory-mapped: opening an index costs the same for a thousand and for a billion samples.
What can be seen to be unusable from the tar headers alone (no caption, a truncated member, ...) is left
out here and counted by cause, so that training meets only samples worth reading.

The array is written first under a name made from its content, then `index.json` is replaced: a reader
sees the old index or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from metalm.config.schema import SourceKind
from metalm.data.tar import Member, TarEnd, scan_members
from metalm.errors import DataError

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
INDEX_VERSION = 1
MAX_MEMBER_BYTES = 256 << 20
"""A larger member makes its sample unusable: it would be read into memory whole."""

FORMATS = ("u16", "u32", "txt", "jpg", "png", "webp")
"""Formats of a main member, in the order of their codes in the index."""
TOKEN_DTYPES: dict[str, np.dtype] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header in the shard
        ("size", "<u4"),  # from there to the end of the last member, padded to the block
        ("main_offset", "<u4"),  # token, text or image member, from `offset`
        ("main_size", "<u4"),
        ("caption_offset", "<u4"),  # .txt of a pair, from `offset`; size 0: there is none
        ("caption_size", "<u4"),
        ("json_offset", "<u4"),  # .json of a pair, likewise
        ("json_size", "<u4"),
        ("format", "u1"),  # of the main member, index into FORMATS
    ],
    align=True,
)

_IMAGE_SUFFIXES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Shard:
    """One tar file of an index. `skipped` counts the samples left out, by cause."""

    name: str
    size: int
    sha256: str
    num_samples: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a folder of shards, in the order of the shards and of the samples in them."""

    folder: Path
    kind: SourceKind
    tokenizer_fingerprint: str | None
    """Of the tokenizer that wrote the token members; None without token members."""
    token_dtype: str | None
    num_tokens: int
    """In token members."""
    shards: tuple[Shard, ...]
    records: np.ndarray  # [num_samples] RECORD, memory-mapped

    @property
    def num_samples(self) -> int:
        """Usable samples in all shards."""
        return len(self.records)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples that were left out of the index, by cause, over all shards."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.skipped)
        return dict(sorted(total.items()))


def build_index(
    folder: Path | str,
    *,
    kind: SourceKind,
    tokenizer_fingerprint: str | None = None,
    processes: int = 1,
    on_shard: Callable[[Shard], None] | None = None,
) -> ShardIndex:
    """Reads every `*.tar` of `folder` once, writes the index beside them and opens it.

    Args:
        kind: `text` (members .u16 or .u32, or .txt) or `image_text` (an image, and .txt or .json).
        tokenizer_fingerprint: of the tokenizer that wrote the token members; needed if there are any.
        processes: shards are scanned by this many at once.
        on_shard: called with each shard as it is done, for showing progress.

    Raises:
        DataError: no folder, no shard or no usable sample in it, token members of two sizes or without
            a fingerprint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of shards")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(
            f"{folder} holds no *.tar shard (compressed shards cannot be indexed: unpack them first)"
        )

    shards: list[Shard] = []
    records: list[np.ndarray] = []
    for shard, shard_records in _scan_all(paths, kind, processes):
        shards.append(shard)
        records.append(shard_records)
        for cause, count in shard.skipped.items():
            logger.warning("%s: %d left out (%s)", folder / shard.name, count, cause)
        if on_shard is not None:
            on_shard(shard)
    table = np.concatenate(records)
    token_dtype, num_tokens = _token_totals(folder, table)
    if not len(table):
        causes = sum((Counter(shard.skipped) for shard in shards), Counter())
        raise DataError(
            f"{folder}: no usable {kind} sample in {len(shards)} shard(s); left out: {dict(causes)}"
        )
    if token_dtype is not None and tokenizer_fingerprint is None:
        raise DataError(f"{folder} holds token members: the fingerprint of their tokenizer must be given")

    array_name = _write_records(folder, table)
    document = {
        "version": INDEX_VERSION,
        "kind": kind,
        "records": array_name,
        "num_samples": len(table),
        "tokenizer_fingerprint": tokenizer_fingerprint if token_dtype is not None else None,
        "token_dtype": token_dtype,
        "num_tokens": num_tokens,
        "shards": [asdict(shard) for shard in shards],
    }
    _replace(folder / INDEX_NAME, (json.dumps(document, indent=1) + "\n").encode())
    for stale in folder.glob("index-*.npy"):
        if stale.name != array_name:
            stale.unlink()
    return open_index(folder)


def open_index(folder: Path | str, *, check_sizes: bool = True) -> ShardIndex:
    """Opens the index of a folder.

    Args:
        check_sizes: compare the size of every shard with the index (one stat per shard).

    Raises:
        DataError: the folder, the index or a shard is missing, damaged, or of another size than indexed.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist or is not a folder of shards")
    if not path.is_file():
        raise DataError(f"{folder} has no {INDEX_NAME}: write one with tools/index_shards.py")
    try:
        document = json.loads(path.read_bytes())
        version = document["version"]
        if version != INDEX_VERSION:
            raise DataError(
                f"{path} has version {version}, this program reads version {INDEX_VERSION}: index again"
            )
        records = np.load(folder / document["records"], mmap_mode="r", allow_pickle=False)
        index = ShardIndex(
            folder=folder,
            kind=document["kind"],
            tokenizer_fingerprint=document["tokenizer_fingerprint"],
            token_dtype=document["token_dtype"],
            num_tokens=document["num_tokens"],
            shards=tuple(Shard(**shard) for shard in document["shards"]),
            records=records,
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path} cannot be used ({error}): index the folder again") from error
    total = sum(shard.num_samples for shard in index.shards)
    if records.dtype != RECORD or records.ndim != 1 or len(records) != total or not total:
        raise DataError(
            f"{path} states {total} samples, its array holds {records.shape}: index the folder again"
        )
    if check_sizes:
        for shard in index.shards:
            check_shard_size(folder / shard.name, shard.size)
    return index


def check_shard_size(path: Path, size: int) -> None:
    """Raises DataError unless the file exists and has the size that the index states."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"shard {path} is in the index but cannot be read: {error.strerror}") from error
    if found != size:
        raise DataError(
            f"shard {path} has {found} bytes, its index states {size}: it was replaced; index again"
        )


def scan_shard(
    path: Path, kind: SourceKind, *, max_member_bytes: int = MAX_MEMBER_BYTES
) -> tuple[Shard, np.ndarray]:
    """Reads one shard: its entry for the index, and the records [num_samples] of its usable samples."""
    size = path.stat().st_size
    if size == 0:
        return Shard(path.name, 0, hashlib.sha256().hexdigest(), 0, {"empty_shard": 1}), np.empty(0, RECORD)
    records: list[tuple[int, ...]] = []
    skipped: Counter[str] = Counter()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        members: dict[str, Member] = {}
        key, fault = "", ""

        def finish_sample() -> None:
            if members:
                outcome = fault or _record(members, kind)
                if isinstance(outcome, str):
                    skipped[outcome] += 1
                else:
                    records.append(outcome)

        for item in scan_members(data):
            if isinstance(item, TarEnd):
                if item is TarEnd.CLOSED:
                    finish_sample()
                else:
                    # The last sample may lack a member: it goes with what was cut off.
                    skipped[item.value] += 1
                break
            match = _KEY_AND_SUFFIX.fullmatch(item.name)
            if match is None or PurePosixPath(item.name).name.startswith("__"):
                continue
            if match[1] != key:
                finish_sample()
                members, key, fault = {}, match[1], ""
            suffix = match[2].lower()
            if suffix in members:
                fault = fault or "duplicate_member"
            elif item.size > max_member_bytes:
                fault = "oversize_member"
            elif item.name.startswith("/") or ".." in PurePosixPath(item.name).parts:
                fault = fault or "unsafe_name"
            members[suffix] = item
        digest = hashlib.sha256(data).hexdigest()
    table = np.array(records, RECORD) if records else np.empty(0, RECORD)
    return Shard(path.name, size, digest, len(table), dict(sorted(skipped.items()))), table


def _record(members: dict[str, Member], kind: SourceKind) -> tuple[int, ...] | str:
    """The record of a sample, or why it is not usable."""
    start = min(member.header_offset for member in members.values())
    end = max(member.end for member in members.values())
    if end - start > 0xFFFFFFFF:
        return "oversize_member"
    caption = description = None
    if kind == "text":
        suffix = next((suffix for suffix in ("u16", "u32", "txt") if suffix in members), "")
        if not suffix:
            return "missing_text"
        if suffix in TOKEN_DTYPES and members[suffix].size % TOKEN_DTYPES[suffix].itemsize:
            return "partial_token"
        if members[suffix].size == 0:
            return "empty_text"
    else:
        images = [suffix for suffix in members if suffix in _IMAGE_SUFFIXES]
        if len(images) != 1:
            return "several_images" if images else "missing_image"
        suffix = images[0]
        caption, description = members.get("txt"), members.get("json")
        if not ((caption and caption.size) or (description and description.size)):
            return "missing_caption"
    main = members[suffix]
    fields = [start, end - start, main.offset - start, main.size]
    for member in (caption, description):
        fields += [member.offset - start, member.size] if member else [0, 0]
    return (*fields, FORMATS.index(_IMAGE_SUFFIXES.get(suffix, suffix)))


def _scan_all(paths: list[Path], kind: SourceKind, processes: int) -> Iterable[tuple[Shard, np.ndarray]]:
    kinds = [kind] * len(paths)
    if processes == 1:
        yield from map(scan_shard, paths, kinds)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(scan_shard, paths, kinds)


def _token_totals(folder: Path, table: np.ndarray) -> tuple[str | None, int]:
    counts = {name: table["main_size"][table["format"] == FORMATS.index(name)] for name in TOKEN_DTYPES}
    present = [name for name, sizes in counts.items() if len(sizes)]
    if len(present) > 1:
        raise DataError(f"{folder} holds .u16 and .u32 token members: one folder needs one token size")
    if not present:
        return None, 0
    dtype = TOKEN_DTYPES[present[0]]
    return dtype.name, int(counts[present[0]].sum(dtype=np.int64)) // dtype.itemsize


def _write_records(folder: Path, table: np.ndarray) -> str:
    name = f"index-{hashlib.sha256(table.tobytes()).hexdigest()[:16]}.npy"
    partial = folder / f"{name}.partial"
    with partial.open("wb") as file:
        np.save(file, table, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / name)
    return name


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
