"""The proof of a conversion: what the exported folder says beside what the checkpoint's own model does.

Compared are the logits of prompts, and the tokens that the folder generates after them, with a cache and
without: each has to be the most likely one of the checkpoint's own model after those before it. The two
sides share nothing but the weights' values: the training data path and the checkpoint's names on one, the
processor and plain transformers in a process of its own on the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from metalm.config import EncoderConfig
from metalm.config.model_schema import TEXT
from metalm.conversion import plain_transformers
from metalm.conversion.checkpoint_source import CheckpointSource
from metalm.conversion.reference import reference_logits
from metalm.data.collate import collate
from metalm.data.documents.retokenize import load_retokenizer
from metalm.data.documents.spans import text_document
from metalm.data.row import Row, lay_out
from metalm.document import Document, Part
from metalm.errors import CheckpointError
from metalm.modalities import Media, modality_of_encoder

TOLERANCE = 1e-4
"""Largest difference between two logits, in float32."""
TIE = 2 * TOLERANCE
"""So far the most likely token of one side may be below that of the other, on the other's side."""
NUM_NEW_TOKENS = 24
WAYS = ("cached", "uncached")
"""Of generating, as plain_transformers.py knows them."""

_BEFORE = "A language model reads what stands before.\n\nThen it comes to"
_SPAN = " a few words that are encoded as a whole,"
_AFTER = " and it writes what follows them."
_LONGEST_ROW = 1024
_CAPTION = "a picture of a red square above a blue circle"


@dataclass(frozen=True)
class ProofPrompt:
    """One prompt as the processor takes it."""

    text: str
    media: str | None = None
    """Modality of its image or clip."""
    file: bytes = b""
    """Of that."""


@dataclass(frozen=True)
class ProofCase:
    """One prompt, as the processor and as the training data path take it."""

    name: str
    prompt: ProofPrompt
    row: Row


@dataclass(frozen=True)
class ProofResult:
    """How far the exported model is from the checkpoint's own on one prompt."""

    name: str
    num_tokens: int
    largest_difference: float
    largest_logit: float
    same_argmax: int
    """Positions at which both have the same most likely token."""
    num_generated: int
    """Tokens that were generated with a cache, and again without, each the checkpoint's own most likely."""


@dataclass(frozen=True)
class ExportedAnswer:
    """What an exported folder says to one prompt."""

    logits: torch.Tensor
    """[tokens, vocabulary] float32."""
    generated: dict[str, torch.Tensor]
    """By way of generating, the tokens that follow the prompt."""
    step_logits: dict[str, torch.Tensor]
    """By way of generating, [tokens, vocabulary] float32 that they are the most likely of."""


def prove(source: CheckpointSource, folder: Path, dtype: torch.dtype) -> list[ProofResult]:
    """Compare logits and generated tokens, in float32 with the weights as they were exported.

    Args:
        source: the checkpoint.
        folder: the exported folder.
        dtype: of the exported weights.

    Raises:
        CheckpointError: the folder does not load in transformers, a logit differs by more than TOLERANCE,
            or a generated token is not the checkpoint's own.
    """
    cases = proof_cases(source)
    exported = exported_answers(folder, [case.prompt for case in cases])
    own = _own_logits(source, [case.row for case in cases], dtype)
    results = [_compare(*sides) for sides in zip(cases, own, exported, strict=True)]
    if bad := [result for result in results if not result.largest_difference <= TOLERANCE]:
        raise CheckpointError(
            "the exported model is not the checkpoint's: "
            + "; ".join(f"{r.name}: logits differ by {r.largest_difference:.3g}" for r in bad)
            + f" (at most {TOLERANCE:g} is allowed)"
        )
    # By themselves, for sums in another order would take their share of TOLERANCE.
    for way in WAYS:
        tokens = [answer.generated[way] for answer in exported]
        rows = [_continued(case.row, more) for case, more in zip(cases, tokens, strict=True)]
        for case, more, logits in zip(cases, tokens, _own_logits(source, rows, dtype), strict=True):
            likely = logits[len(case.row.tokens) - 1 : len(case.row.tokens) - 1 + len(more)]
            check_generated(f"{case.name}, {way}", likely, more)
    return results


def _own_logits(source: CheckpointSource, rows: list[Row], dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each row by the checkpoint's own model."""
    batch = collate(
        rows,
        model_config=source.config.model,
        sequence_length=max(len(row.tokens) for row in rows),
        tp_size=1,
        pad_id=source.tokenizer.pad_id,
    )
    logits = reference_logits(source.config.model, partial(source.read, dtype=dtype), batch)
    return [one[: len(row.tokens)] for one, row in zip(logits, rows, strict=True)]


def check_generated(name: str, logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Refuse generated tokens that are not the most likely ones of the model that they are held against.

    Two sides whose logits differ by TOLERANCE may order two tokens differently that are twice that apart, and
    no further: nearer ones are tied.

    Args:
        name: of what was generated.
        logits: [tokens, vocabulary] float32 of the other model, each after all tokens before.
        tokens: [tokens], as they were generated.

    Raises:
        CheckpointError: one is not.
    """
    behind = logits.amax(dim=-1) - logits.gather(-1, tokens[:, None])[:, 0]
    if len(wrong := (~(behind <= TIE)).nonzero()):
        place = int(wrong[0])
        raise CheckpointError(
            f"{name}: generated token {place + 1} of {len(tokens)} is {int(tokens[place])}, expected "
            f"{int(logits[place].argmax())}: the folder's code does not generate as its model was trained"
        )


def _continued(row: Row, tokens: torch.Tensor) -> Row:
    """A prompt's row with what was generated after it."""
    return replace(
        row,
        tokens=np.append(row.tokens, tokens.numpy().astype(row.tokens.dtype)),
        loss_weights=np.append(row.loss_weights, np.zeros(len(tokens), np.float32)),
        document_ends=[end + len(tokens) for end in row.document_ends],
    )


def proof_cases(source: CheckpointSource) -> list[ProofCase]:
    """Plain text, and for each encoder a span of what it reads."""
    tokenizer = source.tokenizer
    ids = tokenizer.encode([_BEFORE + _AFTER])[0]
    row = lay_out([Document((Part(TEXT, ids),), ends=False)], tokenizer)
    cases = [ProofCase("text", ProofPrompt(_BEFORE + _AFTER), row)]
    for name, encoder in source.config.model.encoders.items():
        case = _text_case if encoder.media is None else _media_case
        cases.append(case(source, name, encoder))
    return cases


def _text_case(source: CheckpointSource, name: str, encoder: EncoderConfig) -> ProofCase:
    words = _fitting(source, _SPAN, encoder.max_text_positions)
    before, span, after = source.tokenizer.encode([_BEFORE, words, _AFTER])
    bounds = [(len(before), len(before) + len(span))]
    text = np.concatenate((before, span, after))
    documents = [text_document(text, bounds, name, ends=False)]
    if (retokenizer := load_retokenizer(encoder, source.tokenizer)) is not None:
        documents, _ = retokenizer.refit(documents, _LONGEST_ROW)
    marked = f"{_BEFORE}<span:{name}>{words}</span>{_AFTER}"
    row = lay_out(documents, source.tokenizer)
    return ProofCase(f"text with a span of {name}", ProofPrompt(marked), row)


def _media_case(source: CheckpointSource, name: str, encoder: EncoderConfig) -> ProofCase:
    modality = modality_of_encoder(encoder)
    assert isinstance(modality, Media)
    words = _fitting(source, f"Summarize this {modality.name}:", encoder.max_text_positions)
    prefix, caption = source.tokenizer.encode([words, _CAPTION])
    data, reader = modality.proof_file(encoder), modality.reader(encoder)
    media = modality.part(data, reader, name, source.tokenizer.paragraph_id)
    document = Document((media, Part(TEXT, prefix, name), Part(TEXT, caption)), ends=False)
    row = lay_out([document.decoded(lambda _: reader.read(data))], source.tokenizer)
    text = f"<span:{name}><{modality.name}>{words}</span>{_CAPTION}"
    title = f"{modality.name} and text of {name}"
    return ProofCase(title, ProofPrompt(text, modality.name, data), row)


def _fitting(source: CheckpointSource, words: str, max_tokens: int) -> str:
    """As many leading characters as make at most `max_tokens` tokens."""
    while len(source.tokenizer.encode([words])[0]) > max_tokens:
        words = words[:-1]
    return words


def exported_answers(
    folder: Path, asked: list[ProofPrompt], ways: tuple[str, ...] = WAYS
) -> list[ExportedAnswer]:
    """What a folder says to each prompt, from a process of its own.

    Raises:
        CheckpointError: it does not work there.
    """
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        prompts = []
        for number, prompt in enumerate(asked):
            place = scratch / f"{number}.media"
            place.write_bytes(prompt.file)
            prompts.append({"text": prompt.text, "media": prompt.media, "path": str(place)})
        questions = {"prompts": prompts, "ways": ways, "num_new_tokens": NUM_NEW_TOKENS}
        (scratch / "prompts.json").write_text(json.dumps(questions))
        out = scratch / "answers.safetensors"
        script = Path(plain_transformers.__file__)
        done = subprocess.run(
            [sys.executable, "-I", script, folder.resolve(), scratch / "prompts.json", out],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise CheckpointError(
                f"the exported folder does not work in transformers:\n{done.stderr[-2000:]}"
            )
        answers = load_file(out)
    none = torch.zeros(0, dtype=torch.long)
    return [
        ExportedAnswer(
            answers[f"logits/{number}"],
            {way: answers.get(f"{way}/{number}", none) for way in ways},
            {way: answers.get(f"logits_{way}/{number}", none) for way in ways},
        )
        for number in range(len(asked))
    ]


def _compare(case: ProofCase, own: torch.Tensor, answer: ExportedAnswer) -> ProofResult:
    exported = answer.logits
    if own.shape != exported.shape:
        raise CheckpointError(
            f"{case.name}: the exported model gives logits {list(exported.shape)}, "
            f"the checkpoint's {list(own.shape)}"
        )
    return ProofResult(
        case.name,
        len(own),
        float((own - exported).abs().max()),
        float(own.abs().max()),
        int((own.argmax(dim=-1) == exported.argmax(dim=-1)).sum()),
        len(answer.generated["cached"]),
    )
