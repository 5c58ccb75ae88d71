"""An exported model that is asked about documents: tasks without a checkpoint, ranks and engines."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tokenizers
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from metalm.config.schema import Overflow
from metalm.conversion.generate import FolderModel
from metalm.conversion.hf_config import exported_encoder
from metalm.conversion.peers import Peers, device_of, joined
from metalm.conversion.row_inputs import model_inputs
from metalm.conversion.shipped.processing_metalm import OWN_TOKENIZER_NAME
from metalm.conversion.tokenizer_files import read_tokenizer
from metalm.data.documents.examples import ExampleMaker
from metalm.data.documents.retokenize import SpanRetokenizer
from metalm.data.row import Row, lay_out
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, ReadPart
from metalm.errors import BadSample
from metalm.evaluation.answering import check_readers
from metalm.evaluation.likelihoods import Ending, Likelihood, by_beginning, of_documents
from metalm.evaluation.task_scores import Evaluated, evaluate_tasks, require_out
from metalm.modalities import Media, modality_of_encoder
from metalm.parallel.launch import Launch
from metalm.tasks.task_file import Decode, TaskFile
from metalm.tasks.ways import TaskSettings

Answer = TypeVar("Answer")

_PIECES, _PIECE_BYTES = 256, 4096
"""Of each file of weights, for its fingerprint: they are read whole once already."""


class Scored(NamedTuple):
    """What a model makes of the trained tokens of a document."""

    likelihood: Likelihood
    is_greedy: bool
    """Whether each is the most likely one at its place."""


class Sampling(NamedTuple):
    """How tokens are drawn; None: as transformers does by itself."""

    temperature: float
    top_p: float | None = None
    top_k: int | None = None


class ExportAnswerer:
    """See `metalm.evaluation.answering.Answerer`; each process has the whole model."""

    def __init__(
        self,
        folder: Path,
        *,
        batch_size: int,
        device: str,
        dtype: torch.dtype | None = None,
        peers: Peers | None = None,
    ) -> None:
        """Load an exported folder.

        Args:
            batch_size: documents at once.
            dtype: of the weights; None: as they are stored.
            peers: those that evaluate it together; None: this process alone.

        Raises:
            ConfigError: the folder cannot be loaded.
            DataError: its tokenizer is not one of ours.
        """
        self._folder, self._batch_size = folder, batch_size
        self._peers = Peers() if peers is None else peers
        self.is_first = self._peers.rank == 0
        self.share, self.num_shares = self._peers.rank, self._peers.size
        loaded = FolderModel(folder, device)
        self._model, self.processor = loaded.model, loaded.processor
        if dtype is not None:
            self._model.to(dtype)
        self.tokenizer = read_tokenizer(folder)
        self._encoders = {
            name: exported_encoder(sizes) for name, sizes in self._model.config.encoders.items()
        }

    @property
    def longest(self) -> int:
        """Positions of the longest document."""
        return int(self._model.config.max_position_embeddings)

    @property
    def num_parameters(self) -> int:
        """Of the model, encoders among them."""
        return int(self._model.num_parameters())

    def maker(
        self,
        readers: Mapping[str, str] | None,
        overflow: Overflow,
        *,
        sequence_length: int | None = None,
    ) -> ExampleMaker:
        """See `Answerer`.

        Args:
            sequence_length: positions that a document may have; None: as many as the model has.
        """
        if readers is None:
            readers = self.processor.readers or {}
        check_readers(readers, self._encoders)
        media_readers = {}
        for name, encoder in self._encoders.items():
            modality = modality_of_encoder(encoder)
            if isinstance(modality, Media):
                media_readers[name] = modality.reader(encoder)
        return ExampleMaker(
            self.tokenizer,
            readers,
            media_readers=media_readers,
            encoders=self._encoders,
            retokenizer=self._retokenizer,
            sequence_length=self.longest if sequence_length is None else sequence_length,
            overflow=overflow,
        )

    def agreed(self, value: Answer) -> Answer:
        """See `Answerer`."""
        return self._peers.agreed(value)

    def gathered(self, value: Answer) -> list[Answer]:
        """See `Answerer`."""
        return self._peers.gathered(value)

    def from_each(self, value: Answer) -> list[Answer]:
        """See `Answerer`."""
        return self._peers.gathered(value)

    def likelihoods(self, documents: Sequence[Document], read: ReadPart) -> list[Likelihood | None]:
        """See `Answerer`."""
        return [None if one is None else one.likelihood for one in self.scored(documents, read)]

    def scored(self, documents: Sequence[Document], read: ReadPart) -> list[Scored | None]:
        """As `likelihoods`, and whether the model would have chosen the tokens itself."""
        begun = by_beginning(documents, self.tokenizer.document_id)

        def answer(rows: Sequence[Row], numbers: Sequence[int]) -> list[list[Scored]]:
            return self._scored(rows, [begun[number].endings for number in numbers])

        said = self._in_batches([one.beginning for one in begun], read, answer)
        return of_documents(begun, said)

    def continuations(
        self,
        prompts: Sequence[Document],
        read: ReadPart,
        decode: Decode,
        *,
        until: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> list[str | None]:
        """See `Answerer`.

        Args:
            until: texts that end a continuation, which is without them.
            sampling: draw tokens instead of taking the most likely ones.
        """

        def answer(rows: Sequence[Row], numbers: Sequence[int]) -> list[str]:
            return self._continuations(rows, decode, until, sampling)

        return self._in_batches(prompts, read, answer)

    def _in_batches(
        self,
        documents: Sequence[Document],
        read: ReadPart,
        answer: Callable[[Sequence[Row], Sequence[int]], list[Answer]],
    ) -> list[Answer | None]:
        order = sorted(range(len(documents)), key=lambda number: (-len(documents[number]), number))
        found: dict[int, Answer] = {}
        for first in range(0, len(order), self._batch_size):
            rows: dict[int, Row] = {}
            for number in order[first : first + self._batch_size]:
                with suppress(BadSample):
                    rows[number] = lay_out([documents[number].decoded(read)], self.tokenizer)
            if rows:
                found |= dict(zip(rows, answer(list(rows.values()), list(rows)), strict=True))
        return [found.get(number) for number in range(len(documents))]

    @torch.no_grad()
    def _scored(self, rows: Sequence[Row], endings: Sequence[Sequence[Ending]]) -> list[list[Scored]]:
        """Of each row's endings: the rows are read once, and each ending behind them."""
        inputs, cache = self._inputs(rows), DynamicCache(config=self._model.config)
        first = self._model(**inputs, past_key_values=cache, logits_to_keep=1).logits
        found: list[list[Scored]] = [[] for _ in rows]
        for of_rows in zip_longest(*endings):
            count = max(len(one.tokens) for one in of_rows if one is not None) - 1
            logits = first
            if count > 0:
                logits = torch.cat((first, self._behind(rows, of_rows, count, inputs, cache)), dim=1)
                cache.crop(-count)
            for row, one in enumerate(of_rows):
                if one is not None:
                    found[row].append(_score(one, logits[row].float()))
        return found

    def _behind(
        self,
        rows: Sequence[Row],
        endings: Sequence[Ending | None],
        count: int,
        inputs: Mapping[str, torch.Tensor],
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Logits [rows, count, vocabulary] behind each ending's tokens but its last; then nothing of use."""
        read = torch.zeros((len(rows), count), dtype=torch.int64)
        for row, one in enumerate(endings):
            if one is not None and len(one.tokens) > 1:
                read[row, : len(one.tokens) - 1] = torch.tensor(one.tokens[:-1])
        own = torch.tensor([[len(row.tokens)] for row in rows])
        last = torch.tensor([[max(len(one.tokens), 1) - 2 if one else -1] for one in endings])
        mask = inputs["attention_mask"]
        device = mask.device
        logits: torch.Tensor = self._model(
            input_ids=read.to(device),
            attention_mask=torch.cat((mask, mask.new_ones(read.shape)), dim=1),
            position_ids=(own + torch.arange(count).minimum(last)).to(device),
            past_key_values=cache,
        ).logits
        return logits

    @torch.no_grad()
    def _continuations(
        self, rows: Sequence[Row], decode: Decode, until: Sequence[str], sampling: Sampling | None
    ) -> list[str]:
        inputs = self._inputs(rows)
        longest = inputs["input_ids"].shape[1]
        how: dict[str, Any] = {"do_sample": sampling is not None}
        if decode.method == "beam":
            how |= {"num_beams": decode.num_beams, "length_penalty": decode.length_penalty}
        if sampling is not None:
            how |= {name: value for name, value in sampling._asdict().items() if value is not None}
        if until:
            how["stopping_criteria"] = StoppingCriteriaList([_Until(until, self.tokenizer, longest)])
        tokens = self._model.generate(**inputs, max_new_tokens=decode.max_new_tokens, **how)
        texts = (
            self.tokenizer.decode(_until_end(ids, self.tokenizer.document_id)) for ids in tokens[:, longest:]
        )
        return [_before_any(text, until) for text in texts]

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        inputs = model_inputs(rows, self._model.config, self._encoders)
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}

    @functools.cache  # noqa: B019 - as long-lived as the model
    def _retokenizer(self, name: str) -> SpanRetokenizer | None:
        file = self._folder / OWN_TOKENIZER_NAME.format(name)
        if not file.is_file():
            return None
        own = tokenizers.Tokenizer.from_file(str(file))
        own.no_padding()
        own.no_truncation()
        return SpanRetokenizer(own, self.tokenizer, self._encoders[name].max_text_positions)


def _score(ending: Ending, logits: torch.Tensor) -> Scored:
    """Of logits [at least its tokens, vocabulary]."""
    log_probabilities = logits[: len(ending.tokens)].log_softmax(dim=-1)
    tokens = torch.tensor(ending.tokens, dtype=torch.int64, device=logits.device)
    weights = torch.tensor(ending.weights, dtype=torch.float64, device=logits.device)
    taken = log_probabilities.gather(1, tokens[:, None])[:, 0].double()
    likelihood = Likelihood(float((taken * weights).sum()), int((weights > 0).sum()))
    is_greedy = (log_probabilities.argmax(dim=-1) == tokens) | (weights == 0)
    return Scored(likelihood, bool(is_greedy.all()))


class _Until(StoppingCriteria):
    """Ends a continuation when one of some texts stands in it, wherever tokens begin and end."""

    def __init__(self, ends: Sequence[str], tokenizer: Tokenizer, start: int) -> None:
        """
        Args:
            start: position of the first token of continuations.
        """
        self._ends, self._tokenizer, self._start = ends, tokenizer, start
        self._most_tokens = max(len(end.encode()) for end in ends)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Of each row of [B, tokens], whether its newest tokens have such a text: [B] bool."""
        newest = input_ids[:, self._start :][:, -self._most_tokens :].tolist()
        texts = map(self._tokenizer.decode, newest)
        return torch.tensor([any(end in text for end in self._ends) for text in texts]).to(input_ids.device)


def evaluate_export(
    folder: Path,
    tasks: Sequence[TaskFile],
    settings: TaskSettings,
    out: Path | None,
    *,
    batch_size: int,
    device: str,
    launch: Launch,
) -> None:
    """Evaluate an exported folder on tasks.

    Args:
        out: where answers and results go; default: `tasks` in the folder.
        device: `cuda`: each process takes a GPU.
        launch: the processes that share the questions out. Their answers are those of one process, bit by
            bit.

    Raises:
        ConfigError, DataError: the folder cannot be loaded; as `evaluate_tasks`.
    """
    own_device = device_of(device, launch)
    with joined(launch) as peers:
        answerer = ExportAnswerer(folder, batch_size=batch_size, device=own_device, peers=peers)
        model = Evaluated(str(folder.resolve()), _fingerprint(folder))
        place = out or folder / "tasks"
        require_out(answerer, place)
        evaluate_tasks(answerer, tasks, settings, model, place, print)


def _fingerprint(folder: Path) -> str:
    """Of an exported folder: configuration, tokenizer, and of the weights their sizes and many pieces."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as handle:
            for piece in range(_PIECES):
                handle.seek(size * piece // _PIECES)
                digest.update(handle.read(_PIECE_BYTES))
    return digest.hexdigest()


def _until_end(ids: torch.Tensor, end: int) -> list[int]:
    tokens: list[int] = ids.tolist()
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _before_any(text: str, ends: Sequence[str]) -> str:
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]
