"""The training tokenizer as transformers reads it, and back.

Three things that training does around its tokenizer move into tokenizer.json, so that AutoTokenizer alone
gives the ids of training. A blank line is the end-of-paragraph token: the token keeps its id and is
spelt as the two newlines that it stands for. What stands between blank lines is a text of its own, also
for a tokenizer that puts a blank in front of texts, which decoding takes away. And a text starts with
`<s>`, by a post-processor. Otherwise special tokens that are spelt out in a prompt count as such
(`split_special_tokens=True` turns that off).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metalm.data.tokenizer import (
    BLANK_LINE,
    DOCUMENT,
    IMAGE,
    PAD,
    PARAGRAPH,
    START,
    Tokenizer,
    panics_as_errors,
    parse_tokenizer,
)
from metalm.errors import DataError
from metalm.regular_files import read_regular

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_SCORE_PRECISION = 1e-9
"""`tokenizers` changes the last bit of some scores of a Unigram whenever it reads them."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer: of the training run.
        folder: where to.
        max_length: row length in training, which transformers warns above.
    """
    content = _exported(tokenizer.definition)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": START, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": START, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {START: {"id": START, "ids": [tokenizer.start_id], "tokens": [START]}},
    }
    definition = json.dumps(content, ensure_ascii=False, indent=2).encode()
    parse_tokenizer(definition)
    (folder / TOKENIZER_NAME).write_bytes(definition)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "MetaLMProcessor",
        "bos_token": START,
        "eos_token": DOCUMENT,
        "pad_token": PAD,
        "extra_special_tokens": [IMAGE],
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / TOKENIZER_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of training that an exported folder holds.

    Raises:
        DataError: there is no such file, or it is no exported tokenizer.json.
    """
    path = folder / TOKENIZER_NAME
    try:
        content = _respelt(_checked(read_regular(path)), BLANK_LINE, PARAGRAPH, special=True)
        return Tokenizer(json.dumps(content | {"post_processor": None}).encode())
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not an exported tokenizer: {error!r}") from None


def is_same_tokenizer(exported: Path, tokenizer: Tokenizer) -> bool:
    """Whether an exported tokenizer.json gives the ids of a training tokenizer.

    Raises:
        DataError: there is no such file, or it is no tokenizer.json.
    """
    try:
        found = _exported(read_regular(exported))
    except (OSError, ValueError) as error:
        raise DataError(f"{exported} is not an exported tokenizer: {error!r}") from None
    own = _exported(tokenizer.definition)
    vocabularies = [content["model"].pop("vocab") for content in (found, own)]
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer")
    return all(found[part] == own[part] for part in parts) and _are_alike(*vocabularies)


def texts_exported_otherwise(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Those of some texts to which an export of a tokenizer would give other ids.

    Raises:
        BadSample: `untokenizable`, as `Tokenizer.encode`.
    """
    exported = parse_tokenizer(json.dumps(_exported(tokenizer.definition)).encode())
    exported.encode_special_tokens = True
    return [
        text
        for text, ids in zip(texts, tokenizer.encode(texts), strict=True)
        if exported.encode(text, add_special_tokens=False).ids != ids.tolist()
    ]


def _exported(definition: bytes) -> dict[str, Any]:
    """The content of the tokenizer.json that encodes and decodes whole texts as training does.

    Raises:
        ValueError: the definition is none.
    """
    content = _checked(definition)
    if any(token["content"] == PARAGRAPH for token in content["added_tokens"]):
        _vacate(content["model"], BLANK_LINE)
        content = _respelt(content, PARAGRAPH, BLANK_LINE, special=False)
    first = next(_steps(content["pre_tokenizer"], "pretokenizers"), {})
    if first.get("prepend_scheme") == "first":  # which is the first of the whole text alone
        first["prepend_scheme"] = "always"
    content["decoder"] = _decoder_of_pieces(content["decoder"])
    return content | {"truncation": None, "padding": None}


def _checked(definition: bytes) -> dict[str, Any]:
    """The content of a tokenizer.json in the one form in which `tokenizers` writes it.

    Raises:
        ValueError: it is none.
    """
    tokenizer = parse_tokenizer(definition)
    with panics_as_errors():
        content: dict[str, Any] = json.loads(tokenizer.to_str())
    if content["model"]["type"] == "Unigram":  # with the scores that are there
        content["model"]["vocab"] = json.loads(definition)["model"]["vocab"]
    return content


def _respelt(content: dict[str, Any], old: str, new: str, special: bool) -> dict[str, Any]:
    """Spell one added token differently, with the same id, and find it wherever it stands."""
    _rename(content["model"], old, new)
    anywhere = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in content["added_tokens"]:
        if token["content"] == old:
            token.update(content=new, special=special, **anywhere)
    return content


def _rename(model: dict[str, Any], old: str, new: str) -> None:
    """Of a list the places are ids, of a mapping the values."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[new if piece == old else piece, score] for piece, score in vocabulary]
    else:
        model["vocab"] = {new if token == old else token: n for token, n in vocabulary.items()}


def _vacate(model: dict[str, Any], spelling: str) -> None:
    """Give a model's own token of blank lines, which no text has in training, a spelling that none has."""
    vocabulary = model["vocab"]
    known = {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else vocabulary.keys()
    if spelling not in known:
        return
    free = 2 * spelling
    while free in known:
        free += spelling
    _rename(model, spelling, free)
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if spelling not in (*pair, "".join(pair))]


def _steps(part: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer or a decoder in their order, out of their sequences."""
    if part is not None and part["type"] == "Sequence":
        for step in part[name]:
            yield from _steps(step, name)
    elif part is not None:
        yield part


def _decoder_of_pieces(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    """A decoder that takes away behind every blank line what one takes away at the beginning of a text."""
    taken: list[str] = []
    is_whole = False
    for step in _steps(decoder, "decoders"):
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            taken.append(" ")
        elif step["type"] == "Strip" and step["start"] and is_whole:  # else it is every token's beginning
            taken.append(f"{re.escape(step['content'])}{{1,{step['start']}}}")
        is_whole = is_whole or step["type"] in ("ByteLevel", "Fuse")
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"Regex": f"(?<={BLANK_LINE}){pattern}"}, "content": ""}
        for pattern in taken
    ]
    return {"type": "Sequence", "decoders": [decoder, {"type": "Fuse"}, *steps]} if steps else decoder


def _are_alike(found: Any, own: Any) -> bool:
    """Whether two vocabularies are one."""
    if not (isinstance(found, list) and isinstance(own, list)):
        return bool(found == own)
    return len(found) == len(own) and all(
        one == other and math.isclose(score, other_score, rel_tol=_SCORE_PRECISION)
        for (one, score), (other, other_score) in zip(found, own, strict=True)
    )
