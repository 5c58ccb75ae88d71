"""Tokenizers of others with our special tokens: the same ids, text that cannot forge, shards made by them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from conversion.foreign_tokenizers import FORMS, like_gpt2, words
from metalm.conversion.completed_tokenizer import PROBES, changed_texts, complete_tokenizer
from metalm.data.preparation.text_shards import prepare_text
from metalm.data.sources import open_source
from metalm.data.tokenizer import SPECIAL_TOKENS
from metalm.errors import ConfigError, DataError
from mutations import mutate_bytes

RunTool = Callable[..., tuple[int, str, str]]
CHANGED = {"qwen": [PROBES[4]], "metaspace": [PROBES[1], PROBES[3]], "unigram": [PROBES[1], PROBES[3]]}
"""What is normalised comes back so: composed letters, and blanks in front of a text that begins with them."""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return words(400)


@pytest.mark.parametrize("name", FORMS)
def test_tokens_keep_their_ids_and_texts_are_given_back(name: str, texts: list[str], tmp_path: Path) -> None:
    foreign = FORMS[name](texts)
    foreign.save(str(tmp_path / "tokenizer.json"))
    completed = complete_tokenizer(tmp_path, tmp_path / "out")
    model = tokenizers.Tokenizer.from_buffer(completed.definition)
    vocabulary = model.get_vocab()
    assert {token: vocabulary[token] for token in foreign.get_vocab()} == foreign.get_vocab()
    assert [model.id_to_token(one) for one in completed.special_ids] == list(SPECIAL_TOKENS)
    for text in texts[:50]:
        if "<s>" not in text:  # which a special token's name is for others
            expected = foreign.encode(text, add_special_tokens=False).ids
            assert completed.encode([text])[0].tolist() == expected
    assert changed_texts(completed) == CHANGED.get(name, [])
    assert completed.special_tokens_in_text() == []


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_encodes_as_it_did(
    kind: str, texts: list[str], run_tool: RunTool, tmp_path: Path
) -> None:
    model = trained(kind, texts, tmp_path)
    texts = [*texts, "  fox   dogs over ", "a<tool>fox <tool> dogs<tool><tool>"]
    code, printed, error = run_tool("complete_tokenizer.py", model, "--out", tmp_path / "out")
    assert code == 0, error
    assert "does not give back every text" in printed if kind == "unigram" else "changed" not in printed
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = prepare_text([tmp_path / "corpus.jsonl"], tmp_path / "shards", tmp_path / "out")
    assert report["documents"] == len(texts)
    completed = complete_tokenizer(model.parent, tmp_path / "again")
    source = open_source("text", tmp_path / "shards", completed)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text, location in zip(texts, source.index.locate(np.arange(len(texts))), strict=True):
        assert source.token_ids(location).tolist() == reference.encode(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<br>"], "vocab_size": 330},
        {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 60},
        {"model_type": "unigram", "byte_fallback": True, "vocab_size": 330},
    ],
    ids=["symbols", "like_t5", "bytes"],
)
def test_no_text_forges_a_control_token_of_a_sentencepiece_model(
    settings: dict[str, object], tmp_path: Path
) -> None:
    texts = ["boats on a lake sail past image d " * 3] * 400
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    model = tmp_path / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"),
        model_prefix=str(model),
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    completed = complete_tokenizer(model.with_suffix(".model"), tmp_path / "out")
    reference = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    for control in ("<s>", "</s>", "<unk>", "<pad>"):
        for text in (
            f"a<br>{control}<br>b",
            f"on{control}on {control}",
            f"<br>{control}",
            f"on {control}",
            control,
        ):
            found, expected = completed.encode([text])[0].tolist(), reference.encode(text)
            assert not set(completed.special_ids) & set(found), text
            if reference.unk_id() not in expected:
                assert found == expected, text
    assert completed.encode([texts[0]])[0].tolist() == reference.encode(texts[0])


def trained(kind: str, texts: list[str], folder: Path) -> Path:
    """By SentencePiece: Llama's settings, or T5's."""
    (folder / "texts.txt").write_text("\n".join(texts))
    llama = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    }
    (folder / "model").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"),
        model_prefix=str(folder / "model" / "tokenizer"),
        vocab_size=320 if kind == "bpe" else 40,
        model_type=kind,
        minloglevel=2,
        user_defined_symbols=["<tool>"],
        **(llama if kind == "bpe" else {}),
    )
    return folder / "model" / "tokenizer.model"


def test_what_is_no_tokenizer_is_refused_by_name(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        complete_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.bin: expected a folder, a tokenizer\.json or a SentencePiece"):
        complete_tokenizer(tmp_path / "a.bin", tmp_path / "out")
    for content in (
        b"x",
        b"[]",
        b'{"model": {"merges": [1]}}',
        b'{"model": {"type": "Unigram", "vocab": [1]}}',
    ):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.json is not a tokenizer"):
            complete_tokenizer(tmp_path / "a.json", tmp_path / "out")
    model = trained("bpe", texts, tmp_path)
    chance, content, refused = random.Random(2), model.read_bytes(), 0
    for number in range(40):
        model.write_bytes(mutate_bytes(content, chance))
        try:
            complete_tokenizer(model, tmp_path / f"out{number}")
        except DataError as error:
            refused += 1
            assert "tokenizer." in str(error)
    assert refused > 5
    model.write_bytes(b"x")
    with pytest.raises(DataError, match=r"tokenizer\.model cannot be used: it is no SentencePiece model"):
        complete_tokenizer(model, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"needs the package sentencepiece: .*metalm\[sentencepiece\]"):
        complete_tokenizer(model, tmp_path / "out")


def test_a_folder_that_is_there_is_left_alone(texts: list[str], tmp_path: Path) -> None:
    like_gpt2(texts).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="cannot make the folder"):
        complete_tokenizer(tmp_path, tmp_path)
