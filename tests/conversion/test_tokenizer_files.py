"""The exported tokenizer gives the ids of training by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from metalm.conversion.tokenizer_files import is_same_tokenizer, write_tokenizer
from metalm.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "the quick brown fox",
    "",
    "a\n\nb\n\n\nc\n",
    "\n\n\n\n",
    "a </s> in raw text\r\n\r\n",
    "日本語 and é\n\n\tcode:  x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_training(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    write_tokenizer(tokenizer, tmp_path, 128)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode([text])[0].tolist()
    assert exported(text)["input_ids"] == [tokenizer.start_id, *ids]
    assert exported(text, add_special_tokens=False)["input_ids"] == ids
    assert exported.decode(ids) == text


def test_special_tokens_have_their_roles(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(tokenizer, tmp_path, 128)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert len(exported) == tokenizer.size
    roles = (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id)
    assert roles == (tokenizer.start_id, tokenizer.document_id, tokenizer.pad_id)
    spelt = exported("fox</d><image>", add_special_tokens=False)["input_ids"]
    assert spelt[-2:] == [tokenizer.document_id, tokenizer.image_id]
    raw = exported("fox</d><image>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert raw == tokenizer.encode(["fox</d><image>"])[0].tolist()
    ended = [*tokenizer.encode(["fox\n\n"])[0].tolist(), tokenizer.document_id]
    assert exported.decode(ended, skip_special_tokens=True) == "fox\n\n"


def test_an_exported_tokenizer_is_recognised(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(tokenizer, tmp_path, 128)
    assert is_same_tokenizer(tmp_path / "tokenizer.json", tokenizer)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert is_same_tokenizer(tmp_path / "again" / "tokenizer.json", tokenizer)
    other = train_tokenizer(["other words than those"], 280, tmp_path / "other")
    assert not is_same_tokenizer(tmp_path / "tokenizer.json", other)
