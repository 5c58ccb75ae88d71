"""Pages of the site that are made of other things: READMEs, the schema, commands, exit codes, pictures."""

from __future__ import annotations

import argparse
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pictures import draw_all
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parents[1]
PAGES = {
    "parts/checkpoint.md": "src/metalm/checkpoint/README.md",
    "parts/pipelines.md": "pipelines/README.md",
    "parts/tasks.md": "pipelines/tasks/README.md",
    "parts/metrics.md": "src/metalm/tasks/metrics/README.md",
    "parts/data.md": "src/metalm/data/README.md",
    "parts/kernels.md": "src/metalm/kernels/README.md",
    "parts/training.md": "src/metalm/training/README.md",
    "parts/monitor.md": "src/metalm/training/monitor/README.md",
    "parts/conversion.md": "src/metalm/conversion/README.md",
    "parts/deepspeed.md": "deepspeed_configs/README.md",
    "parts/slurm.md": "slurm/README.md",
    "parts/tools.md": "tools/README.md",
    "parts/tests.md": "tests/README.md",
    "parts/contributing.md": "CONTRIBUTING.md",
    "parts/changes.md": "CHANGELOG.md",
}
"""Where a file of the repository stands on the site."""
PICTURES = (".png", ".svg")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are made."""
    for page, source in PAGES.items():
        text, pictures = _with_links_of_the_site((ROOT / source).read_text(), source, page)
        files.append(File.generated(config, page, content=text))
        for place, path in pictures.items():
            files.append(File.generated(config, place, content=path.read_bytes()))
    files.append(File.generated(config, "reference/keys.md", content=describe_keys()))
    files.append(File.generated(config, "reference/commands.md", content=describe_commands()))
    files.append(File.generated(config, "reference/exit_codes.md", content=describe_exit_codes()))
    dashboard = (ROOT / "slurm/tensorboard.png").read_bytes()
    for name, content in (draw_all() | {"tensorboard.png": dashboard}).items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def _with_links_of_the_site(text: str, source: str, page: str) -> tuple[str, dict[str, Path]]:
    """A README whose relative links lead to pages of the site; and the pictures that it shows, by place.

    A link to what is no page is left as its text.
    """
    pages = {path: place for place, path in PAGES.items()}
    pictures: dict[str, Path] = {}

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        name, _, anchor = target.partition("#")
        if "://" in target or not name:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        if mark and path.endswith(PICTURES):
            place = f"parts/pictures/{posixpath.basename(path)}"
            pictures[place] = ROOT / path
            return f"![{words}](pictures/{posixpath.basename(path)})"
        place = pages.get(path) or pages.get(posixpath.join(path, "README.md"))
        if place is None:
            return words if words.startswith("`") else f"`{words}`"
        way = posixpath.relpath(place, posixpath.dirname(page))
        return f"[{words}]({way}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text), pictures


def describe_keys() -> str:
    """Every key of a pipeline: type, default, and what the schema says of it."""
    from metalm.config.schema import RunConfig

    lines = ["# Keys of a pipeline", "", _told(RunConfig), ""]
    seen: set[type[BaseModel]] = set()
    for path, section in _sections(RunConfig, "", seen):
        lines += [
            f"## `{path or 'top level'}`",
            "",
            _told(section),
            "",
            "| key | type | default | |",
            "|---|---|---|---|",
        ]
        documentation = _attribute_documentation(section)
        for name, field in section.model_fields.items():
            default = "**required**" if field.is_required() else f"`{_default(field)}`"
            kind = _kind(field.annotation)
            lines.append(f"| `{name}` | {kind} | {default} | {documentation.get(name, '')} |")
        lines.append("")
    return "\n".join(lines)


def _sections(
    section: type[BaseModel], path: str, seen: set[type[BaseModel]]
) -> Iterator[tuple[str, type[BaseModel]]]:
    if section in seen:
        return
    seen.add(section)
    yield path, section
    for name, field in section.model_fields.items():
        for child in _models(field.annotation):
            below = f"{path}.{name}" if path else name
            if "dict" in str(field.annotation):
                below += ".NAME"
            yield from _sections(child, below, seen)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def _told(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _default(field: Any) -> str:
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel) or value == {}:
        return "its own defaults" if isinstance(value, BaseModel) else "none"
    return "null" if value is None else str(value).replace("|", "\\|")


def _kind(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(
        r"typing\.|pathlib\.|metalm\.[\w.]+\.|Annotated\[|, (Field|AfterValidator|FieldInfo|None\)).*?\)\]?",
        "",
        text,
    )
    return "`" + text.replace("|", "or").replace("NoneType", "null").replace("None", "null")[:90] + "`"


def _attribute_documentation(section: type[BaseModel]) -> dict[str, str]:
    """What stands in a string below each field."""
    import ast
    import inspect
    import textwrap

    found: dict[str, str] = {}
    for ancestor in reversed(section.__mro__):
        if not (issubclass(ancestor, BaseModel) and ancestor.__module__.startswith("metalm.")):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[ast.unparse(field.target)] = " ".join(str(below.value.value).split()).replace(
                    "|", "\\|"
                )
    return found


def describe_commands() -> str:
    """What `--help` says of every command."""
    from metalm.commands.completion import complete_parser

    lines = [
        "# Commands",
        "",
        "What `--help` prints of each. `metalm completion bash` makes the shell complete them.",
        "",
    ]
    for words, parser in _leaves(complete_parser(), "metalm"):
        lines += [f"## {words}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def _leaves(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for action in below:
        for word, child in action.choices.items():
            yield from _leaves(child, f"{words} {word}")


def describe_exit_codes() -> str:
    """Which errors end with which code."""
    from metalm import errors

    codes = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MetaLMError)]
    lines = [
        "# Exit codes",
        "",
        " ".join((errors.__doc__ or "").split()),
        "",
        "| code | name | errors |",
        "|---|---|---|",
    ]
    for name, value in sorted(codes.items(), key=lambda item: item[1]):
        told = [
            f"`{c.__name__}`: {_told_class(c)}"
            for c in classes
            if c.exit_code == value and c is not errors.MetaLMError
        ]
        lines.append(f"| {value} | `{name}` | {'<br>'.join(told)} |")
    return "\n".join(lines)


def _told_class(error: type) -> str:
    return " ".join((error.__doc__ or "").split())
