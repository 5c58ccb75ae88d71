"""Raw text to token shards.

The unit of work is a stretch of one input file: the documents whose lines begin in [k * n, (k + 1) * n)
of its decompressed content. It becomes one shard, or more if it outgrows the target size. What a stretch
holds depends on neither processes nor restarts, and a document's key is its place in the input.

A plain file is entered at any stretch. A compressed one is read from its beginning: if there are more
processes than files, several read the same file and each prepares every n-th stretch, for decompression
costs far less than tokenising.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from metalm.data.preparation.fast_bpe import gigatoken_encoder, why_not_gigatoken
from metalm.data.preparation.folder import PreparationFolder
from metalm.data.preparation.jsonl import (
    Document,
    JsonLinesFile,
    check_files,
    documents,
    is_compressed,
    parse_document,
)
from metalm.data.preparation.progress import ProgressLine
from metalm.data.preparation.shard_writer import ShardWriter
from metalm.data.preparation.tally import Place, Tally
from metalm.data.preparation.task_pool import Advance, run_tasks
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import BadSample, ConfigError

PAPER_DROPS = ("Github", "ArXiv", "PubMed Central")
"""Subsets of the Pile that the paper leaves out."""
BATCH_BYTES = 1 << 20
"""Text that is tokenised at once."""
PROOF_BYTES = 1 << 18
"""Text on which gigatoken must agree with Hugging Face before it is used."""

Store = Literal["ids", "text", "both"]
Backend = Literal["auto", "gigatoken", "huggingface"]


class Numbered(NamedTuple):
    """A document with its line: offset in the input, and number in its stretch, from 1."""

    offset: int
    line: int
    document: Document


Batch = list[Numbered]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubsetFilter:
    """Which subsets are kept: those of `keep`, or all if it is empty, less those of `drop`.

    Names are compared without regard to case.
    """

    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def accepts(self, subset: str) -> bool:
        """Whether documents of this subset are kept."""
        name = subset.casefold()
        if self.keep and name not in {kept.casefold() for kept in self.keep}:
            return False
        return name not in {dropped.casefold() for dropped in self.drop}


@dataclass(frozen=True)
class Stretches:
    """A task: stretches `first`, `first + step`, ... of one input file; of a plain file only the first."""

    file_number: int
    path: Path
    size: int
    first: int
    step: int


def unit_name(file_number: int, stretch: int) -> str:
    """Name of a stretch's receipt, and of its shards up to their last number."""
    return f"{file_number:04d}-{stretch:05d}"


@dataclass(frozen=True)
class TextPreparation:
    """What every worker process needs to know."""

    folder: PreparationFolder
    shard_bytes: int
    store: Store
    meta: bool
    subsets: SubsetFilter
    tokenizer_path: Path | None
    gigatoken: bool

    def __call__(self, task: Stretches, advance: Advance) -> None:
        """Prepares the stretches of a task that have no receipt yet."""
        compressed = is_compressed(task.path)
        start = 0 if compressed else task.first * self.shard_bytes
        end = None if compressed else start + self.shard_bytes
        with JsonLinesFile(task.path) as file:
            reported = start
            lines = file.lines(start=start, end=end)
            for stretch, group in itertools.groupby(lines, key=lambda item: item[0] // self.shard_bytes):
                unit = unit_name(task.file_number, stretch)
                if (stretch - task.first) % task.step == 0 and not self.folder.is_done(unit):
                    for _ in self._prepare(unit, task, group):
                        advance((file.position - reported) / task.step)
                        reported = file.position
            advance((file.position - reported) / task.step)

    def _prepare(
        self, unit: str, task: Stretches, lines: Iterable[tuple[int, bytes | None]]
    ) -> Iterator[None]:
        """Writes the shards and the receipt of one stretch; yields after each batch."""
        tokenizer = self._load_tokenizer()
        tally = Tally()
        with ShardWriter(self.folder.path, unit, self.shard_bytes) as writer:
            for batch in self._batches(lines, task.path, tally):
                for sample_key, members in self._samples(batch, tokenizer, task.path, tally):
                    writer.write(f"{task.file_number:04d}-{sample_key:013d}", members)
                yield
        self.folder.record(unit, writer.shards, tally)

    def _load_tokenizer(self) -> Tokenizer | None:
        if self.tokenizer_path is None:
            return None
        tokenizer = load_tokenizer(self.tokenizer_path)
        return (
            tokenizer.with_piece_encoder(gigatoken_encoder(tokenizer.definition))
            if self.gigatoken
            else tokenizer
        )

    def _batches(
        self, lines: Iterable[tuple[int, bytes | None]], path: Path, tally: Tally
    ) -> Iterator[Batch]:
        """The documents to keep in batches of about `BATCH_BYTES`."""
        batch: Batch = []
        size = 0
        for offset, line in lines:
            tally.num_lines += 1
            document = parse_document(line)
            if document is None:
                continue
            if isinstance(document, str):
                tally.drop(document, _place(path, tally.num_lines))
            elif not self.subsets.accepts(document.subset):
                tally.drop(f"subset {document.subset}")
            else:
                batch.append(Numbered(offset, tally.num_lines, document))
                size += document.num_bytes
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _samples(
        self, batch: Batch, tokenizer: Tokenizer | None, path: Path, tally: Tally
    ) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The members of each document's sample, with its offset; counts what is kept."""
        encoded: Sequence[np.ndarray | None] = [None] * len(batch)
        if tokenizer is not None:
            encoded = _encode([numbered.document.text for numbered in batch], tokenizer)
        for (offset, line, document), ids in zip(batch, encoded, strict=True):
            members: dict[str, bytes] = {}
            amounts = {"documents": 1, "bytes": document.num_bytes}
            if tokenizer is not None:
                if ids is None:
                    tally.drop("untokenizable", _place(path, line))
                    continue
                amounts["tokens"] = len(ids)
                members["u16" if tokenizer.id_dtype.itemsize == 2 else "u32"] = ids.astype(
                    tokenizer.id_dtype
                ).tobytes()
            if self.store != "ids":
                members["txt"] = document.text.encode("utf-8")
            if self.meta:
                members["json"] = json.dumps({"pile_set_name": document.subset}).encode()
            tally.keep(document.subset, **amounts)
            yield offset, members


def _place(path: Path, line: int) -> Place:
    return {"file": path.name, "line": line}


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray | None]:
    """The ids of each text; None where the tokenizer gives up."""
    try:
        return list(tokenizer.encode(texts))
    except BadSample:
        return [None] if len(texts) == 1 else [ids for text in texts for ids in _encode([text], tokenizer)]


def prepare_text(
    inputs: Sequence[Path],
    out: Path,
    tokenizer_path: Path | None,
    *,
    subsets: SubsetFilter = SubsetFilter(),
    store: Store = "ids",
    meta: bool = False,
    shard_bytes: int = 256 << 20,
    first_number: int = 0,
    processes: int = 1,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """Writes token shards, their index and a report of JSON Lines files in the Pile's format.

    Args:
        inputs: files (.jsonl, .jsonl.gz, .jsonl.zst) in the order that shards are numbered by.
        out: folder of the shards. If an earlier call was interrupted, the same call goes on.
        tokenizer_path: folder or tokenizer.json; None only with `store="text"`.
        subsets: which documents are kept, by `meta.pile_set_name`.
        store: token ids, text, or both members per document.
        meta: add a .json member with the document's subset.
        shard_bytes: raw JSON Lines per stretch, and the largest size of a shard.
        first_number: of the first input, in names of shards and keys of samples. Inputs that are prepared
            apart, each under its number among all, give the same shards as together.
        processes: how many work at once; the output does not depend on it.
        backend: `auto` uses gigatoken where it is installed and gives the same ids.

    Returns:
        The content of report.json: documents, tokens, bytes, all that was dropped by cause, per subset.

    Raises:
        ConfigError: options that contradict each other or the folder.
        DataError: an input or the tokenizer cannot be read, or nothing was kept.
    """
    if (tokenizer_path is None) != (store == "text"):
        raise ConfigError(f"store={store!r} {'needs a' if store != 'text' else 'uses no'} tokenizer")
    sizes = _input_sizes(inputs)
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    folder = PreparationFolder(out)
    plan = {
        "kind": "text",
        "inputs": [[path.name, size] for path, size in zip(inputs, sizes, strict=True)],
        "tokenizer": tokenizer and tokenizer.fingerprint,
        "keep": sorted(subsets.keep),
        "drop": sorted(subsets.drop),
        "store": store,
        "meta": meta,
        "shard_bytes": shard_bytes,
        "first_number": first_number,
    }
    gigatoken = tokenizer is not None and _use_gigatoken(tokenizer, inputs, backend)
    preparation = TextPreparation(
        folder, shard_bytes, store, meta, subsets, tokenizer_path if tokenizer else None, gigatoken
    )
    with folder.claim(plan):
        tasks = _tasks(inputs, sizes, folder, shard_bytes, first_number, processes)
        if tasks and not folder.is_finished():
            folder.drop_index()
            progress = ProgressLine(_remaining_bytes(tasks, shard_bytes), "MB", 1e6)
            run_tasks(tasks, preparation, processes=processes, advance=progress.advance, preload=__name__)
            progress.close()
        return folder.finish(
            kind="text",
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
            processes=processes,
        )


def _input_sizes(inputs: Sequence[Path]) -> list[int]:
    if not inputs:
        raise ConfigError("no input file was given")
    check_files(inputs)
    return [path.stat().st_size for path in inputs]


def _tasks(
    inputs: Sequence[Path],
    sizes: Sequence[int],
    folder: PreparationFolder,
    shard_bytes: int,
    first_number: int,
    processes: int,
) -> list[Stretches]:
    """Everything that is not known to be done."""
    readers = math.ceil(processes / len(inputs))
    tasks = []
    for number, (path, size) in enumerate(zip(inputs, sizes, strict=True), start=first_number):
        if is_compressed(path):
            tasks += [Stretches(number, path, size, first, readers) for first in range(readers)]
        else:
            tasks += [
                Stretches(number, path, size, stretch, 1)
                for stretch in range(math.ceil(size / shard_bytes))
                if not folder.is_done(unit_name(number, stretch))
            ]
    return tasks


def _remaining_bytes(tasks: Sequence[Stretches], shard_bytes: int) -> float:
    """Bytes of input files that the tasks read, a file that several tasks read counted once."""
    return sum(
        task.size / task.step
        if is_compressed(task.path)
        else min(shard_bytes, task.size - task.first * shard_bytes)
        for task in tasks
    )


def _use_gigatoken(tokenizer: Tokenizer, inputs: Sequence[Path], backend: Backend) -> bool:
    if backend == "huggingface":
        return False
    reason = why_not_gigatoken(tokenizer, _sample(inputs))
    if reason and backend == "gigatoken":
        raise ConfigError(f"gigatoken cannot be used: it is {reason}")
    logger.info("tokenising with %s", f"Hugging Face (gigatoken: {reason})" if reason else "gigatoken")
    return reason is None


def _sample(inputs: Sequence[Path]) -> list[str]:
    """The first documents of the first file that has any, about `PROOF_BYTES` of text."""
    sample: list[str] = []
    size = 0
    for document in documents(inputs):
        if size > PROOF_BYTES:
            break
        sample.append(document.text)
        size += document.num_bytes
    return sample
