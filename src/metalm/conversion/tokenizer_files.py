"""The training tokenizer as transformers reads it, and back.

Two things that training does around its tokenizer move into tokenizer.json, so that AutoTokenizer alone
gives the ids of training. A blank line is the end-of-paragraph token: the token keeps its id and is
spelt as the two newlines that it stands for. And a text starts with `<s>`, by a post-processor.
Otherwise special tokens that are spelt out in a prompt count as such (`split_special_tokens=True` turns
that off).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from metalm.data.tokenizer import BLANK_LINE, DOCUMENT, IMAGE, PAD, PARAGRAPH, START, Tokenizer
from metalm.errors import DataError
from metalm.regular_files import read_regular

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer: of the training run.
        folder: where to.
        max_length: row length in training, which transformers warns above.
    """
    content = _respelt(json.loads(tokenizer.definition), PARAGRAPH, BLANK_LINE, special=False)
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
    _save(content, folder / TOKENIZER_NAME)
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
        content = _respelt(json.loads(path.read_bytes()), BLANK_LINE, PARAGRAPH, special=True)
        return Tokenizer(json.dumps(content | {"post_processor": None}).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not an exported tokenizer: {error!r}") from None


def is_same_tokenizer(exported: Path, tokenizer: Tokenizer) -> bool:
    """Whether an exported tokenizer.json gives the ids of a training tokenizer.

    Raises:
        DataError: there is no such file, or it is no tokenizer.json.
    """
    try:
        found = _respelt(json.loads(read_regular(exported)), BLANK_LINE, PARAGRAPH, special=True)
        own = json.loads(tokenizers.Tokenizer.from_buffer(tokenizer.definition).to_str())
        parts = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        return all(found[part] == own[part] for part in parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{exported} is not an exported tokenizer: {error!r}") from None


def _respelt(content: dict[str, Any], old: str, new: str, special: bool) -> dict[str, Any]:
    """Spell one added token differently, with the same id."""
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {new if token == old else token: n for token, n in vocabulary.items()}
    for token in content["added_tokens"]:
        if token["content"] == old:
            token.update(content=new, special=special)
    return content


def _save(content: dict[str, Any], path: Path) -> None:
    """Through the library, which checks it and has one way to write it."""
    path.write_text(tokenizers.Tokenizer.from_str(json.dumps(content)).to_str(pretty=True))
