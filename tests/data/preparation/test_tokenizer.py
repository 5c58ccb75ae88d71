"""The tokenizer: reversible, safe against forged special tokens, the same in transformers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from metalm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from metalm.errors import BadSample, ConfigError, DataError
from mutations import mutate_bytes, mutate_value
from permissions import as_users_are

MUTATIONS = 600

TEXT_WITH_MARKUP = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "\n", "\n\n", " ", "fox", "é", "\x00"]) | st.text(max_size=5),
    max_size=20,
).map("".join)


def edited(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of a tokenizer.json with some of its keys replaced."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**definition, **changes}))
    return path


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    names = ("start_id", "paragraph_id", "document_id", "image_id", "pad_id")
    assert tuple(getattr(tokenizer, name) for name in names) == tokenizer.special_ids


def test_fingerprint_is_the_sha256_of_the_file(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    content = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert tokenizer.fingerprint == hashlib.sha256(content).hexdigest()


@settings(deadline=None)
@given(texts=st.lists(TEXT_WITH_MARKUP, max_size=6))
def test_decoding_gives_back_every_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = tokenizer.encode(texts)
    assert all(ids.dtype == np.int32 for ids in encoded)
    assert [tokenizer.decode(ids) for ids in encoded] == texts


@settings(deadline=None)
@given(text=TEXT_WITH_MARKUP)
def test_raw_text_yields_no_special_id_but_that_of_blank_lines(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode([text])[0].tolist()
    assert ids.count(tokenizer.paragraph_id) == text.count("\n\n")
    assert not set(ids) & (set(tokenizer.special_ids) - {tokenizer.paragraph_id})


def test_ids_are_those_of_transformers_with_paragraphs_between(
    tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        other = loader.from_pretrained(tokenizer_folder)
        first, second = (other(text)["input_ids"] for text in ("the lazy\nfox </s", "  über dogs"))
        assert tokenizer.encode(["the lazy\nfox </s\n\n  über dogs"])[0].tolist() == [*first, 1, *second]
        assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 2, 4)
        assert other("<image>")["input_ids"] == [tokenizer.image_id]


def test_decoding_drops_special_tokens_and_unknown_ids(tokenizer: Tokenizer) -> None:
    fox, dog = (ids.tolist() for ids in tokenizer.encode(["fox", "dog"]))
    ids = [tokenizer.start_id, *fox, 1, tokenizer.image_id, *dog, tokenizer.document_id, 10**6]
    assert tokenizer.decode(ids) == "fox\n\ndog"


def test_stored_ids_are_as_small_as_the_vocabulary_allows(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tokenizer_folder).id_dtype == np.dtype("<u2")
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    model["vocab"] |= {f"unused{number}": number for number in range(len(model["vocab"]), 2**16)}
    assert load_tokenizer(edited(tokenizer_folder, tmp_path, model=model)).id_dtype == np.dtype("<u4")


def test_a_missing_special_token_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    definition["model"]["vocab"].pop("</d>")
    added = [token for token in definition["added_tokens"] if token["content"] != "</d>"]
    with pytest.raises(DataError, match="lacks </d>"):
        load_tokenizer(edited(tokenizer_folder, tmp_path, added_tokens=added, model=definition["model"]))


def test_a_tokenizer_whose_specials_raw_text_can_forge_is_refused(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    added = json.loads((tokenizer_folder / "tokenizer.json").read_text())["added_tokens"]
    ordinary = [{**token, "special": token["content"] != "<image>"} for token in added]
    with pytest.raises(DataError, match="turns <image> in raw text"):
        load_tokenizer(edited(tokenizer_folder, tmp_path, added_tokens=ordinary))


def test_unreadable_tokenizers_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_training_needs_room_for_all_bytes_and_some_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 261"):
        train_tokenizer(["text"], 260, tmp_path)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(iter([]), 300, tmp_path)
    assert not list(tmp_path.iterdir())


def splitting_at(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "it gives up"),
        ("pre_tokenizer", splitting_at("("), "unmatched parenthesis"),
        ("pre_tokenizer", splitting_at("((([a-z<> ]+)+)+)+#"), "fails on a text of a few letters"),
    ],
)
def test_definitions_at_which_the_library_panics_are_data_errors(
    tokenizer_folder: Path, tmp_path: Path, part: str, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(edited(tokenizer_folder, tmp_path, **{part: content}))


def test_a_text_at_which_the_library_panics_is_a_bad_sample(tokenizer_folder: Path, tmp_path: Path) -> None:
    found = load_tokenizer(edited(tokenizer_folder, tmp_path, pre_tokenizer=splitting_at("(z+)+#")))
    with pytest.raises(BadSample, match="untokenizable"):
        found.encode(["z" * 60])


def test_an_id_beyond_reason_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    model["vocab"]["far"] = 2**32 - 1
    with pytest.raises(DataError, match="an id of it is 4,294,967,295"):
        load_tokenizer(edited(tokenizer_folder, tmp_path, model=model))


@pytest.mark.timeout(30)
def test_no_mutation_of_a_definition_ends_in_anything_but_a_message(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    content = (tokenizer_folder / "tokenizer.json").read_bytes()
    definition, path = json.loads(content), tmp_path / "tokenizer.json"
    chance, refused = random.Random(3), 0
    for number in range(MUTATIONS):
        small = {key: value for key, value in definition.items() if key != "model"}
        changed = {**definition, **mutate_value(small, chance)}
        path.write_bytes(mutate_bytes(content, chance) if number % 2 else json.dumps(changed).encode())
        try:
            load_tokenizer(path)
        except DataError:
            refused += 1
    assert refused > MUTATIONS // 3


def test_another_tokenizer_is_never_replaced_and_the_same_one_passes(tmp_path: Path) -> None:
    train_tokenizer(["the quick brown fox"], 300, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(
        ConfigError, match="is there already and is not the tokenizer .*: name another folder"
    ):
        train_tokenizer(["other words than those"], 300, tmp_path)
    train_tokenizer(["the quick brown fox"], 300, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_where_no_tokenizer_can_be_written_no_text_is_read(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        raise AssertionError("it is read")
        yield

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/tokenizer cannot be written: Not a directory; name another"):
        train_tokenizer(texts(), 300, tmp_path / "file" / "tokenizer")
    (tmp_path / "closed").mkdir(mode=0o500)
    with (
        as_users_are(),
        pytest.raises(ConfigError, match="cannot be written: Permission denied; name another"),
    ):
        train_tokenizer(texts(), 300, tmp_path / "closed" / "new" / "tokenizer")
