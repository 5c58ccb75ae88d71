"""The schema of task files: what a dataset holds, how its examples are worded, how answers are scored.

A task is one YAML file without code. See pipelines/tasks/README.md for the form.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from metalm.config.load import validated
from metalm.config.plain_files import read_yaml
from metalm.config.section import PositiveInt, Section
from metalm.errors import ConfigError
from metalm.modalities import MEDIA
from metalm.project_files import find_file, project_root
from metalm.tasks.filters import NAMES

TASKS_FOLDER = "pipelines/tasks"
ANSWER, OPTIONS = "answer", "options"
"""What templates may name beside fields: the answer, or the option that is tried, and all options."""

IN_CONTEXT = "in-context"
"""The id of the wording for prompts, among those of templates."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Split = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Line = str | dict[str, str]
"""Text with `{field}` or `{field|filter}` in it, or `{image: field}`."""


class HeldOut(Section):
    """A split that its owner does not have, taken from another: its end, or records drawn from all of it."""

    of: Split
    last: PositiveInt | None = None
    drawn: PositiveInt | None = None
    """Where the owner's file is sorted, so that its end is of one kind."""

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if (self.last is None) == (self.drawn is None):
            raise ValueError("give last or drawn")
        return self


class DataSection(Section):
    """Where a task's records are, and what is kept of them."""

    folder: str
    """Below the folder of all tasks' data."""
    archive: str | None = None
    """A zip or tar file there, in which files are looked for that are not unpacked."""
    reader: str
    """Of the form that the owner's files have: see `tasks.readers.READERS`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the reader."""
    files: dict[Split, str | list[str]] = Field(min_length=1)
    """By split, paths in the folder or the archive; `*` stands for any part of a name."""
    fields: dict[Name, str] = Field(min_length=1)
    """By name, where a value is in a record, such as `question.choices.*.text`, and filters behind `|`. With
    `?` behind it, it may be missing, and is empty then."""
    media: dict[Name, str] = Field(default_factory=dict)
    """By name, the file of an image or clip, such as `val2014/COCO_val2014_{image_id|digits12}.jpg`."""
    drop: dict[Name, list[str]] = Field(default_factory=dict)
    """By field, values whose records are left out."""
    take: dict[Split, PositiveInt] = Field(default_factory=dict)
    """Records of a split that are used at most, drawn from all of it."""
    hold_out: dict[Split, HeldOut] = Field(default_factory=dict)

    @field_validator("fields")
    @classmethod
    def _are_fields(cls, fields: dict[str, str]) -> dict[str, str]:
        if reserved := fields.keys() & {ANSWER, OPTIONS}:
            raise ValueError(f"{', '.join(sorted(reserved))} cannot be the name of a field")
        return fields

    @model_validator(mode="after")
    def _splits_are_there(self) -> Self:
        for split, held_out in self.hold_out.items():
            if held_out.of not in self.files:
                raise ValueError(f"hold_out.{split}.of: there is no split {held_out.of}")
            if split in self.files:
                raise ValueError(f"hold_out.{split}: the files have that split")
        for split in self.take:
            if split not in self.splits:
                raise ValueError(f"take.{split}: there is no such split")
        for name in self.drop:
            if name not in self.fields:
                raise ValueError(f"drop.{name}: there is no such field")
        for name, pattern in self.media.items():
            if name in self.fields:
                raise ValueError(f"media.{name}: fields has that name, too")
            if unknown := [field for field, _ in placeholders(pattern) if field not in self.fields]:
                raise ValueError(f"media.{name}: fields has no {unknown[0]}")
        return self

    @property
    def splits(self) -> tuple[str, ...]:
        """All, those that are held out included."""
        return (*self.files, *self.hold_out)

    def files_of(self, split: str) -> list[str]:
        """Patterns of a split's files."""
        files = self.files[split]
        return [files] if isinstance(files, str) else files


class OwnOptions(Section):
    """Options that each record brings."""

    texts: Name | list[Name]
    """A field that is a list, or one field each."""
    keys: Name | list[str] | None = None
    """What the answer is one of: a field that is a list, or the keys themselves; default: 0, 1, ..."""


class Template(Section):
    """One wording of a task."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    use: tuple[Literal["finetuning", "instruction_tuning", "evaluation"], ...] = (
        "finetuning",
        "instruction_tuning",
        "evaluation",
    )
    span: tuple[Line, ...] = ()
    """Lines that an encoder reads."""
    spans: tuple[tuple[Line, ...], ...] = ()
    """Instead, lines of several spans, each encoded by itself."""
    plain: tuple[str, ...] = ()
    """Lines that the decoder reads itself."""
    target: str = "{answer}"
    """What is learnt and generated, and whose likelihood is taken."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.span and self.spans:
            raise ValueError("give span or spans")
        if not self.all_spans and not self.plain:
            raise ValueError("neither span nor plain is given")
        if not set(self.fields()) - {ANSWER, OPTIONS}:
            raise ValueError("names no field of the task, so that all examples would look the same")
        for line in (line for lines in self.all_spans for line in lines if isinstance(line, dict)):
            if len(line) != 1 or next(iter(line)) not in MEDIA:
                raise ValueError(f"{line}: give text, or one of {{{'|'.join(MEDIA)}: FIELD}}")
        return self

    @property
    def all_spans(self) -> tuple[tuple[Line, ...], ...]:
        """Lines of each span."""
        return (self.span,) if self.span else self.spans

    def read_lines(self) -> Iterator[Line]:
        """The lines of spans, then those that the decoder reads."""
        yield from (line for lines in self.all_spans for line in lines)
        yield from self.plain

    def fields(self) -> Iterator[str]:
        """The fields that it names, without filters."""
        for line in (*self.read_lines(), self.target):
            if isinstance(line, dict):
                yield from line.values()
            else:
                yield from (name for name, _ in placeholders(line))

    def filters(self) -> Iterator[str]:
        """The filters that it names."""
        for line in (*self.read_lines(), self.target):
            if isinstance(line, str):
                for _, filters in placeholders(line):
                    yield from filters


class InContext(Section):
    """How examples are worded and scored without finetuning, behind demonstrations or none."""

    span: tuple[Line, ...] = ()
    plain: tuple[str, ...] = ()
    target: str = "{answer}"
    shots_from: Split = "train"
    """The split that demonstrations are drawn from."""
    score: Literal["likelihood", "generation"] = "likelihood"
    normalise: Literal["none", "token", "byte", "answer_context"] = "none"
    """What an option's log-likelihood is divided by, its number of tokens or bytes; or from which that behind
    `plain` alone is taken (arXiv 2005.14165, section 2.4). Where the target does not hold the answer, it is
    the text behind the option that is scored."""

    @property
    def template(self) -> Template:
        """As one of the task's templates."""
        return Template(
            id=IN_CONTEXT, use=("evaluation",), span=self.span, plain=self.plain, target=self.target
        )

    @model_validator(mode="after")
    def _is_a_template(self) -> Self:
        _ = self.template
        return self


class Decode(Section):
    """How answers are generated."""

    method: Literal["greedy", "beam"] = "greedy"
    num_beams: PositiveInt = 4
    """With `beam`."""
    length_penalty: float = 0.6
    """With `beam`: log-likelihoods are divided by the length to the power of this."""
    max_new_tokens: PositiveInt = 32
    stop: tuple[str, ...] = ()
    """What ends an answer, and is no part of it: a reason that follows, or the next question."""

    def answer(self, generated: str) -> str:
        """What of generated text is the answer."""
        for stop in self.stop:
            generated = generated.partition(stop)[0]
        return generated.strip()


class TaskFile(Section):
    """One task."""

    task: Name
    version: PositiveInt = 1
    cluster: Name
    held_out_with: tuple[Name, ...] = ()
    """Clusters that are held out together with this one's, since they are too close to it."""
    data: DataSection
    options: Annotated[OwnOptions | dict[str, str] | None, Field(union_mode="left_to_right")] = None
    """By the value of `answer`, the text of each option; or where a record has them; None: free text."""
    answer: Name
    """The field with the answer: a key of the options, or a text or several."""
    references: Name | None = None
    """The field with all acceptable answers; default: those of `answer`."""
    train_on: Literal["first", "each"] = "first"
    """Of several answers: the first, or all, one example each."""
    if_empty: str | None = None
    """The answer where there is none; default: such records are left out."""
    group: Name | None = None
    """Records of one value of this field are one example of evaluation, with the answers of all."""
    drawn_together: Name | None = None
    """Records of one value of this field, such as their passage, depend on each other, so that the standard
    error draws them together; default: those of the same images and clips."""
    maps: dict[Name, dict[str, str]] = Field(default_factory=dict)
    """Filters of this task: what a value becomes."""
    templates: tuple[Template, ...] = Field(min_length=1)
    """The first is that of multitask finetuning."""
    icl: InContext | None = None
    decode: Decode = Decode()
    metrics: tuple[str, ...] = Field(min_length=1)
    evaluated_on: Split = "validation"

    @field_validator("options", mode="before")
    @classmethod
    def _are_of_one_kind(cls, options: Any) -> Any:
        """With `texts`, each record's own; else the same for all."""
        if not isinstance(options, dict):
            return options
        if "texts" in options:
            try:
                return validated(OwnOptions, options, "each record's own options")
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if unquoted := [one for pair in options.items() for one in pair if not isinstance(one, str)]:
            raise ValueError(f"{unquoted[0]!r} is no text; put keys and texts into quotes")
        return options

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if isinstance(self.options, dict) and len(self.options) < 2:
            raise ValueError("options: one option is no choice")
        known = self.data.fields.keys() | self.data.media.keys()
        named = {"answer": self.answer, "references": self.references, "group": self.group}
        named |= {"drawn_together": self.drawn_together}
        if isinstance(self.options, OwnOptions):
            texts, keys = self.options.texts, self.options.keys
            named |= {
                f"options.texts {name}": name for name in ([texts] if isinstance(texts, str) else texts)
            }
            named |= {"options.keys": keys if isinstance(keys, str) else None}
        for key, name in named.items():
            if name is not None and name not in known:
                raise ValueError(f"{key}: data.fields has no {name}")
        templates = (*self.templates, *([self.icl.template] if self.icl else []))
        if len({template.id for template in templates}) < len(templates):
            raise ValueError("templates: an id is given twice")
        for template in templates:
            allowed = known | {ANSWER} | ({OPTIONS} if self.options is not None else set())
            if unknown := [name for name in template.fields() if name not in allowed]:
                raise ValueError(
                    f"template {template.id} names {unknown[0]!r}; there are {', '.join(sorted(allowed))}"
                )
            self._check_filters(f"template {template.id}", template.filters())
        for name, place in self.data.fields.items():
            self._check_filters(f"data.fields.{name}", place.split("|")[1:])
        for name, pattern in self.data.media.items():
            for _, filters in placeholders(pattern):
                self._check_filters(f"data.media.{name}", filters)
        splits = {"evaluated_on": self.evaluated_on}
        splits |= {"icl.shots_from": self.icl.shots_from} if self.icl else {}
        for key, split in splits.items():
            if split not in self.data.splits:
                raise ValueError(f"{key}: there is no split {split}; there are {', '.join(self.data.splits)}")
        return self

    def _check_filters(self, where: str, filters: Iterable[str]) -> None:
        for name in filters:
            if name.strip() not in self.maps and name.strip() not in NAMES:
                known = ", ".join([*self.maps, *NAMES])
                raise ValueError(f"{where}: there is no filter {name.strip()!r}; there are {known}")

    def require_split(self, split: str) -> None:
        """
        Raises:
            ConfigError: there is no such split.
        """
        if split not in self.data.splits:
            raise ConfigError(f"{self.task} has no split {split}; it has {', '.join(self.data.splits)}")

    def templates_for(self, use: str) -> list[Template]:
        """Those of `finetuning`, `instruction_tuning` or `evaluation`."""
        return [template for template in self.templates if use in template.use]


def placeholders(line: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fields that a line names, each with its filters.

    Raises:
        ValueError: a brace stands alone, or something else than a name is in braces.
    """
    for _, name, form, conversion in string.Formatter().parse(line):
        if name is None:
            continue
        field, *filters = (word.strip() for word in name.split("|"))
        if form or conversion or not field.replace("_", "a").isalnum():
            raise ValueError(f"{line!r}: only {{field}} and {{field|filter}} may stand in braces")
        yield field, tuple(filters)


def find_tasks() -> dict[str, Path]:
    """The task files that come with MetaLM, by name."""
    return {path.stem: path for path in sorted((project_root() / TASKS_FOLDER).glob("*.yaml"))}


def load_tasks(names: Iterable[str | Path]) -> list[TaskFile]:
    """Task files of different names; see `load_task`.

    Raises:
        ConfigError: also where two have one name.
    """
    tasks: dict[str, TaskFile] = {}
    for name in names:
        task = load_task(name)
        if task.task in tasks:
            raise ConfigError(
                f"{name}: another of these tasks is called {task.task}; rename one by its key `task`"
            )
        tasks[task.task] = task
    return list(tasks.values())


def load_task(name: str | Path) -> TaskFile:
    """A task file, by its path or the name of one that comes with MetaLM.

    Raises:
        ConfigError: there is no such file, or it has mistakes.
    """
    known = find_tasks()
    path = known.get(str(name)) or find_file(Path(name), TASKS_FOLDER, Path(name))
    if not path.is_file():
        raise ConfigError(f"there is no task {name}; `metalm tasks list` shows those that come with MetaLM")
    content = read_yaml(path)
    content.pop("source", None)  # where the facts in it were read
    return validated(TaskFile, content, str(path))
