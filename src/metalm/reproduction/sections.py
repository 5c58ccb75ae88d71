"""The report as sections, which are written as Markdown and as a page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left }
th { background: #f4f4f4 } img { max-width: 100% } code { background: #f4f4f4 }
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """An image beside the report."""

    path: Path
    about: str


Block = str | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and pictures."""

    heading: str
    blocks: tuple[Block, ...]


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown; pictures are beside it."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.heading}"]
        for block in section.blocks:
            lines += ["", *_markdown(block)]
    return "\n".join(lines) + "\n"


def as_page(title: str, sections: Sequence[Section]) -> str:
    """The report as one page that holds its pictures."""
    written = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    written += [f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"]
    for section in sections:
        written.append(f"<h2>{html.escape(section.heading)}</h2>")
        written += [_element(block) for block in section.blocks]
    return "\n".join([*written, "</html>"]) + "\n"


def markdown_table(table: Table) -> Iterator[str]:
    """Its lines."""
    for row in (table.header, ("---",) * len(table.header), *table.rows):
        yield "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |"


def _markdown(block: Block) -> Iterator[str]:
    if isinstance(block, Table):
        yield from markdown_table(block)
    elif isinstance(block, Picture):
        yield f"![{block.about}]({block.path.name})"
    else:
        yield block


def _element(block: Block) -> str:
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows
        )
        return f"<table><tr>{head}</tr>{rows}</table>"
    if isinstance(block, Picture):
        content = base64.b64encode(block.path.read_bytes()).decode()
        return (
            f'<p><img src="data:image/png;base64,{content}" alt="{html.escape(block.about, quote=True)}"></p>'
        )
    return f"<p>{html.escape(block)}</p>"
