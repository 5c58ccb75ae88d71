"""What one shard holds: a record per usable sample, and a count of the others by cause.

A shard is scanned by its tar headers, and a checksum is kept of what they stand in front of. What they show
to be unusable (no caption, a truncated member, ...) never enters the index, so that training meets only
samples worth reading.
"""

from __future__ import annotations

import functools
import operator
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalm.data.storage.tar import HashedStream, Member, Readable, TarEnd, scan_members
from metalm.modalities import MODALITIES, Media, modality_of_kind
from metalm.modalities.text import TOKEN_DTYPES
from metalm.regular_files import open_regular

MAX_MEMBER_BYTES = 256 << 20
"""A larger member makes its sample unusable: it would be read into memory whole."""

EXAMPLES = "examples"
"""The kind of shards whose samples are a `json` of parts with the images and clips that it names."""
KINDS = (*(modality.kind for modality in MODALITIES.values()), EXAMPLES)
"""What shards can hold."""

_JSON = "json"
FORMATS = ("u16", "u32", "txt", "jpg", "png", "webp", "wav", "flac", "ogg", _JSON, "mp3")
"""Formats of main members of all modalities, in the order of their codes in the index: new ones come last."""

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header in the shard
        ("size", "<u4"),  # from there to the end of the last member, padded to the block
        ("main_offset", "<u4"),  # token, text, image or audio member, or .json of an example, from `offset`
        ("main_size", "<u4"),
        ("caption_offset", "<u4"),  # .txt of a pair, from `offset`; size 0: there is none
        ("caption_size", "<u4"),
        ("json_offset", "<u4"),  # .json of a pair, likewise
        ("json_size", "<u4"),
        (
            "checksum",
            "<u4",
        ),  # of the main member, or all of an example, joined with that of this record's rest
        ("text_checksum", "<u4"),  # of caption and description together
        ("format", "u1"),  # of the main member, index into FORMATS
    ]
)
"""Without padding, whose bytes numpy leaves to chance: the index is named after its content."""

_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Shard:
    """One tar file of an index. `skipped` counts the samples left out, by cause."""

    name: str
    size: int
    sha256: str
    num_samples: int
    skipped: dict[str, int]


def scan_shard(
    path: Path, kind: str, *, max_member_bytes: int = MAX_MEMBER_BYTES
) -> tuple[Shard, np.ndarray]:
    """Reads one shard: its entry for the index, and the records [num_samples] of its usable samples.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return scan_stream(file.raw, path.name, kind, max_member_bytes=max_member_bytes)


def scan_stream(
    file: Readable, name: str, kind: str, *, max_member_bytes: int = MAX_MEMBER_BYTES
) -> tuple[Shard, np.ndarray]:
    """As `scan_shard`, for a shard of that name that is read from a stream."""
    stream = HashedStream(file)
    records: list[tuple[int, ...]] = []
    skipped: Counter[str] = Counter()
    members: dict[str, Member] = {}
    key, fault = "", ""

    def finish_sample() -> None:
        if members:
            outcome = fault or _record(members, kind)
            if isinstance(outcome, str):
                skipped[outcome] += 1
            else:
                records.append(outcome)

    for item in scan_members(stream):
        if isinstance(item, TarEnd):
            if item is TarEnd.CLOSED:
                finish_sample()
            else:
                # The last sample may lack a member: it goes with what was cut off.
                skipped[item.value if stream.size else "empty_shard"] += 1
            break
        match = _KEY_AND_SUFFIX.fullmatch(item.name)
        if match is None or item.name.rpartition("/")[2].startswith("__"):
            continue
        if match[1] != key:
            finish_sample()
            members, key, fault = {}, match[1], ""
        suffix = match[2].lower()
        if suffix in members:
            fault = fault or "duplicate_member"
        elif item.size > max_member_bytes:
            fault = "oversize_member"
        elif item.name.startswith("/") or ".." in item.name.split("/"):
            fault = fault or "unsafe_name"
        members[suffix] = item
    digest = stream.finish()
    table = np.array(records, RECORD)
    table["checksum"] ^= record_checksums(table)
    return Shard(name, stream.size, digest, len(table), dict(sorted(skipped.items()))), table


def _record(members: dict[str, Member], kind: str) -> tuple[int, ...] | str:
    """The record of a sample, or why it is not usable."""
    start = min(member.header_offset for member in members.values())
    end = max(member.end for member in members.values())
    if end - start > 0xFFFFFFFF:
        return "oversize_member"
    if kind == EXAMPLES:
        return _record_of_example(members, start, end)
    modality = modality_of_kind(kind)
    present = [suffix for suffix in modality.formats if suffix in members]
    caption = description = None
    if not present:
        of_other_format = not modality.other_suffixes.isdisjoint(members)
        return f"{'unsupported' if of_other_format else 'missing'}_{modality.name}"
    suffix = present[0]
    if isinstance(modality, Media):
        if len(present) > 1:
            return f"several_{modality.name}s"
        caption, description = members.get("txt"), members.get("json")
        if not ((caption and caption.size) or (description and description.size)):
            return "missing_caption"
    elif suffix in TOKEN_DTYPES and members[suffix].size % TOKEN_DTYPES[suffix].itemsize:
        return "partial_token"
    elif members[suffix].size == 0:
        return "empty_text"
    main = members[suffix]
    fields = [start, end - start, main.offset - start, main.size]
    text_checksum = 0
    for member in (caption, description):
        fields += [member.offset - start, member.size] if member else [0, 0]
        text_checksum ^= member.checksum if member else 0
    return (*fields, main.checksum, text_checksum, FORMATS.index(modality.formats[suffix]))


def _record_of_example(members: dict[str, Member], start: int, end: int) -> tuple[int, ...] | str:
    main = members.get(_JSON)
    if main is None or not main.size:
        return "missing_json" if main is None else "bad_json"
    if end - start > MAX_MEMBER_BYTES:  # it is read at once
        return "oversize_sample"
    checksum = joined_checksum(members.values())
    return (start, end - start, main.offset - start, main.size, 0, 0, 0, 0, checksum, 0, FORMATS.index(_JSON))


def joined_checksum(members: Iterable[Member]) -> int:
    """That of all members of an example, in any order."""
    return functools.reduce(operator.xor, (member.checksum for member in members), 0)


def record_checksums(records: np.ndarray) -> np.ndarray:
    """crc32 [n] uint32 of records [n], all but the checksum of the main member."""
    rest = records.copy()
    rest["checksum"] = 0
    content = memoryview(rest.tobytes())
    size = RECORD.itemsize
    checksums = [zlib.crc32(content[at : at + size]) for at in range(0, len(content), size)]
    return np.array(checksums, np.uint32)
