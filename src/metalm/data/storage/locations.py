"""Where samples lie in their shards, held against what an index of that form can say at all.

Records are checked as they are looked up, by a few operations over all that are asked for at once, so that
opening an index costs the same for a thousand and for a billion samples. What they cannot show, the header in
front of each member does when it is read: see `member_readers`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from metalm.data.storage.shard_scan import FORMATS, MAX_MEMBER_BYTES
from metalm.data.storage.tar import BLOCK
from metalm.modalities import MODALITIES, Modality

SUFFIXES = tuple(
    frozenset(
        suffix
        for modality in MODALITIES.values()
        for suffix, name in modality.formats.items()
        if name == format_name
    )
    or {format_name}
    for format_name in FORMATS
)
"""By format: how the names of its members may end."""
CAPTION_SUFFIXES = frozenset({"txt"})
JSON_SUFFIXES = frozenset({"json"})

_MEMBERS = ("main", "caption", "json")


class SampleLocation(NamedTuple):
    """Where a sample's members lie. Offsets are in the shard; a size of 0 means that there is none."""

    sample: int
    shard: int
    format: int
    offset: int
    size: int
    caption_offset: int
    caption_size: int
    json_offset: int
    json_size: int
    first: int
    """Where the first of its members' headers lies."""
    end: int
    """Where the next sample's lies."""
    checksum: int
    """crc32 of the main member; of an example those of all members, joined by exclusive or."""
    text_checksum: int
    """crc32 of caption and description, each, joined by exclusive or."""


def readable_formats(
    modality: Modality | None, token_dtype: str | None, formats: dict[str, np.dtype]
) -> np.ndarray:
    """Which codes [256] bool of a record's format an index of a modality can hold.

    Args:
        modality: of the main members; None: they are descriptions of examples.
        token_dtype: of the index.
        formats: of token members.
    """
    readable = np.zeros(256, bool)
    for name in {"json"} if modality is None else set(modality.formats.values()):
        readable[FORMATS.index(name)] = name not in formats or formats[name].name == token_dtype
    return readable


def out_of_place(
    records: np.ndarray,
    samples: np.ndarray,
    shards: np.ndarray,
    shard_ends: np.ndarray,
    shard_sizes: np.ndarray,
    readable: np.ndarray,
) -> np.ndarray:
    """Which samples [n] bool cannot lie where their records say.

    Members must lie at blocks inside their sample, samples inside their shard, in order and apart from each
    other.

    Args:
        records: of the index.
        samples: [n] int64.
        shards: [n] int64, of the samples.
        shard_ends: [num_shards] int64, the first sample after each shard.
        shard_sizes: [num_shards] uint64, bytes.
        readable: by `readable_formats`.
    """
    own = records[samples]
    start, size = own["offset"], own["size"].astype(np.uint64)
    shard_size = shard_sizes[shards]
    wrong = (start % BLOCK != 0) | (start > shard_size) | (size > shard_size - np.minimum(start, shard_size))
    for member in _MEMBERS:
        offset, length = own[f"{member}_offset"].astype(np.uint64), own[f"{member}_size"].astype(np.uint64)
        there = (offset % BLOCK == 0) & (offset >= BLOCK) & (offset + length <= size)
        wrong |= ~there & ((length > 0) | (member == "main")) | (length > MAX_MEMBER_BYTES)
    wrong |= ~readable[own["format"]]
    is_last = samples + 1 == shard_ends[shards]
    after = records["offset"][np.minimum(samples + 1, len(records) - 1)]
    wrong |= ~is_last & (start + size > after)
    before = records[np.maximum(samples - 1, 0)]
    is_first = samples == np.concatenate(([0], shard_ends))[shards]
    return wrong | (~is_first & (before["offset"] + before["size"] > start))
