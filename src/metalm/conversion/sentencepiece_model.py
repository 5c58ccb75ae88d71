"""SentencePiece models as tokenizers of `tokenizers`, proven by SentencePiece itself.

transformers converts them too, but its older releases to other ids than the model's own, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

_BLANK = "\u2581"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _USER_DEFINED = 1, 4
"""Types of pieces: what text is made of, and what is always one piece."""
_OF_NO_TEXT = (2, 3, 5)
"""Unknown, control and unused ones."""
UNLIKELY = 1000.0
"""Of a logarithm: less likely than any other pieces of a text."""


def read_sentencepiece(content: bytes, probes: Sequence[str]) -> tokenizers.Tokenizer:
    """The tokenizer that a model is, with the same ids.

    Args:
        content: of a .model file.
        probes: texts by which it is compared with the model.

    Raises:
        ImportError: sentencepiece or protobuf is not installed.
        ValueError: it is no such model, or of a kind that `tokenizers` has no means for.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # whose classes are made as it is imported
    try:
        reference = sentencepiece.SentencePieceProcessor(model_proto=content)
        model = messages.ModelProto.FromString(content)
        tokenizer = _convert(model)
        _keep_from_forging(tokenizer, model, reference)
    except Exception as error:  # of what is no such model, whatever its parsers raise
        raise ValueError(f"it is no SentencePiece model that can be read: {error}") from None
    whole = _pieces_of(model, _USER_DEFINED)[:1]
    for text in (*probes, *(f"{symbol}{text}{symbol}" for symbol in whole for text in probes)):
        expected = reference.encode(text)
        # Unknown letters in a row may be one token or several.
        if reference.unk_id() not in expected:
            found = tokenizer.encode(text, add_special_tokens=False).ids
            if found != expected:
                raise ValueError(f"its settings cannot be had in a tokenizer.json: other ids for {text!r}")
    return tokenizer


def _convert(model: Any) -> tokenizers.Tokenizer:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    whole = _pieces_of(model, _USER_DEFINED)
    if trainer.model_type == _BPE:
        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                {piece.piece: number for number, piece in enumerate(model.pieces)},
                _merges(model.pieces),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                ignore_merges=bool(whole),
            )
        )
    elif trainer.model_type == _UNIGRAM:
        lowest = min(piece.score for piece in model.pieces) - UNLIKELY
        of_text = (_NORMAL, _USER_DEFINED)
        tokenizer = tokenizers.Tokenizer(
            models.Unigram(
                [(piece.piece, piece.score if piece.type in of_text else lowest) for piece in model.pieces],
                trainer.unk_id,
                trainer.byte_fallback,
            )
        )
    else:
        raise ValueError(f"it is of model type {trainer.model_type}; read are unigram (1) and bpe (2)")

    steps: list[normalizers.Normalizer] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z| +(?= )"), ""))
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if normalizer.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _BLANK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if whole:
        longest_first = sorted(whole, key=len, reverse=True)
        tokenizer.pre_tokenizer = _split("|".join(map(re.escape, longest_first)))
    back: list[decoders.Decoder] = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.add_special_tokens(_pieces_of(model, *_OF_NO_TEXT))  # decoding leaves them out
    tokenizer.encode_special_tokens = True
    return tokenizer


def _keep_from_forging(tokenizer: tokenizers.Tokenizer, model: Any, reference: Any) -> None:
    """Break spellings of control tokens in a text where the tokenizer would take them for these.

    A BPE takes a whole one between user-defined symbols, and a Unigram any one with letters that it has no
    piece for. They are broken behind the first piece that SentencePiece makes of them.
    """
    symbols = _pieces_of(model, _USER_DEFINED)[:1]
    # A Unigram's pieces may begin with the blank in front of a word.
    ends = (r"\A", r"\z") if model.trainer_spec.model_type == _BPE else (f"{_BLANK}?", "")
    breaks = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
    for spelled in _pieces_of(model, *_OF_NO_TEXT):
        texts = [f"a{spelled} {spelled}", *(f"{symbol}{spelled}{symbol}" for symbol in symbols)]
        number = reference.piece_to_id(spelled)
        if any(
            number in tokenizer.encode(text, add_special_tokens=False).ids
            and number not in reference.encode(text)
            for text in texts
        ):
            pieces = [piece.lstrip(_BLANK) for piece in reference.encode(spelled, out_type=str)]
            begin = next((piece for piece in pieces if piece and spelled.startswith(piece)), spelled[0])
            rest = re.escape(spelled[len(begin) :])
            breaks.append(_split(f"{ends[0]}{re.escape(begin)}(?={rest}{ends[1]})"))
    if breaks:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(breaks)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def _pieces_of(model: Any, *types: int) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type in types]


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the most likely piece first."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    found = [
        (-score, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]
