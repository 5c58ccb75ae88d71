"""The index beside the shards: where every sample lies, so that any sample is one byte range away.

`index.json` names the shards (size, sha256, number of samples) and a file with one record per sample, which
is memory-mapped: opening an index costs the same for a thousand and for a billion samples. A record holds
checksums of the sample's members and of itself, which are compared whenever the sample is read.

The records are written first, under a name made from their content, then `index.json` is replaced: a
reader sees the old index or the new one, never a mixture.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from metalm.data.storage.index_document import INDEX_VERSION, read_document
from metalm.data.storage.locations import SampleLocation, out_of_place, readable_formats
from metalm.data.storage.remote import RemoteShard, attempt, shard_url
from metalm.data.storage.shard_scan import (
    EXAMPLES,
    FORMATS,
    MAX_MEMBER_BYTES,
    RECORD,
    Shard,
    record_checksums,
    scan_shard,
    scan_stream,
)
from metalm.errors import BusyError, DataError
from metalm.file_lock import try_lock
from metalm.modalities import Modality, modality_of_kind
from metalm.modalities.text import TOKEN_DTYPES
from metalm.outputs import require_folder_place
from metalm.progress import Phase
from metalm.regular_files import open_regular, replace_file
from metalm.shown_url import shown_url

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a folder of shards, in the order of the shards and of the samples in them."""

    folder: Path
    kind: str
    tokenizer_fingerprint: str | None
    """Of the tokenizer that wrote the token members; None without token members."""
    token_dtype: str | None
    num_tokens: int
    """In token members."""
    shards: tuple[Shard, ...]
    fingerprint: str
    """Of the samples' places and contents, 16 hexadecimal digits."""
    records: np.ndarray  # [num_samples] RECORD, memory-mapped

    @property
    def modality(self) -> Modality | None:
        """Of the samples' main members; None: they are examples, which hold any."""
        return None if self.kind == EXAMPLES else modality_of_kind(self.kind)

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

    @functools.cached_property
    def shard_ends(self) -> np.ndarray:
        """The first sample [num_shards] int64 after each shard."""
        return np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)

    def locate(self, samples: np.ndarray) -> list[SampleLocation]:
        """The locations of samples [n], in their order.

        Raises:
            DataError: a record states a place that no sample of the index can have.
        """
        records = self.records[samples]
        shards = np.searchsorted(self.shard_ends, samples, side="right")
        wrong = out_of_place(
            self.records, samples, shards, self.shard_ends, self._shard_sizes, self._readable_formats
        )
        if wrong.any():
            sample, shard = int(samples[wrong][0]), self.shards[int(shards[wrong][0])]
            raise DataError(
                f"the index of {self.folder} states a place for sample {sample}, in shard {shard.name}, that "
                "no sample can have: its records are damaged; index the folder again"
            )
        starts = records["offset"].astype(np.int64)
        columns = (
            samples,
            shards,
            records["format"],
            starts + records["main_offset"],
            records["main_size"],
            starts + records["caption_offset"],
            records["caption_size"],
            starts + records["json_offset"],
            records["json_size"],
            starts,
            starts + records["size"],
            records["checksum"] ^ record_checksums(records),
            records["text_checksum"],
        )
        return list(map(SampleLocation._make, zip(*(c.tolist() for c in columns), strict=True)))

    @functools.cached_property
    def _shard_sizes(self) -> np.ndarray:
        return np.array([shard.size for shard in self.shards], np.uint64)

    @functools.cached_property
    def _readable_formats(self) -> np.ndarray:
        return readable_formats(self.modality, self.token_dtype, TOKEN_DTYPES)


def build_index(
    folder: Path | str,
    *,
    kind: str,
    url: str | None = None,
    shard_names: Sequence[str] = (),
    tokenizer_fingerprint: str | None = None,
    processes: int = 1,
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> ShardIndex:
    """Reads every `*.tar` of `folder` once, writes the index beside them and opens it.

    Args:
        kind: `text` (members .u16 or .u32, or .txt), `image_text` or `audio_text` (an image or a clip, and
            .txt or .json), or `examples` (.json and the images and clips that it names).
        url: read the shards of `shard_names` from here instead (see `SourceConfig.url`), each as a stream;
            `folder`, which is made if need be, holds their index alone.
        tokenizer_fingerprint: of the tokenizer that wrote the token members; needed if there are any.
        processes: shards are scanned by this many at once.
        max_member_bytes: a sample with a larger member is left out.

    Raises:
        BusyError: another process is indexing the folder.
        ConfigError: the index cannot be written into the folder.
        DataError: no folder, no shard or no usable sample in it, token members of two sizes or without
            a fingerprint.
    """
    folder = Path(folder)
    scan: Callable[[str], tuple[Shard, np.ndarray]]
    if url is None:
        shard_names = _local_shards(folder)
        scan = functools.partial(_scan_file, folder, kind=kind, max_member_bytes=max_member_bytes)
    else:
        scan = functools.partial(scan_remote, url, kind=kind, max_member_bytes=max_member_bytes)
    require_folder_place(folder, "index it where it may be written, such as by another user")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "index.records.partial"
    with _alone(folder):
        try:
            shards, tokens, digest = _write_records(partial, shard_names, scan, processes)
            _check_content(folder, kind, shards, tokens, tokenizer_fingerprint)
            records_name = f"index-{digest[:16]}.records"
            partial.replace(folder / records_name)
        finally:
            partial.unlink(missing_ok=True)
        token_format = next(iter(tokens), None)
        document = {
            "version": INDEX_VERSION,
            "kind": kind,
            "records": records_name,
            "num_samples": sum(shard.num_samples for shard in shards),
            "tokenizer_fingerprint": tokenizer_fingerprint if token_format else None,
            "token_dtype": TOKEN_DTYPES[token_format].name if token_format else None,
            "num_tokens": tokens.total(),
            "shards": [asdict(shard) for shard in shards],
        }
        replace_file(folder / INDEX_NAME, json.dumps(document, indent=1) + "\n", forced=True)
        for stale in folder.glob("index-*.records"):
            if stale.name != records_name:
                stale.unlink()
    return open_index(folder, check_sizes=url is None)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from indexing a folder meanwhile, where its file system knows locks.

    Raises:
        BusyError: another process does.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if try_lock(descriptor) is False:
            raise BusyError(f"{folder} is being indexed by another process: wait for it")
        yield
    finally:
        os.close(descriptor)


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
    document = read_document(path)
    try:
        with open_regular(folder / document.records) as file:
            records = np.memmap(file, RECORD, mode="r")
    except (OSError, ValueError) as error:  # numpy raises ValueError at another size
        raise DataError(
            f"{folder / document.records} cannot be used ({error}): index the folder again"
        ) from None
    index = ShardIndex(
        folder=folder,
        kind=document.kind,
        tokenizer_fingerprint=document.tokenizer_fingerprint,
        token_dtype=document.token_dtype,
        num_tokens=document.num_tokens,
        shards=document.shards,
        fingerprint=document.fingerprint,
        records=records,
    )
    if len(records) != document.num_samples:
        raise DataError(
            f"{path} states {document.num_samples} samples and has {len(records)} records: index the folder "
            "again"
        )
    if check_sizes:
        for shard in index.shards:
            check_shard_size(folder / shard.name, shard.size)
    return index


def check_shard_size(path: Path, size: int) -> None:
    """Raises DataError unless the file exists and has the size that the index states."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"shard {path} is in the index but cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"shard {path} is in the index but is no regular file")
    if (found := status.st_size) != size:
        raise DataError(
            f"shard {path} has {found} bytes, its index states {size}: it was replaced; index again"
        )


def scan_remote(
    url: str, name: str, kind: str, *, max_member_bytes: int = MAX_MEMBER_BYTES
) -> tuple[Shard, np.ndarray]:
    """As `scan_shard`, for a shard behind a URL.

    Raises:
        DataError: it cannot be read to its end, after some attempts.
    """

    def scan() -> tuple[Shard, np.ndarray]:
        with RemoteShard(shard_url(url, name)) as stream:
            return scan_stream(stream, name, kind, max_member_bytes=max_member_bytes)

    return attempt(shard_url(shown_url(url), name), scan)


def _local_shards(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of shards")
    names = sorted(path.name for path in folder.glob("*.tar"))
    if names:
        warn_of_compressed(folder)
    else:
        raise DataError(
            f"{folder} holds no *.tar shard (compressed shards cannot be indexed: unpack them first)"
        )
    return names


def warn_of_compressed(folder: Path) -> None:
    """Say which shards of a folder are passed over."""
    found = sorted(path.name for path in (*folder.glob("*.tar.*"), *folder.glob("*.tgz")))
    if found:
        logger.warning(
            "%s: %d compressed shards are passed over (%s%s): unpack them first",
            folder,
            len(found),
            ", ".join(found[:3]),
            ", ..." if len(found) > 3 else "",
        )


def _scan_file(folder: Path, name: str, kind: str, *, max_member_bytes: int) -> tuple[Shard, np.ndarray]:
    try:
        return scan_shard(folder / name, kind, max_member_bytes=max_member_bytes)
    except OSError as error:
        raise DataError(f"shard {folder / name} cannot be read: {error.strerror}") from None


def _scan_all(
    names: Sequence[str], scan: Callable[[str], tuple[Shard, np.ndarray]], processes: int
) -> Iterable[tuple[Shard, np.ndarray]]:
    if processes == 1:
        yield from map(scan, names)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(scan, names)


def _write_records(
    path: Path,
    shard_names: Sequence[str],
    scan: Callable[[str], tuple[Shard, np.ndarray]],
    processes: int,
) -> tuple[list[Shard], Counter[str], str]:
    """Writes the records shard by shard; returns the shards, tokens by format, sha256 of the records."""
    shards: list[Shard] = []
    tokens: Counter[str] = Counter()
    digest = hashlib.sha256()
    folder = path.parent
    with path.open("wb") as file, Phase(f"indexing {folder}", len(shard_names), "shards") as phase:
        for shard, records in phase.each(_scan_all(shard_names, scan, processes)):
            content = records.tobytes()
            file.write(content)
            digest.update(content)
            shards.append(shard)
            for name, dtype in TOKEN_DTYPES.items():
                sizes = records["main_size"][records["format"] == FORMATS.index(name)]
                if len(sizes):
                    tokens[name] += int(sizes.sum(dtype=np.int64)) // dtype.itemsize
            for cause, count in shard.skipped.items():
                logger.warning("%s: %d left out (%s)", folder / shard.name, count, cause)
        file.flush()
        os.fsync(file.fileno())
    return shards, tokens, digest.hexdigest()


def _check_content(
    folder: Path, kind: str, shards: list[Shard], tokens: Counter[str], fingerprint: str | None
) -> None:
    if not any(shard.num_samples for shard in shards):
        causes = sum((Counter(shard.skipped) for shard in shards), Counter())
        raise DataError(
            f"{folder}: no usable {kind} sample in {len(shards)} shard(s); left out: {dict(causes)}"
        )
    if len(tokens) > 1:
        raise DataError(f"{folder} holds .u16 and .u32 token members: one folder needs one token size")
    if tokens and fingerprint is None:
        raise DataError(
            f"{folder} holds token members (.u16, .u32): name the tokenizer that wrote them by --tokenizer"
        )
