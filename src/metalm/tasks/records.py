"""The records of a task: its fields, options and answers, and what was left out, counted by cause."""

from __future__ import annotations

import random
import string
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metalm.errors import ConfigError, DataError
from metalm.tasks.data_files import DataFiles
from metalm.tasks.filters import apply, as_text
from metalm.tasks.places import NOTHING, values_at
from metalm.tasks.readers import BadRecord, MediaFile, Record, read_records
from metalm.tasks.task_file import OwnOptions, TaskFile, placeholders


@dataclass(frozen=True)
class TaskRecord:
    """One record, ready to be worded."""

    key: str
    """Split and number, the same whatever else is read."""
    fields: Mapping[str, Any]
    """Values of the task's fields, and `MediaFile` for its images and clips."""
    options: tuple[str, ...]
    """Texts; none: the answer is free."""
    answers: tuple[str, ...]
    """What may be learnt; with options the right one alone."""
    references: tuple[str, ...]
    """All answers that count as right."""
    group: str = ""
    drawn_together: str = ""
    """What records that depend on each other have in common; none: the record stands alone."""


@dataclass
class Tally:
    """What became of records, and of the examples made of them."""

    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """By cause, where the records are that were left out."""
    held_out: int = 0
    """Those that are in another split."""

    def drop(self, bad: BadRecord) -> None:
        """Count a record that is left out."""
        self.dropped.setdefault(bad.cause, []).append(bad.place)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.kept:,} kept"
        if self.held_out:
            yield f"{self.held_out:,} held out for other splits"
        for cause, places in sorted(self.dropped.items()):
            yield f"{len(places):,} left out: {cause.replace('_', ' ')} (the first: {places[0]})"


class TaskData:
    """The records of a task, split by split."""

    def __init__(self, task: TaskFile, root: Path, *, seed: int = 0) -> None:
        """
        Args:
            root: the folder of all tasks' data.
            seed: of the records that `take` draws.

        Raises:
            DataError: the task's folder is not there.
        """
        self.task, self._seed = task, seed
        self.files = DataFiles(root / task.data.folder, task.data.archive)

    def records(self, split: str, tally: Tally | None = None, *, most: int | None = None) -> list[TaskRecord]:
        """The records of a split, in their order; at most `take` of them, drawn from all.

        Args:
            tally: counts them, and what is left out.
            most: so many instead of `take`.

        Raises:
            ConfigError: there is no such split, or the files lack a column.
            DataError: a file is missing or damaged, or no record can be used.
        """
        self.task.require_split(split)
        data = self.task.data
        tally = Tally() if tally is None else tally
        limit = data.take.get(split) if most is None else most
        seed = f"{self._seed} {self.task.task} {split}"
        kept = _drawn(self._usable(split, tally), limit, seed)
        if not kept:
            raise DataError(
                "\n  ".join([f"{self.task.task}: no record of {split} can be used", *tally.lines()])
            )
        tally.kept += len(kept)
        return kept

    def digests(self, split: str) -> dict[str, str]:
        """Of the files of a split, as `DataFiles.digests`: other data have others.

        Raises:
            ConfigError: there is no such split.
            DataError: a file is missing, or cannot be read.
        """
        self.task.require_split(split)
        data = self.task.data
        return self.files.digests(data.files_of(data.hold_out[split].of if split in data.hold_out else split))

    def _usable(self, split: str, tally: Tally) -> Iterator[TaskRecord]:
        data = self.task.data
        if split in data.hold_out:
            yield from self._held_out(split, tally)
            return
        elsewhere = {
            record.key
            for name, one in data.hold_out.items()
            if one.of == split
            for record in self._held_out(name, Tally())
        }
        tally.held_out += len(elsewhere)
        yield from (record for record in self._of_file(split, tally) if record.key not in elsewhere)

    def _held_out(self, split: str, tally: Tally) -> Iterable[TaskRecord]:
        """What those before it, held out of the same split, have left for it."""
        every = self.task.data.hold_out
        held_out = every[split]
        before = [name for name in list(every)[: list(every).index(split)] if every[name].of == held_out.of]
        taken = {record.key for name in before for record in self._held_out(name, Tally())}
        records = (record for record in self._of_file(held_out.of, tally) if record.key not in taken)
        if held_out.last is not None:
            return deque(records, held_out.last)
        return _drawn(records, held_out.drawn, f"{self.task.task} {split}")  # the same whatever the seed

    def _of_file(self, split: str, tally: Tally) -> Iterator[TaskRecord]:
        is_first = True
        for number, content in enumerate(read_records(self.task.data, self.files, split)):
            key = f"{split}:{number}"
            try:
                made = content if isinstance(content, BadRecord) else self._make(content, key, is_first)
                is_first &= made is content
            except RecursionError:
                made = BadRecord("nested_too_deep", key)
            if isinstance(made, BadRecord):
                tally.drop(made)
            else:
                yield made

    def _make(self, content: Record, key: str, is_first: bool) -> TaskRecord | BadRecord:
        task = self.task
        fields: dict[str, Any] = {}
        for name, place in task.data.fields.items():
            where, *filters = place.split("|")
            where, optional = where.strip().removesuffix("?"), where.strip().endswith("?")
            value = values_at(content, where)
            if value is None and not optional and name not in (task.answer, task.references):
                return BadRecord(f"no_{name}", key)
            if value is NOTHING and not optional:
                if is_first:
                    raise ConfigError(
                        f"{task.task}: the data have no {where!r} (field {name}); they have "
                        f"{', '.join(map(str, content))}"
                    )
                return BadRecord(f"no_{name}", key)
            try:
                fields[name] = apply(filters, "" if value is NOTHING else value, task.maps)
            except (LookupError, ValueError, TypeError):
                return BadRecord(f"unusable_{name}", key)
            if not _is_unicode(fields[name]):
                return BadRecord("not_unicode", key)
        try:
            return self._with_answers(fields, key)
        except (LookupError, ValueError) as error:
            return BadRecord("unusable_value", f"{key}: {error}")

    def _with_answers(self, fields: dict[str, Any], key: str) -> TaskRecord | BadRecord:
        """
        Raises:
            LookupError, ValueError: a value is no text, or does not suit a filter or the options.
        """
        task = self.task
        for name, values in task.data.drop.items():
            if (value := as_text(fields[name])) in values:
                return BadRecord(f"unwanted_{name}", f"{key}, {value!r}")
        for name, pattern in task.data.media.items():
            fields[name] = MediaFile(self.files, filled_in(pattern, fields, task.maps))
        answer = fields[task.answer]
        group = as_text(fields[task.group]) if task.group else ""
        if task.drawn_together is not None:
            together = as_text(fields[task.drawn_together])
        else:
            together = " ".join(fields[name].name for name in task.data.media)
        if task.options is not None:
            options = _options(task.options, fields)
            if len(options) < 2:
                return BadRecord("fewer_than_two_options", key)
            if (text := options.get(as_text(answer))) is None:
                return BadRecord(f"unknown_{task.answer}", f"{key}, {as_text(answer)!r}")
            return TaskRecord(key, fields, tuple(options.values()), (text,), (text,), group, together)
        answers = _texts(answer)
        if not answers and task.if_empty is not None:
            answers = (task.if_empty,)
        if not answers:
            return BadRecord(f"empty_{task.answer}", key)
        references = _texts(fields[task.references]) if task.references else ()
        return TaskRecord(key, fields, (), answers, references or answers, group, together)


def filled_in(line: str, fields: Mapping[str, Any], maps: Mapping[str, Mapping[str, str]]) -> str:
    """A line of a template with the values of its fields.

    Raises:
        LookupError, ValueError: a value does not suit a filter.
    """
    filled = []
    for text, name, _, _ in string.Formatter().parse(line):
        filled.append(text)
        if name is not None:
            (named,) = placeholders("{" + name + "}")
            filled.append(as_text(apply(named[1], fields[named[0]], maps)))
    return "".join(filled)


def _options(options: Mapping[str, str] | OwnOptions, fields: Mapping[str, Any]) -> dict[str, str]:
    """The text of each option by its key, without empty ones.

    Raises:
        ValueError: keys and texts are not as many.
    """
    if not isinstance(options, OwnOptions):
        return dict(options)
    texts = _stripped(
        fields[options.texts] if isinstance(options.texts, str) else [fields[n] for n in options.texts]
    )
    if options.keys is None:
        keys = [str(number) for number in range(len(texts))]
    else:
        keys = _stripped(fields[options.keys]) if isinstance(options.keys, str) else options.keys
    if len(keys) != len(texts):
        raise ValueError(f"{len(texts)} options, and {len(keys)} keys for them")
    return {key: text for key, text in zip(keys, texts, strict=True) if text}


def _is_unicode(value: Any) -> bool:
    """Whether all text in a value is: JSON can hold half a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    if isinstance(value, (list, dict)):
        return all(map(_is_unicode, value if isinstance(value, list) else (*value, *value.values())))
    return True


def _texts(value: Any) -> tuple[str, ...]:
    """One text or several, without empty ones."""
    return tuple(filter(None, _stripped(value)))


def _stripped(value: Any) -> list[str]:
    return [as_text(one).strip() for one in (value if isinstance(value, list) else [value])]


def _drawn(records: Iterator[TaskRecord], count: int | None, seed: str) -> list[TaskRecord]:
    """All, or `count` of them, each with the same probability, in their order (Vitter's algorithm R)."""
    if count is None:
        return list(records)
    draw = random.Random(seed)
    kept: list[tuple[int, TaskRecord]] = []
    for number, record in enumerate(records):
        if number < count:
            kept.append((number, record))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = (number, record)
    return [record for _, record in sorted(kept, key=lambda one: one[0])]
