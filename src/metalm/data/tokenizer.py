"""The tokenizer that text, encoders and decoder share: byte-level BPE with the five special tokens.

Training and reading go through Hugging Face `tokenizers`, so the files also load in transformers. The
decision here is where special tokens may come from: only from us. A string such as `</d>` that occurs
in raw text is ordinary text, and a blank line is the one thing in a text that becomes a special token:
each two newlines in a row, from the left, are the end-of-paragraph token `</s>`. That rule is
reversible, so decoding gives back exactly the text that was encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from metalm.errors import BadSample, ConfigError, DataError
from metalm.outputs import require_folder_place, writing
from metalm.progress import Phase
from metalm.regular_files import read_regular, replace_file

START = "<s>"
PARAGRAPH = "</s>"
DOCUMENT = "</d>"
IMAGE = "<image>"
PAD = "<pad>"
SPECIAL_TOKENS = (START, PARAGRAPH, DOCUMENT, IMAGE, PAD)
"""In the order of their ids in a tokenizer trained here."""

BLANK_LINE = "\n\n"
BYTE_ALPHABET_SIZE = 256
MAX_IDS = 1 << 24
"""Of a vocabulary, holes among them: tables of that length are held."""

PieceEncoder = Callable[[list[str]], tuple[NDArray[np.int32], NDArray[np.int64]]]
"""Encodes pieces of text without a blank line: ids of all pieces end to end, and the length of each."""


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`.

    Attributes:
        fingerprint: sha256 of tokenizer.json, in hex. Equal fingerprints mean equal ids.
        size: all ids are below it; that of a vocabulary with holes is more than the number of its tokens.
        start_id, paragraph_id, document_id, image_id, pad_id: ids of `<s> </s> </d> <image> <pad>`.
        special_ids: all five, in that order.
        definition: the content of tokenizer.json.
    """

    def __init__(self, definition: bytes, piece_encoder: PieceEncoder | None = None) -> None:
        """Reads the content of a tokenizer.json; `piece_encoder` replaces Hugging Face's encoding.

        Raises:
            ValueError: no valid tokenizer.json.
            KeyError: a special token is missing.
        """
        self._model = parse_tokenizer(definition)
        self._model.encode_special_tokens = True
        self._model.no_padding()
        self._model.no_truncation()
        self._encode_pieces = piece_encoder or self._encode_with_hugging_face
        self.definition = definition
        self.fingerprint = hashlib.sha256(definition).hexdigest()
        vocabulary = self._model.get_vocab()
        self.size: int = max(vocabulary.values(), default=-1) + 1
        if self.size > MAX_IDS:
            raise ValueError(f"an id of it is {self.size - 1:,}, the largest that is read is {MAX_IDS - 1:,}")
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise KeyError(", ".join(missing))
        self.special_ids: tuple[int, ...] = tuple(vocabulary[token] for token in SPECIAL_TOKENS)
        self.start_id, self.paragraph_id, self.document_id, self.image_id, self.pad_id = self.special_ids
        self._is_of_text = np.zeros(self.size, bool)
        self._is_of_text[list(vocabulary.values())] = True
        self._is_of_text[[one for one in self.special_ids if one != self.paragraph_id]] = False

    @property
    def id_dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Smallest little-endian type that shards store ids in: uint16 below 65,536 ids, else uint32."""
        return np.dtype("<u2") if self.size < 2**16 else np.dtype("<u4")

    def with_piece_encoder(self, piece_encoder: PieceEncoder) -> Tokenizer:
        """The same tokenizer with another implementation of its BPE."""
        return Tokenizer(self.definition, piece_encoder)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, `[length]` int32, without `<s>` and `</d>`; blank lines become `</s>`.

        Raises:
            BadSample: `untokenizable`: a regular expression of the tokenizer gives up on a text.
        """
        if not texts:
            return []
        if len(texts) == 1 and BLANK_LINE not in texts[0]:
            return [self._encode_pieces([texts[0]])[0]]
        pieces_of_texts = [text.split(BLANK_LINE) for text in texts]
        num_pieces = np.array([len(pieces) for pieces in pieces_of_texts])
        ids, lengths = self._encode_pieces(list(chain.from_iterable(pieces_of_texts)))

        first_pieces = np.cumsum(num_pieces) - num_pieces
        ends_paragraph = np.ones(len(lengths), dtype=bool)
        ends_paragraph[first_pieces + num_pieces - 1] = False
        if ends_paragraph.any():
            ids = np.insert(ids, np.cumsum(lengths)[ends_paragraph], self.paragraph_id)
        text_ends = np.cumsum(np.add.reduceat(lengths, first_pieces) + num_pieces - 1)
        return [ids[start:end] for start, end in zip(chain([0], text_ends), text_ends, strict=False)]

    def check_body(self, ids: NDArray[np.integer[Any]]) -> None:
        """Whether these may be the ids [n] of a text, as `encode` makes them; n is not 0.

        Raises:
            BadSample: `token_out_of_range` (no token has such an id) or `control_token` (no text holds it).
        """
        try:
            are_of_text = self._is_of_text[ids].all()
        except IndexError:
            raise BadSample("token_out_of_range") from None
        if not are_of_text:
            is_control = np.isin(ids, self.special_ids) & ~self._is_of_text[ids]
            raise BadSample("control_token" if is_control.any() else "token_out_of_range")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: `</s>` is a blank line, other special tokens are dropped.

        Bytes that are not UTF-8, which a model can produce, become U+FFFD.
        """
        pieces: list[list[int]] = [[]]
        for token_id in ids:
            if token_id == self.paragraph_id:
                pieces.append([])
            else:
                pieces[-1].append(int(token_id))
        return BLANK_LINE.join(self._model.decode_batch(pieces, skip_special_tokens=True))

    def _encode_with_hugging_face(self, pieces: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        try:
            with panics_as_errors():
                found = self._model.encode_batch_fast(pieces, add_special_tokens=False)
        except TokenizerPanic:
            raise BadSample("untokenizable") from None
        encoded = [item.ids for item in found]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        return ids, lengths

    def special_tokens_in_text(self) -> list[str]:
        """The special tokens that raw text could forge; empty for a tokenizer that is safe to use."""
        encoded = self.encode([f"a{token} {token}" for token in SPECIAL_TOKENS])
        return [
            token
            for token, ids in zip(SPECIAL_TOKENS, encoded, strict=True)
            if np.isin(ids, self.special_ids).any()
        ]


class TokenizerPanic(ValueError):
    """The code of `tokenizers` has given up."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Make a panic of `tokenizers`, which is no `Exception` and would end any program, a ValueError.

    It panics at definitions, and at texts on which a regular expression takes too long.

    Raises:
        TokenizerPanic: it has.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise TokenizerPanic(f"it gives up: {panic}") from None


def parse_tokenizer(definition: bytes) -> tokenizers.Tokenizer:
    """A tokenizer of `tokenizers` from the content of a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    with panics_as_errors():
        try:
            return tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(str(error)) from error


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a folder, or in a tokenizer.json.

    Raises:
        DataError: there is no such file, it is no tokenizer, it lacks a special token, or raw text can
            produce a special token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer(read_regular(file))
        forged = tokenizer.special_tokens_in_text()
    except BadSample:
        raise DataError(
            f"the tokenizer {file} fails on a text of a few letters: train or get another"
        ) from None
    except OSError as error:
        raise DataError(
            f"no tokenizer at {file}: {error.strerror}. tools/train_tokenizer.py writes one."
        ) from error
    except ValueError as error:
        raise DataError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    except KeyError as error:
        raise DataError(
            f"the tokenizer {file} lacks {error.args[0]}; it must have {', '.join(SPECIAL_TOKENS)}. "
            "tools/complete_tokenizer.py adds them, tools/train_tokenizer.py trains one."
        ) from error
    if forged:
        raise DataError(
            f"the tokenizer {file} turns {', '.join(forged)} in raw text into special tokens. Add them as "
            "special tokens (special=true), not as ordinary added tokens or vocabulary entries."
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Trains byte-level BPE and writes tokenizer.json and tokenizer_config.json into `folder`.

    Texts are split at blank lines first, as in `Tokenizer.encode`. The vocabulary is smaller than
    `vocab_size` where the texts do not hold that many merges. A tokenizer that is there already is never
    replaced, for shards and runs may hold its ids; one that is the same passes.

    Raises:
        ConfigError: `vocab_size` has no room for the special tokens and the bytes, or `folder` holds another
            tokenizer or cannot be written.
        DataError: there is no text.
    """
    smallest = len(SPECIAL_TOKENS) + BYTE_ALPHABET_SIZE
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but {len(SPECIAL_TOKENS)} special tokens and "
            f"{BYTE_ALPHABET_SIZE} bytes need at least {smallest}"
        )
    advice = "name another folder with --out"
    require_folder_place(folder, advice)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with Phase("reading texts, and training the tokenizer"):
        model.train_from_iterator(_pieces_for_training(texts), trainer)
    path, definition = folder / "tokenizer.json", model.to_str(pretty=True)
    with writing(path, advice):
        if path.exists() and read_regular(path) != definition.encode():
            raise ConfigError(
                f"{path} is there already and is not the tokenizer that these texts and options give, which "
                f"would strand the shards and runs that use it: {advice}, or remove that one first"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer_config(folder)
        replace_file(path, definition)
    return load_tokenizer(folder)


def write_tokenizer_config(folder: Path) -> None:
    """Write tokenizer_config.json, which tells transformers what our special tokens are for."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": DOCUMENT,
        "pad_token": PAD,
        "extra_special_tokens": [PARAGRAPH, IMAGE],
        "clean_up_tokenization_spaces": False,
    }
    replace_file(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _pieces_for_training(texts: Iterable[str]) -> Iterator[list[str]]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text.split(BLANK_LINE)
    if empty:
        raise DataError("there is no text to train a tokenizer on")
