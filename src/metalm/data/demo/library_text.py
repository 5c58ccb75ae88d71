"""The standard library of the running Python as a text corpus: its source, and its documentation.

Nothing is imported: signatures and docstrings are read from the syntax tree. A module's source and its
documentation always fall into the same split, or held-out text would have been seen as a docstring.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metalm.errors import DataError

DOCUMENTATION = "Python Documentation"
SOURCE = "Python Source"
HELD_OUT_PERCENT = 5
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
"""Not of the library itself, tests, or tables of numbers."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class TextDocument:
    """One document; `pile_set_name` is its subset, `name` the module or topic it is about."""

    name: str
    pile_set_name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the document belongs to the held-out split; a function of its name alone."""
        return _hash(self.name) % 100 < HELD_OUT_PERCENT


def standard_library_documents(max_bytes: int, library: Path | None = None) -> Iterator[TextDocument]:
    """Documents of up to `max_bytes` of UTF-8 in all, in an order that mixes the packages.

    Args:
        max_bytes: where to stop; a smaller limit gives a prefix of what a larger one gives.
        library: the folder of the standard library; default: the running Python's.

    Raises:
        DataError: the library has no readable source (for example because it is in a zip file).
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    topics = _help_topics(library / "pydoc_data" / "topics.py")
    names: dict[str, Path | str] = {_module_name(library, file): file for file in _source_files(library)}
    if not names:
        raise DataError(
            f"found no source of the standard library in {library}: install Python with its source"
        )
    names |= {f"topic {topic}": text for topic, text in topics.items()}
    size = 0
    for name in sorted(names, key=_hash):
        origin = names[name]
        if isinstance(origin, str):
            documents = [TextDocument(name, DOCUMENTATION, origin)]
        else:
            documents = _module_documents(name, origin)
        for document in documents:
            size += len(document.text.encode())
            if size > max_bytes:
                return
            yield document


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _source_files(library: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _module_name(library: Path, file: Path) -> str:
    return ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")


def _help_topics(file: Path) -> dict[str, str]:
    """The texts of `help("topic")`, which ship as one dictionary literal."""
    if not file.is_file():
        return {}
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return dict(ast.literal_eval(statement.value))
    return {}


def _module_documents(name: str, file: Path) -> list[TextDocument]:
    """Source and documentation of one module; a file that is not valid Python or UTF-8 has none."""
    try:
        with tokenize.open(file) as stream:
            source = stream.read()
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documentation = "\n\n".join(_documentation(tree, name))
    documents = [TextDocument(name, DOCUMENTATION, documentation)] if documentation else []
    return [*documents, TextDocument(name, SOURCE, source)] if source.strip() else documents


def _documentation(node: ast.Module | Definition, title: str) -> Iterator[str]:
    """A heading and a docstring for `node` and for every class and function inside of it."""
    if docstring := ast.get_docstring(node):
        yield f"{title}\n\n{docstring}"
    prefix = "" if isinstance(node, ast.Module) else f"{node.name}."
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documentation(child, f"class {prefix}{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documentation(child, f"{prefix}{child.name}({ast.unparse(child.args)})")
