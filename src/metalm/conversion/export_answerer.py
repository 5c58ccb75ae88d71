"""An exported model that is asked about documents: tasks without a checkpoint, ranks and engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch

from metalm.config.model_schema import TEXT, EncoderConfig, ImageConfig
from metalm.config.schema import Overflow
from metalm.conversion.generate import FolderModel
from metalm.conversion.row_inputs import model_inputs
from metalm.conversion.shipped.processing_metalm import OWN_TOKENIZER_NAME
from metalm.conversion.tokenizer_files import read_tokenizer
from metalm.data.documents.examples import ExampleMaker
from metalm.data.documents.retokenize import SpanRetokenizer
from metalm.data.row import Row, lay_out
from metalm.document import Document, ReadPart
from metalm.errors import BadSample, ConfigError
from metalm.evaluation.answering import Likelihood
from metalm.evaluation.task_scores import evaluate_tasks
from metalm.modalities import MEDIA, Media, modality_of_encoder
from metalm.tasks.task_file import Decode, TaskFile
from metalm.tasks.ways import TaskSettings

Answer = TypeVar("Answer")


class ExportAnswerer:
    """See `metalm.evaluation.answering.Answerer`; one process."""

    is_first = True

    def __init__(self, folder: Path, *, batch_size: int, device: str) -> None:
        """Load an exported folder.

        Args:
            batch_size: documents at once.

        Raises:
            ConfigError: the folder cannot be loaded.
            DataError: its tokenizer is not one of ours.
        """
        self._folder, self._batch_size = folder, batch_size
        self._model = FolderModel(folder, device).model
        self._tokenizer = read_tokenizer(folder)
        self._encoders = {name: _encoder(sizes) for name, sizes in self._model.config.encoders.items()}

    @property
    def longest(self) -> int:
        """Positions of the longest document."""
        return int(self._model.config.max_position_embeddings)

    def maker(self, readers: Mapping[str, str] | None, overflow: Overflow) -> ExampleMaker:
        """See `Answerer`."""
        media_readers = {}
        for name, encoder in self._encoders.items():
            modality = modality_of_encoder(encoder)
            if isinstance(modality, Media):
                media_readers[name] = modality.reader(encoder)
        return ExampleMaker(
            self._tokenizer,
            self._usual_readers() if readers is None else readers,
            media_readers=media_readers,
            encoders=self._encoders,
            retokenizer=self._retokenizer,
            sequence_length=self.longest,
            overflow=overflow,
        )

    def agreed(self, value: Answer) -> Answer:
        """See `Answerer`."""
        return value

    def likelihoods(self, documents: Sequence[Document], read: ReadPart) -> list[Likelihood | None]:
        """See `Answerer`."""
        return self._in_batches(documents, read, self._likelihoods)

    def continuations(self, prompts: Sequence[Document], read: ReadPart, decode: Decode) -> list[str | None]:
        """See `Answerer`."""
        return self._in_batches(prompts, read, lambda rows: self._continuations(rows, decode))

    def _in_batches(
        self, documents: Sequence[Document], read: ReadPart, answer: Callable[[Sequence[Row]], list[Answer]]
    ) -> list[Answer | None]:
        order = sorted(range(len(documents)), key=lambda number: (-len(documents[number]), number))
        found: dict[int, Answer] = {}
        for first in range(0, len(order), self._batch_size):
            rows: dict[int, Row] = {}
            for number in order[first : first + self._batch_size]:
                with suppress(BadSample):
                    rows[number] = lay_out([documents[number].decoded(read)], self._tokenizer)
            if rows:
                found |= dict(zip(rows, answer(list(rows.values())), strict=True))
        return [found.get(number) for number in range(len(documents))]

    @torch.no_grad()
    def _likelihoods(self, rows: Sequence[Row]) -> list[Likelihood]:
        inputs = self._inputs(rows)
        logits = self._model(**inputs).logits.float()
        answers = []
        for row, of_row in zip(rows, logits, strict=True):
            log_probabilities = of_row[-len(row.tokens) : -1].log_softmax(dim=-1)
            tokens = torch.from_numpy(row.tokens[1:].astype("int64")).to(logits.device)
            taken = log_probabilities.gather(1, tokens[:, None])[:, 0].double()
            weights = torch.from_numpy(row.loss_weights[:-1]).to(logits.device)
            answers.append(Likelihood(float((taken * weights).sum()), int((weights > 0).sum())))
        return answers

    @torch.no_grad()
    def _continuations(self, rows: Sequence[Row], decode: Decode) -> list[str]:
        inputs = self._inputs(rows)
        longest = inputs["input_ids"].shape[1]
        beams = {}
        if decode.method == "beam":
            beams = {"num_beams": decode.num_beams, "length_penalty": decode.length_penalty}
        tokens = self._model.generate(
            **inputs,
            max_new_tokens=min(decode.max_new_tokens, self.longest - longest),
            do_sample=False,
            **beams,
        )
        return [
            self._tokenizer.decode(_until_end(ids, self._tokenizer.document_id))
            for ids in tokens[:, longest:]
        ]

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        inputs = model_inputs(rows, self._model.config)
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}

    def _usual_readers(self) -> dict[str, str]:
        """As `Corpus.usual_readers`, of which the export keeps the image encoder."""
        readers = {}
        for modality in MEDIA:
            fitting = [name for name, one in self._encoders.items() if one.section(modality) is not None]
            named = [self._model.config.image_encoder] if modality == "image" else []
            if found := [name for name in (*named, *fitting) if name in fitting]:
                readers[modality] = found[0]
        reading = [name for name, one in self._encoders.items() if one.max_text_positions]
        if reading:
            readers[TEXT] = min(reading, key=lambda name: self._encoders[name].media is not None)
        return readers

    @functools.cache  # noqa: B019 - as long-lived as the model
    def _retokenizer(self, name: str) -> SpanRetokenizer | None:
        file = self._folder / OWN_TOKENIZER_NAME.format(name)
        if not file.is_file():
            return None
        own = tokenizers.Tokenizer.from_file(str(file))
        own.no_padding()
        own.no_truncation()
        return SpanRetokenizer(own, self._tokenizer, self._encoders[name].max_text_positions)


def evaluate_export(
    folder: Path,
    tasks: Sequence[TaskFile],
    settings: TaskSettings,
    out: Path | None,
    *,
    batch_size: int,
    device: str,
) -> None:
    """Evaluate an exported folder on tasks.

    Args:
        out: where answers and results go; default: `tasks` in the folder.

    Raises:
        ConfigError, DataError: the folder cannot be loaded; as `evaluate_tasks`.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: {error}") from None
    answerer = ExportAnswerer(folder, batch_size=batch_size, device=device)
    evaluate_tasks(answerer, tasks, settings, str(folder.resolve()), out or folder / "tasks", print)


def _encoder(sizes: Mapping[str, Any]) -> EncoderConfig:
    """What of an exported encoder says what it reads."""
    image = None
    if sizes["image_size"] is not None:
        image = ImageConfig(image_size=sizes["image_size"], patch_size=sizes["patch_size"])
    return EncoderConfig(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        num_heads=sizes["num_attention_heads"],
        max_text_positions=sizes["max_text_positions"],
        image=image,
    )


def _until_end(ids: torch.Tensor, end: int) -> list[int]:
    tokens: list[int] = ids.tolist()
    return tokens[: tokens.index(end)] if end in tokens else tokens
