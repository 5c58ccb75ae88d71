"""Reading JSON Lines: every line exactly once however the file is cut, and damage is never silent."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metalm.data.preparation.jsonl import Document, JsonLinesFile, parse_document
from metalm.errors import DataError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=9).filter(lambda line: b"\n" not in line), max_size=12),
    stretch=st.integers(1, 40),
    ends_with_newline=st.booleans(),
)
def test_stretches_of_a_file_hold_every_line_once(
    tmp_path: Path, lines: list[bytes], stretch: int, ends_with_newline: bool
) -> None:
    path = tmp_path / "lines.jsonl"
    content = b"\n".join(lines) + (b"\n" if ends_with_newline else b"")
    path.write_bytes(content)
    found = []
    for start in range(0, max(1, len(content)), stretch):
        with JsonLinesFile(path) as file:
            for offset, line in file.lines(start=start, end=start + stretch):
                assert line is not None and content[offset : offset + len(line)] == line
                assert start <= offset < start + stretch
                found.append(line)
    assert found == content.splitlines(keepends=True) or b"\r" in content
    assert b"".join(found) == content


def test_a_line_too_long_is_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"short\n" + b"x" * 1000 + b"\nlast\n")
    with JsonLinesFile(path) as file:
        assert list(file.lines(max_line_bytes=10)) == [(0, b"short\n"), (6, None), (1007, b"last\n")]
    with JsonLinesFile(path) as file:
        assert list(file.lines(start=7, max_line_bytes=10)) == [(1007, b"last\n")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_of_several_parts_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(compress(b"one\ntw") + compress(b"") + compress(b"o\n" * 200_000))
    with JsonLinesFile(path) as file:
        lines = [line for _, line in file.lines()]
    assert lines == [b"one\n", b"two\n", *[b"o\n"] * 199_999]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "not compressed"])
def test_damaged_compressed_files_are_data_errors(tmp_path: Path, suffix: str, damage: str) -> None:
    content = bytes(range(256)) * 4000
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    data = bytearray(gzip.compress(content) if suffix == ".gz" else compressor.compress(content))
    if damage == "truncated":
        del data[-9:]
    elif damage == "altered":
        data[-6] ^= 0xFF
        data[-2] ^= 0xFF
    else:
        data = bytearray(b"plain text\n")
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(data)
    with JsonLinesFile(path) as file, pytest.raises(DataError, match=r"lines\.jsonl.* is damaged"):
        list(file.lines())


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (None, "too_long"),
        (b"{", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[1]", "invalid_json"),
        (b"\n", None),
        (b'{"text": "\xff"}', "invalid_unicode"),
        (b'{"text": "\\ud800"}', "invalid_unicode"),
        (b'{"content": "x"}', "missing_text"),
        (b'{"text": null}', "missing_text"),
        (b'{"text": " \\n"}', "empty_text"),
    ],
)
def test_lines_without_a_document_have_a_cause(line: bytes | None, cause: str) -> None:
    assert parse_document(line) == cause


def test_a_document_without_a_subset_belongs_to_unknown() -> None:
    for meta in (b"null", b"{}", b'{"pile_set_name": 3}'):
        line = b'{"text": "\xc3\xa9", "meta": ' + meta + b"}"
        assert parse_document(line) == Document("é", "unknown", 2)
