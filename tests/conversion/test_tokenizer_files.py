"""The exported tokenizer gives the ids of training by itself."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer

from conversion.conftest import Workshop, write_run
from conversion.foreign_tokenizers import FORMS, like_mistral, words
from metalm.conversion.completed_tokenizer import complete_tokenizer
from metalm.conversion.export import export_checkpoint
from metalm.conversion.tokenizer_files import is_same_tokenizer, read_tokenizer, write_tokenizer
from metalm.data.tokenizer import Tokenizer, train_tokenizer
from metalm.errors import DataError
from mutations import mutate_bytes, mutate_value

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


PARAGRAPHS = [
    "fox jumps\n\nover lazy\n\n\n\ndogs",
    "\n\nfox\n\n\n3.14\n",
    "\n\n\n fox\n\n\n\n\n\nover\n\n",
    "a </s> in raw text\n\n</s> and \n\n\r\nnaïve 数据",
]


@pytest.fixture(params=FORMS)
def completed(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """A tokenizer of another family, with our special tokens."""
    (tmp_path / "foreign").mkdir()
    FORMS[request.param](words(400)).save(str(tmp_path / "foreign" / "tokenizer.json"))
    return complete_tokenizer(tmp_path / "foreign", tmp_path / "completed")


def test_foreign_tokenizers_too_give_ids_and_texts_of_training(completed: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(completed, tmp_path, 128)
    exported, again = AutoTokenizer.from_pretrained(tmp_path), read_tokenizer(tmp_path)
    assert len(exported) == completed.size and again.special_ids == completed.special_ids
    for text in (*PARAGRAPHS, *words(20)):
        ids = completed.encode([text])[0].tolist()
        assert exported(text, split_special_tokens=True)["input_ids"] == [completed.start_id, *ids]
        assert exported.decode(ids) == completed.decode(ids)
        assert again.encode([text])[0].tolist() == ids
        assert again.decode(ids) == completed.decode(ids)
    assert exported.decode(completed.encode(PARAGRAPHS[:1])[0]) == PARAGRAPHS[0]


def test_foreign_tokenizers_are_recognised(completed: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(completed, tmp_path, 128)
    assert is_same_tokenizer(tmp_path / "tokenizer.json", completed)
    for _ in range(3):  # each time some scores of a Unigram may change in their last bit
        AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert is_same_tokenizer(tmp_path / "tokenizer.json", completed)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary[-1][1] -= 1e-3
    else:
        vocabulary |= {"a": vocabulary["o"], "o": vocabulary["a"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert not is_same_tokenizer(tmp_path / "tokenizer.json", completed)


def test_scores_are_those_of_training_to_the_last_bit(tmp_path: Path) -> None:
    stream = random.Random(4)
    pieces = [("<unk>", 0.0), *((f"p{number}", -stream.uniform(0, 20)) for number in range(2000))]
    tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0)).save(str(tmp_path / "tokenizer.json"))
    completed = complete_tokenizer(tmp_path, tmp_path / "completed")
    write_tokenizer(completed, tmp_path, 128)
    found = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert found == json.loads(completed.definition)["model"]["vocab"]


@pytest.mark.parametrize("name", ["metaspace", "gemma", "unigram"])
def test_a_run_with_a_foreign_tokenizer_is_exported_and_proved(
    name: str, workshop: Workshop, tmp_path: Path
) -> None:
    (tmp_path / "foreign").mkdir()
    texts = ["the quick brown fox jumps over the lazy dog <a>"]
    FORMS[name](texts, 310).save(str(tmp_path / "foreign" / "tokenizer.json"))
    tokenizer = complete_tokenizer(tmp_path / "foreign", tmp_path / "completed")
    model = workshop.training_model("deepnorm")
    assert tokenizer.size <= model.config.model.vocab_size
    data = model.config.data.model_copy(update={"tokenizer": tmp_path / "completed"})
    config = model.config.model_copy(update={"data": data})
    run = write_run(tmp_path / "run", dataclasses.replace(model, config=config))
    assert export_checkpoint(run, tmp_path / "out").proof
    assert is_same_tokenizer(tmp_path / "out" / "tokenizer.json", tokenizer)


def test_a_tokenizer_that_no_export_can_follow_is_refused_before_training(tmp_path: Path) -> None:
    model = like_mistral(words(400))
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), first])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="an export would have other ids than training for 'a paragraph"):
        complete_tokenizer(tmp_path, tmp_path / "completed")
    assert not (tmp_path / "completed").exists()


@pytest.mark.parametrize(
    "step", [decoders.ByteLevel(), decoders.Replace("Ġ", " ")], ids=["of texts", "of tokens"]
)
def test_a_decoder_takes_blanks_behind_blank_lines_as_in_training(
    step: decoders.Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    definition = tokenizers.Tokenizer.from_buffer(tokenizer.definition)
    definition.decoder = decoders.Sequence([step, decoders.Strip(" ", 1, 0), decoders.Fuse()])
    own = Tokenizer(definition.to_str().encode())
    write_tokenizer(own, tmp_path, 128)
    ids = own.encode(["   fox jumps\n\n   over  dogs\n\n\n\n  fox"])[0]
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids) == own.decode(ids)


def test_damaged_files_are_refused_by_name(completed: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(completed, tmp_path, 128)
    path = tmp_path / "tokenizer.json"
    content, chance, refused = path.read_bytes(), random.Random(5), 0
    changed = [b"[]", b"3", b'{"model": 3}', b'{"model": {"vocab": 3}}', b"", b"\xff"]
    changed += [mutate_bytes(content, chance) for _ in range(40)]
    changed += [json.dumps(mutate_value(json.loads(content), chance)).encode() for _ in range(40)]
    for damaged in changed:
        path.write_bytes(damaged)
        for read in (lambda: read_tokenizer(tmp_path), lambda: is_same_tokenizer(path, completed)):
            try:
                read()
            except DataError as error:
                refused += 1
                assert f"{path} is not an exported tokenizer" in str(error)
    assert refused > 12
    path.unlink()
    with pytest.raises(DataError, match="is not an exported tokenizer"):
        read_tokenizer(tmp_path)
