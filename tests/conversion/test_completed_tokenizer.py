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
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from metalm.conversion.completed_tokenizer import PROBES, changed_texts, complete_tokenizer
from metalm.data.preparation.text_shards import prepare_text
from metalm.data.sources import open_source
from metalm.data.tokenizer import SPECIAL_TOKENS
from metalm.errors import ConfigError, DataError
from mutations import mutate_bytes

RunTool = Callable[..., tuple[int, str, str]]
WORDS = ["fox", "dogs", "jumps", "over", "naïve", "数据", "3.14", "lazy", "s>", "</", "d>", "<s>"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    stream = random.Random(1)
    return [" ".join(stream.choices(WORDS, k=12)) + "." for _ in range(400)]


def byte_level(texts: list[str], *special: str) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model


def like_gpt2(texts: list[str]) -> tokenizers.Tokenizer:
    return byte_level(texts, "<|endoftext|>")


def like_qwen(texts: list[str]) -> tokenizers.Tokenizer:
    """Its text is normalised, and it has added tokens that are not special."""
    model = byte_level(texts, "<|endoftext|>", "<|im_start|>")
    model.normalizer = normalizers.NFC()
    model.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return model


def like_llama3(texts: list[str]) -> tokenizers.Tokenizer:
    """It begins texts with a token of its own."""
    model = byte_level(texts, "<|begin_of_text|>", "<|end_of_text|>")
    begin = ("<|begin_of_text|>", model.token_to_id("<|begin_of_text|>"))
    model.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    return model


def like_llama2(texts: list[str]) -> tokenizers.Tokenizer:
    """Blanks are letters, bytes stand in for unknown ones, and two special tokens have the names of ours."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    definition = json.loads(model.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    # Of a pair that a long corpus would have merged: text must not become the special token by it.
    merges = definition["model"]["merges"]
    vocabulary = definition["model"]["vocab"]
    if "<s" not in vocabulary:
        vocabulary["<s"] = len(vocabulary)
        merges.append(["<", "s"])
    merges.append(["<s", ">"])
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


FORMS = {"gpt2": like_gpt2, "qwen": like_qwen, "llama3": like_llama3, "llama2": like_llama2}


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
    # What is normalised comes back so: composed letters.
    assert changed_texts(completed) == ([PROBES[4]] if name == "qwen" else [])
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
