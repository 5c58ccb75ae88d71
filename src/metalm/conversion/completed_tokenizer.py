"""A tokenizer made elsewhere, by Hugging Face or SentencePiece, with the five special tokens of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers

from metalm.conversion.sentencepiece_model import UNLIKELY, read_sentencepiece
from metalm.conversion.tokenizer_files import TOKENIZER_NAME, texts_exported_otherwise
from metalm.data.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    parse_tokenizer,
    write_tokenizer_config,
)
from metalm.errors import BadSample, ConfigError, DataError
from metalm.progress import Phase
from metalm.regular_files import read_regular

SENTENCEPIECE_SUFFIX = ".model"
SENTENCEPIECE_NAME = "tokenizer.model"
MAX_BYTES = 256 << 20
PROBES = (
    "The quick brown fox: 1234567890, 3.14e-10!",
    " blanks  in   front, between and behind  ",
    "a line\nand another\r\n\tindented\n    more",
    "a paragraph\n\nanother\n\n\n\n and one more\n",
    "naïve Ångström e\u0301 ﬁ ² 中文字符 русский العربية",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00a0\u3000 \u2028\x00\x7f",
    *(f"a{token} {token}" for token in SPECIAL_TOKENS),
)
"""Texts that tokenizers tend to change."""


def complete_tokenizer(source: Path, out: Path) -> Tokenizer:
    """Write a tokenizer with our special tokens; all tokens that it has keep their ids.

    Args:
        source: a folder with tokenizer.json or tokenizer.model, or one of these.
        out: a folder, which must not exist.

    Raises:
        ConfigError: `out` exists, or a package that SentencePiece models need is not installed.
        DataError: there is no such file, it is no tokenizer, raw text could forge a special token, or no
            export of it would give the ids of training.
    """
    with Phase(f"reading the tokenizer of {source}"):
        tokenizer = read_foreign_tokenizer(source)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out}: {error.strerror}") from error
    tokenizer.save(str(out / TOKENIZER_NAME))
    write_tokenizer_config(out)
    try:
        completed = load_tokenizer(out)
        _check_export(completed, source)
    except DataError:
        shutil.rmtree(out)
        raise
    return completed


def read_foreign_tokenizer(source: Path) -> tokenizers.Tokenizer:
    """A tokenizer as it is, but that raw text can forge no special token of ours.

    Raises:
        ConfigError, DataError: as `complete_tokenizer`.
    """
    path = _file(source)
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    definition = _of_sentencepiece(path, content) if path.suffix == SENTENCEPIECE_SUFFIX else content
    try:
        return parse_tokenizer(_unforgeable(definition))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer: {error}") from None


def changed_texts(tokenizer: Tokenizer) -> list[str]:
    """Those of `PROBES` that are others after encoding and decoding."""
    return [
        text
        for text, ids in zip(PROBES, tokenizer.encode(PROBES), strict=True)
        if tokenizer.decode(ids) != text
    ]


def _check_export(tokenizer: Tokenizer, source: Path) -> None:
    """Before a run is trained with it."""
    try:
        texts = texts_exported_otherwise(tokenizer, PROBES)
    except BadSample:
        raise DataError(f"the tokenizer of {source} fails on ordinary texts: get another") from None
    if texts:
        raise DataError(
            f"the tokenizer of {source} cannot be used: an export would have other ids than training for "
            f"{texts[0]!r}. What it does at the beginning of a text it must do behind every blank line: a "
            "Metaspace behind other steps of its pre_tokenizer needs the prepend_scheme `always` or `never`"
        )


def _file(source: Path) -> Path:
    if not source.is_dir():
        if source.suffix not in (".json", SENTENCEPIECE_SUFFIX):
            raise DataError(
                f"{source}: expected a folder, a {TOKENIZER_NAME} or a SentencePiece {SENTENCEPIECE_SUFFIX}"
            )
        return source
    for name in (TOKENIZER_NAME, SENTENCEPIECE_NAME):
        if (source / name).is_file():
            return source / name
    raise DataError(
        f"{source} holds neither {TOKENIZER_NAME} nor {SENTENCEPIECE_NAME}; transformers writes one: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _of_sentencepiece(path: Path, content: bytes) -> bytes:
    """The content of a tokenizer.json that encodes as a SentencePiece model does."""
    try:
        return str(read_sentencepiece(content, PROBES).to_str()).encode()
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package {error.name}: pip install 'metalm[sentencepiece]'"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} cannot be used: {error}") from None


def _unforgeable(definition: bytes) -> bytes:
    """A definition whose model does not make one of our special tokens of text.

    A BPE loses the merges that would, and a Unigram prefers any other pieces.
    """
    content = json.loads(definition)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return definition
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in SPECIAL_TOKENS]
    elif model.get("type") == "Unigram" and isinstance(pieces := model.get("vocab"), list):
        lowest = min(float(score) for _, score in pieces) - UNLIKELY
        model["vocab"] = [[piece, lowest if piece in SPECIAL_TOKENS else score] for piece, score in pieces]
    return json.dumps(content, ensure_ascii=False).encode()


def _merged(merge: object) -> str:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return "".join(map(str, pair)) if isinstance(pair, list) else ""
