"""The templates of FLAN and promptsource, from a user's checkout into a task file.

Both are read as text, and nothing in them is run: FLAN's `flan/templates.py` for the literals it assigns,
promptsource's `templates.yaml` with its tags as plain mappings. Of Jinja, `{{name}}`, `{{"text"}}`,
`{{answer_choices[name]}}` and `|||` are understood, and `{% if name != -1 %}` around what needs a label,
which all records have; a template with anything else is refused.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from metalm.config.load import validated
from metalm.errors import ConfigError, DataError
from metalm.tasks.task_file import ANSWER, OPTIONS, TaskFile

_FLAN_OPTIONS = "options_"
_CHOICES, _SEPARATOR = "answer_choices", "|||"
_JINJA = re.compile(r"({{.*?}}|{%.*?%}|{#.*?#})", re.DOTALL)
_GUARD = re.compile(r"{%-?\s*if\s+\w+\s*!=\s*-1\s*-?%}((?:(?!{%).)*){%-?\s*endif\s*-?%}", re.DOTALL)
_QUOTED = re.compile(r"""(["'])([^"'\\]*)\1""")
_CHOSEN = re.compile(rf"{_CHOICES}\s*\[\s*(\w+)\s*\]")


class Slot(NamedTuple):
    """A place in a text for the value of a name; of an index of `answer_choices`, if it is one."""

    name: str
    is_choice: bool = False


Text = tuple[str | Slot, ...]


class _Refusal(ValueError):
    """A template is outside of what is understood."""


@dataclass(frozen=True)
class Wording:
    """A template of another project."""

    id: str
    prompt: Text = ()
    target: Text = ()
    choices: tuple[str, ...] | None = None
    """Its own words for the answers, in the order of their labels."""
    plain: tuple[str, ...] = ()
    """Lines that its project has behind every prompt."""
    refused: str = ""
    """Why it is not understood."""


@dataclass
class Imported:
    """A task file with other templates."""

    content: dict[str, Any]
    refused: dict[str, str] = field(default_factory=dict)
    """By the template's id, why it was left out."""


def read_flan(path: Path, group: str) -> list[Wording]:
    """A group of FLAN's templates, pairs of an input and a target.

    Raises:
        ConfigError: there is no such group.
        DataError: the file is no Python, or assigns no such groups.
    """
    groups: dict[str, Any] = {}
    try:
        for statement in ast.parse(_text(path)).body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Dict):
                groups |= ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"{path} is not read: it is not made of literals only ({error})") from None
    if group not in groups:
        raise ConfigError(f"{path} has no group {group!r}; it has {', '.join(map(str, groups)) or 'none'}")
    wordings = []
    for number, pair in enumerate(groups[group], start=1):
        name = f"flan-{number}"
        try:
            prompt, target = pair
            wordings.append(Wording(name, _braces(prompt), _braces(target), plain=("TARGET:",)))
        except (ValueError, TypeError) as error:
            wordings.append(Wording(name, refused=str(error)))
    return wordings


def read_promptsource(path: Path) -> list[Wording]:
    """All templates of a file of promptsource.

    Raises:
        DataError: it is not of that form.
    """
    try:
        content = yaml.load(_text(path), _TaggedLoader)
        templates = list(content["templates"].values())
        names = [str(template["name"]) for template in templates]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not promptsource's {{templates: ...}}: {error}") from None
    wordings: list[Wording] = []
    for name, template in zip(_ids(names), templates, strict=True):
        try:
            prompt, *rest = _GUARD.sub(r"\1", str(template["jinja"])).split(_SEPARATOR)
            if len(rest) != 1:
                raise _Refusal(f"it has {len(rest)} {_SEPARATOR} instead of one")
            choices = _choices(template.get(_CHOICES))
            wordings.append(Wording(name, _jinja(prompt), _jinja(rest[0]), choices))
        except (_Refusal, KeyError) as error:
            wordings.append(Wording(name, refused=str(error)))
    return wordings


def into_task(
    content: Mapping[str, Any],
    wordings: Sequence[Wording],
    *,
    renamed: Mapping[str, str],
    labels: Sequence[str],
    origin: str,
) -> Imported:
    """A task file with these templates instead of its own.

    One whose target is more or less than the answer, or that has words of its own for it, is for training on
    instructions alone: evaluation knows the task's words. If all are so, the task's first stays in front.

    Args:
        content: of the task file.
        renamed: by a name in the templates, the task's field, perhaps with filters behind it, `answer` or
            `options`.
        labels: keys of the task's options in the order of the templates' `answer_choices`.
        origin: what messages call the result.

    Raises:
        ConfigError: no template can be taken, or the task file is wrong.
    """
    content = {key: value for key, value in content.items() if key != "source"}
    task = validated(TaskFile, content, origin)
    made = Imported({**content, "maps": dict(content.get("maps") or {}), "templates": []})
    for wording in wordings:
        try:
            if wording.refused:
                raise _Refusal(wording.refused)
            made.content["templates"].append(_template(task, wording, renamed, labels, made.content["maps"]))
        except _Refusal as refusal:
            made.refused[wording.id] = str(refusal)
    if not made.content["templates"]:
        raise ConfigError(
            "\n  ".join(
                [f"{origin}: none of the templates can be taken", *map(": ".join, made.refused.items())]
            )
        )
    if all("use" in template for template in made.content["templates"]):
        made.content["templates"].insert(0, content["templates"][0])
    validated(TaskFile, made.content, origin)
    return made


def _template(
    task: TaskFile,
    wording: Wording,
    renamed: Mapping[str, str],
    labels: Sequence[str],
    maps: dict[str, dict[str, str]],
) -> dict[str, Any]:
    answer = f"{{{ANSWER}}}"
    if any(isinstance(one, Slot) and one.is_choice for one in (*wording.prompt, *wording.target)):
        own_words = _own_words(task, wording, labels)
        if own_words:
            name = f"words_of_{wording.id}".replace("-", "_")
            maps[name] = own_words
            answer = f"{{{ANSWER}|{name}}}"
    prompt = "".join(_written(task, wording.prompt, renamed, answer))
    target = "".join(_written(task, wording.target, renamed, answer)).strip()
    made: dict[str, Any] = {"id": wording.id}
    if target != f"{{{ANSWER}}}":
        made["use"] = ["instruction_tuning"]
    made["span"] = [line for line in map(str.strip, prompt.splitlines()) if line]
    if wording.plain:
        made["plain"] = list(wording.plain)
    return {**made, "target": f" {target}"}


def _written(task: TaskFile, text: Text, renamed: Mapping[str, str], answer: str) -> Iterator[str]:
    """Pieces of a text as task files write them."""
    known = [*task.data.fields, ANSWER, *([OPTIONS] if task.options is not None else [])]
    for piece in text:
        if isinstance(piece, str):
            yield piece.replace("{", "{{").replace("}", "}}")
            continue
        name = renamed.get(piece.name, OPTIONS if piece.name == _FLAN_OPTIONS else piece.name)
        if piece.is_choice:
            if name not in (task.answer, ANSWER):
                raise _Refusal(f"it chooses by {piece.name}, and the answer of {task.task} is {task.answer}")
            yield answer
        elif name.partition("|")[0].strip() not in known:
            raise _Refusal(f"it names {piece.name}, and {task.task} has {', '.join(known)}: rename it")
        elif name == OPTIONS:
            yield f"\n{OPTIONS.upper()}:\n{{{OPTIONS}}}\n"
        else:
            yield f"{{{name}}}"


def _own_words(task: TaskFile, wording: Wording, labels: Sequence[str]) -> dict[str, str]:
    """By the task's text of each option, that of the template; nothing if they are the same."""
    if not isinstance(task.options, dict):
        if task.options is None or wording.choices is not None:
            raise _Refusal(f"its {_CHOICES} do not suit the options of {task.task}")
        return {}
    if wording.choices is None or len(wording.choices) != len(labels) or set(labels) != set(task.options):
        raise _Refusal(
            f"its {_CHOICES} are {', '.join(wording.choices or ()) or 'computed'}: give labels, the keys "
            f"{', '.join(task.options)} in their order"
        )
    words = {task.options[key]: text for key, text in zip(labels, wording.choices, strict=True)}
    return {} if all(key == text for key, text in words.items()) else words


def _braces(text: Any) -> Text:
    """A text with `{name}` in it."""
    pieces: list[str | Slot] = []
    for before, name, form, conversion in string.Formatter().parse(text):
        pieces.append(before)
        if name is not None:
            if form or conversion or not name.isidentifier():
                raise _Refusal(f"{{{name}}} is not the name of a value alone")
            pieces.append(Slot(name))
    return tuple(pieces)


def _jinja(text: str) -> Text:
    pieces: list[str | Slot] = []
    for piece in _JINJA.split(text):
        if not _JINJA.fullmatch(piece):
            if "{{" in piece or "{%" in piece:
                raise _Refusal(f"{' '.join(piece.split())[:80]!r} has braces that are not closed")
            pieces.append(piece)
            continue
        inside = piece[2:-2].strip()
        chosen = _CHOSEN.fullmatch(inside)
        if piece.startswith("{{") and chosen:
            pieces.append(Slot(chosen.group(1), is_choice=True))
        elif piece.startswith("{{") and inside.isidentifier() and inside != _CHOICES:
            pieces.append(Slot(inside))
        elif piece.startswith("{{") and (quoted := _QUOTED.fullmatch(inside)):
            pieces.append(quoted.group(2))
        else:
            raise _Refusal(
                f"{' '.join(piece.split())} is outside of {{{{name}}}} and {{{{{_CHOICES}[name]}}}}"
            )
    return tuple(pieces)


def _choices(given: Any) -> tuple[str, ...] | None:
    """A list, or a text with `|||` between; None: there are none, or Jinja computes them."""
    if isinstance(given, str):
        given = given.split(_SEPARATOR) if not _JINJA.search(given) else None
    return None if given is None else tuple(str(one).strip() for one in given)


def _ids(names: Sequence[str]) -> Iterator[str]:
    """Ids of templates from their names, each once."""
    counts: dict[str, int] = {}
    for name in names:
        made = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "template"
        counts[made] = counts.get(made, 0) + 1
        yield made if counts[made] == 1 else f"{made}-{counts[made]}"


class _TaggedLoader(yaml.SafeLoader):
    """A safe loader to which promptsource's tags are plain mappings."""


def _as_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_TaggedLoader.add_constructor("!Template", _as_mapping)
_TaggedLoader.add_constructor("!TemplateMetadata", _as_mapping)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
