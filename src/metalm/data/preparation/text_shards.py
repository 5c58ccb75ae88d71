"""Raw text to token shards.

The unit of work is a stretch of one input file: of lines those that begin in [k * n, (k + 1) * n) of its
decompressed content; see `text_files` for other forms. It becomes one shard, or more if it outgrows the
target size. What a stretch holds depends on neither processes nor restarts, and a document's key is its place
in the input.

Most files are entered at any stretch. A compressed one is read from its beginning: if there are more
processes than files, several read the same file and each prepares every n-th stretch, for decompression
costs far less than tokenising.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from metalm.data.preparation.fast_bpe import gigatoken_encoder, why_not_gigatoken
from metalm.data.preparation.folder import CONTENTS, PreparationFolder, digest_of
from metalm.data.preparation.shard_writer import ShardWriter
from metalm.data.preparation.tally import Place, Tally
from metalm.data.preparation.task_pool import Advance, run_tasks
from metalm.data.preparation.text_document import PILE_FIELDS, Document, TextFields, TextRecord
from metalm.data.preparation.text_files import (
    TextFile,
    documents,
    open_text_files,
    paths_of,
    tokenizer_digest,
)
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import BadSample, ConfigError
from metalm.progress import Phase

PAPER_DROPS = ("Github", "ArXiv", "PubMed Central")
"""Subsets of the Pile that the paper leaves out."""
BATCH_BYTES = 1 << 20
"""Text that is tokenised at once."""
PROOF_BYTES = 1 << 18
"""Text on which gigatoken must agree with Hugging Face before it is used."""

Store = Literal["ids", "text", "both"]
Backend = Literal["auto", "gigatoken", "huggingface"]


class Numbered(NamedTuple):
    """A document with what its sample is named by, and its place in the file."""

    key: int
    place: Place
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
    """A task: stretches `first`, `first + step`, ... of a stream; of another file only the first."""

    file_number: int
    file: TextFile
    first: int
    step: int
    amount: float
    """Of the file's bytes, for progress."""


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
        reported = 0.0
        for stretch, records in task.file.stretches(self.shard_bytes, task.first):
            unit = unit_name(task.file_number, stretch)
            if (stretch - task.first) % task.step == 0 and not self.folder.is_done(unit):
                for share in self._prepare(unit, task, records):
                    advance((share - reported) * task.amount)
                    reported = share
        advance((1.0 - reported) * task.amount)

    def _prepare(self, unit: str, task: Stretches, records: Iterable[TextRecord]) -> Iterator[float]:
        """Writes the shards and the receipt of one stretch; yields the share read after each batch."""
        tokenizer = self._load_tokenizer()
        tally = Tally()
        with ShardWriter(self.folder.path, unit, self.shard_bytes) as writer:
            for share, batch in self._batches(records, task.file.path, tally):
                for key, members in self._samples(batch, tokenizer, task.file.path, tally):
                    writer.write(f"{task.file_number:04d}-{key:013d}", members)
                yield share
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
        self, records: Iterable[TextRecord], path: Path, tally: Tally
    ) -> Iterator[tuple[float, Batch]]:
        """The documents to keep in batches of about `BATCH_BYTES`, each with the share read."""
        batch: Batch = []
        size = 0
        share = 0.0
        for key, place, document, share in records:
            tally.num_lines += "line" in place
            if document is None:
                continue
            if isinstance(document, str):
                tally.drop(document, _in_file(path, place))
            elif not self.subsets.accepts(document.subset):
                tally.drop(f"subset {document.subset}")
            else:
                batch.append(Numbered(key, place, document))
                size += document.num_bytes
            if size >= BATCH_BYTES:
                yield share, batch
                batch, size = [], 0
        yield share, batch

    def _samples(
        self, batch: Batch, tokenizer: Tokenizer | None, path: Path, tally: Tally
    ) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The members of each document's sample, with its key; counts what is kept."""
        encoded: Sequence[np.ndarray | None] = [None] * len(batch)
        if tokenizer is not None:
            encoded = _encode([numbered.document.text for numbered in batch], tokenizer)
        for (key, place, document), ids in zip(batch, encoded, strict=True):
            members: dict[str, bytes] = {}
            amounts = {"documents": 1, "bytes": document.num_bytes}
            if tokenizer is not None:
                if ids is None:
                    tally.drop("untokenizable", _in_file(path, place))
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
            yield key, members


def _in_file(path: Path, place: Place) -> Place:
    return {"file": path.name, **place}


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
    fields: TextFields = PILE_FIELDS,
    from_tokenizer: Path | None = None,
    subsets: SubsetFilter = SubsetFilter(),
    store: Store = "ids",
    meta: bool = False,
    shard_bytes: int = 256 << 20,
    first_number: int = 0,
    processes: int = 1,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """Writes token shards, their index and a report of files of text.

    Args:
        inputs: files in a form of `text_files`, in the order that shards are numbered by.
        out: folder of the shards. If an earlier call was interrupted, the same call goes on.
        tokenizer_path: folder or tokenizer.json; None only with `store="text"`.
        fields: where records have their text and the name of their subset.
        from_tokenizer: folder or tokenizer.json, of the ids in Megatron's token datasets.
        subsets: which documents are kept, by the names of their subsets.
        store: token ids, text, or both members per document.
        meta: add a .json member with the document's subset.
        shard_bytes: raw text per stretch, and the largest size of a shard.
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
    files = open_text_files(inputs, fields, from_tokenizer)
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    folder = PreparationFolder(out)
    plan: dict[str, Any] = {
        "kind": "text",
        "inputs": [[file.path.name, file.size] for file in files],
        CONTENTS: [digest_of(path) for path in paths_of(files)],
        "tokenizer": tokenizer and tokenizer.fingerprint,
        "keep": sorted(subsets.keep),
        "drop": sorted(subsets.drop),
        "store": store,
        "meta": meta,
        "shard_bytes": shard_bytes,
        "first_number": first_number,
    }
    if fields != PILE_FIELDS:
        plan["fields"] = asdict(fields)
    if (digest := tokenizer_digest(files)) is not None:
        plan["from_tokenizer"] = digest
    with Phase("comparing tokenizers"):
        gigatoken = tokenizer is not None and _use_gigatoken(tokenizer, files, backend)
    preparation = TextPreparation(
        folder, shard_bytes, store, meta, subsets, tokenizer_path if tokenizer else None, gigatoken
    )
    with folder.claim(plan):
        tasks = _tasks(files, folder, shard_bytes, first_number, processes)
        if tasks and not folder.is_finished():
            folder.drop_index()
            with Phase(f"preparing {out}", sum(task.amount for task in tasks), "MB", 1e6) as phase:
                run_tasks(tasks, preparation, processes=processes, advance=phase.advance, preload=__name__)
        return folder.finish(
            kind="text",
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
            processes=processes,
        )


def _tasks(
    files: Sequence[TextFile],
    folder: PreparationFolder,
    shard_bytes: int,
    first_number: int,
    processes: int,
) -> list[Stretches]:
    """Everything that is not known to be done."""
    readers = math.ceil(processes / len(files))
    tasks = []
    for number, file in enumerate(files, start=first_number):
        if file.is_stream:
            # Several readers of a file count as one.
            amount = file.size / readers
            tasks += [Stretches(number, file, first, readers, amount) for first in range(readers)]
        else:
            count = file.num_stretches(shard_bytes)
            tasks += [
                Stretches(number, file, stretch, 1, file.size / count)
                for stretch in range(count)
                if not folder.is_done(unit_name(number, stretch))
            ]
    return tasks


def _use_gigatoken(tokenizer: Tokenizer, files: Sequence[TextFile], backend: Backend) -> bool:
    if backend == "huggingface":
        return False
    reason = why_not_gigatoken(tokenizer, _sample(files))
    if reason and backend == "gigatoken":
        raise ConfigError(f"gigatoken cannot be used: it is {reason}")
    logger.info("tokenising with %s", f"Hugging Face (gigatoken: {reason})" if reason else "gigatoken")
    return reason is None


def _sample(files: Sequence[TextFile]) -> list[str]:
    """The first documents of the first file that has any, about `PROOF_BYTES` of text."""
    sample: list[str] = []
    size = 0
    for document in documents(files):
        if size > PROOF_BYTES:
            break
        sample.append(document.text)
        size += document.num_bytes
    return sample
