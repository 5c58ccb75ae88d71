"""The standard library as a corpus: documentation and source, split by module."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from metalm.data.demo.library_text import DOCUMENTATION, SOURCE, TextDocument, standard_library_documents
from metalm.errors import DataError

MODULE = '''
"""Module documentation."""

class Thing:
    """A thing."""

    def method(self, number: int = 3, *rest):
        """Does it.

        In two paragraphs.
        """

async def undocumented(): ...

def function(): "One line."
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of one package, with all that must be left out."""
    files = {
        "package/__init__.py": MODULE,
        "package/latin.py": "# -*- coding: latin-1 -*-\nname = 'é'\n",
        "package/broken.py": "def",
        "package/empty.py": "",
        "test/test_package.py": "1",
        "site-packages/other.py": "1",
        "pydoc_data/topics.py": "topics = {'break': 'The break statement'}\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="latin-1" if "latin" in name else "utf-8")
    return tmp_path


def test_a_library_gives_documentation_and_source(library: Path) -> None:
    documents = {
        (item.name, item.pile_set_name): item.text for item in standard_library_documents(10**6, library)
    }
    assert documents == {
        ("package", DOCUMENTATION): textwrap.dedent("""\
            package

            Module documentation.

            class Thing

            A thing.

            Thing.method(self, number: int=3, *rest)

            Does it.

            In two paragraphs.

            function()

            One line."""),
        ("package", SOURCE): MODULE,
        ("package.latin", SOURCE): "# -*- coding: latin-1 -*-\nname = 'é'\n",
        ("topic break", DOCUMENTATION): "The break statement",
    }


def test_the_running_library_is_cut_at_the_limit() -> None:
    documents = list(standard_library_documents(300_000))
    assert 200_000 < sum(len(item.text.encode()) for item in documents) <= 300_000
    assert documents == list(standard_library_documents(400_000))[: len(documents)]
    assert {item.pile_set_name for item in documents} == {DOCUMENTATION, SOURCE}
    assert all(ast.parse(item.text) for item in documents if item.pile_set_name == SOURCE)


def test_a_module_is_held_out_as_a_whole() -> None:
    names = [f"module{number}" for number in range(1000)]
    held_out = [TextDocument(name, DOCUMENTATION, "").is_held_out for name in names]
    assert held_out == [TextDocument(name, SOURCE, "other").is_held_out for name in names]
    assert 30 < sum(held_out) < 70


def test_a_library_without_source_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no source"):
        list(standard_library_documents(100, tmp_path))
