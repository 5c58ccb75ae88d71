"""Examples to shards: see `documents.example_members` for the form of a sample."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example
from metalm.data.documents.example_members import members_of
from metalm.data.preparation.folder import PreparationFolder
from metalm.data.preparation.shard_writer import ShardWriter
from metalm.data.preparation.tally import Place, Tally
from metalm.data.preparation.task_pool import Advance, run_tasks
from metalm.data.storage.shard_scan import EXAMPLES
from metalm.errors import BadSample
from metalm.modalities import MEDIA, Convert
from metalm.progress import Phase

SHARD_BYTES = 512 << 20
EXAMPLES_PER_MESSAGE = 64


class TaskExample(NamedTuple):
    """What a task gives."""

    share: float
    """Of the task, that is done."""
    example: Example | str | None
    """Or the cause of its absence; None: nothing stands there."""
    place: Place | None
    """Where it was; a `line` counts from the beginning of the task, 1. None: that is not known."""


class ExampleTask(Protocol):
    """A unit of work, which travels to a worker process."""

    @property
    def unit(self) -> str:
        """Name of its shards."""
        ...

    @property
    def source(self) -> str:
        """What its examples are counted under."""
        ...

    def examples(self) -> Iterator[TaskExample]:
        """Each example or the cause of its absence."""
        ...


@dataclass(frozen=True)
class ExamplePreparation:
    """What every worker process needs to know."""

    folder: PreparationFolder
    shard_bytes: int
    converts: Mapping[str, Convert]

    def __call__(self, task: ExampleTask, advance: Advance) -> None:
        """Writes the shards and the receipt of one task."""
        tally = Tally()
        reported = 0.0
        with ShardWriter(self.folder.path, task.unit, self.shard_bytes) as writer:
            for number, (share, example, place) in enumerate(task.examples()):
                if place is not None and "line" in place:
                    tally.num_lines = int(place["line"])
                if example is None:
                    continue
                try:
                    members = self._members(example, task.source, tally)
                    writer.write(f"{task.unit}-{number:06d}", members)
                except BadSample as bad:
                    tally.drop(bad.cause, place)
                if number % EXAMPLES_PER_MESSAGE == 0:
                    advance(share - reported)
                    reported = share
        self.folder.record(task.unit, writer.shards, tally)
        advance(1.0 - reported)

    def _members(self, example: Example | str, source: str, tally: Tally) -> dict[str, bytes]:
        if isinstance(example, str):
            raise BadSample(example)
        if not any(part.is_trained and part.content for part in example.parts):
            raise BadSample("no_answer")
        members = members_of(example, self.converts)
        answers = sum(part.is_trained for part in example.parts)
        media = sum(part.modality != TEXT for part in example.parts)
        tally.keep(source, examples=1, answers=answers, media=media, bytes=sum(map(len, members.values())))
        return members


def prepare_examples(
    tasks: Sequence[ExampleTask],
    out: Path,
    *,
    plan: Mapping[str, Any],
    converts: Mapping[str, Convert] | None = None,
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes shards of examples, their index and a report.

    Args:
        out: folder of the shards. If an earlier call was interrupted, the same call goes on.
        plan: what tells these examples from others; with another one, an interrupted call does not go on.
        converts: what checks images and clips and makes their members, by modality; default: they stay as
            they are, if they can be decoded.
        shard_bytes: largest size of a shard.
        processes: how many work at once; the output does not depend on it.

    Returns:
        The content of report.json: examples, answers, images and clips, bytes, and all that was dropped by
        cause.

    Raises:
        ConfigError: options that contradict the folder.
        DataError: an input cannot be read, or nothing was kept.
    """
    folder = PreparationFolder(out)
    with folder.claim({"kind": EXAMPLES, **plan, "shard_bytes": shard_bytes}):
        tasks = [task for task in tasks if not folder.is_done(task.unit)]
        if tasks:
            folder.drop_index()
            with Phase(f"preparing {out}", len(tasks), "batches") as phase:
                run_tasks(
                    tasks,
                    ExamplePreparation(folder, shard_bytes, converts or default_converts()),
                    processes=processes,
                    advance=phase.advance,
                    preload=__name__,
                )
        return folder.finish(kind=EXAMPLES, tokenizer_fingerprint=None, processes=processes)


@dataclass(frozen=True)
class _Given:
    """Examples that are made as they are written."""

    source: str
    given: Iterable[Example]
    unit: str = "0000-00000"

    def examples(self) -> Iterator[TaskExample]:
        return (TaskExample(0.0, example, {"example": number}) for number, example in enumerate(self.given))


def write_examples(
    examples: Iterable[Example],
    out: Path,
    *,
    plan: Mapping[str, Any],
    name: str = "examples",
    converts: Mapping[str, Convert] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes examples that are made on the way, in this process: see `prepare_examples`.

    An interrupted call begins again; one that had come to its end returns its report.

    Args:
        name: what they are counted under in the report.
    """
    return prepare_examples(
        [_Given(name, examples)], out, plan=plan, converts=converts, shard_bytes=shard_bytes
    )


def default_converts() -> dict[str, Convert]:
    """What the tools that prepare images and clips do without options, by modality."""
    converts = {}
    for name, media in MEDIA.items():
        parser = ArgumentParser()
        media.add_preparation_options(parser)
        converts[name] = media.convert(**media.preparation_settings(parser.parse_args([])))
    return converts
