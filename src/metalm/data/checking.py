"""Are the shards of a folder what their index says, and can their samples be decoded?"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalm.data.sources import Source, open_source
from metalm.data.storage.index import ShardIndex, open_index, scan_remote
from metalm.data.storage.shard_scan import scan_shard
from metalm.data.tokenizer import load_tokenizer
from metalm.errors import BadSample, DataError
from metalm.progress import Phase

_Argument = tuple[Path, str | None, Path | None, int, int]
"""Folder, URL, tokenizer, number of the shard, samples to decode."""


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one shard; no problem means that it is sound."""

    name: str
    num_samples: int
    num_decoded: int
    problems: tuple[str, ...]


def check_shards(
    folder: Path,
    tokenizer_path: Path | None,
    *,
    url: str | None = None,
    samples_per_shard: int = 16,
    processes: int = 1,
    on_shard: Callable[[ShardCheck], None] | None = None,
) -> list[ShardCheck]:
    """Reads every shard again, compares it with the index, and decodes some samples of each.

    Args:
        tokenizer_path: of the shards; None will do for pairs.
        url: where the shards are, if not in `folder` (see `SourceConfig.url`).
        samples_per_shard: decoded at even distances.
        on_shard: called with each shard as it is done.

    Raises:
        DataError: the index or the tokenizer cannot be used at all.
    """
    index = open_index(folder, check_sizes=False)
    arguments = [
        (folder, url, tokenizer_path, number, samples_per_shard) for number in range(len(index.shards))
    ]
    _open(folder, url, tokenizer_path)
    checks = []
    with Phase(f"checking {folder}", len(arguments), "shards") as phase:
        for check in phase.each(_all_checks(arguments, processes)):
            checks.append(check)
            if on_shard is not None:
                on_shard(check)
    return checks


def _all_checks(arguments: list[_Argument], processes: int) -> Iterator[ShardCheck]:
    if processes == 1:
        yield from map(_check_shard, arguments)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_check_shard, arguments)


def _open(folder: Path, url: str | None, tokenizer_path: Path | None) -> Source:
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    return open_source(folder.name, folder, tokenizer, url=url)


def _check_shard(argument: _Argument) -> ShardCheck:
    folder, url, tokenizer_path, number, samples_per_shard = argument
    source = _open(folder, url, tokenizer_path)
    entry = source.index.shards[number]
    problems = _differences(source.index, url, number)
    decoded = 0
    if not problems and entry.num_samples:
        first = sum(shard.num_samples for shard in source.index.shards[:number])
        count = min(samples_per_shard, entry.num_samples)
        chosen = first + np.linspace(0, entry.num_samples - 1, count).astype(np.int64)
        for location in source.index.locate(chosen):
            try:
                source.reader.read_ahead([location])
                source.try_out(location)
                decoded += 1
            except BadSample as failure:
                problems.append(f"sample {location.sample - first}: {failure.cause}")
            except DataError as error:
                problems.append(str(error))
    source.reader.close()
    return ShardCheck(entry.name, entry.num_samples, decoded, tuple(problems))


def _differences(index: ShardIndex, url: str | None, number: int) -> list[str]:
    entry = index.shards[number]
    try:
        if url is None:
            found, records = scan_shard(index.folder / entry.name, index.kind)
        else:
            found, records = scan_remote(url, entry.name, index.kind)
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    except DataError as error:
        return [str(error)]
    problems = []
    for what in ("size", "sha256", "num_samples", "skipped"):
        stated, real = getattr(entry, what), getattr(found, what)
        if stated != real:
            problems.append(f"{what} is {real}, the index states {stated}")
    first = sum(shard.num_samples for shard in index.shards[:number])
    if not problems and not np.array_equal(records, index.records[first : first + entry.num_samples]):
        problems.append("its members are not where the index says")
    return problems
