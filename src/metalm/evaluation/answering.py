"""What is asked of a model about documents: how likely their answers are, and how it goes on from prompts.

`EngineAnswerer` asks the engines of a checkpoint on the ranks of its topology; that of an exported folder is
in `metalm.conversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

import torch.distributed as dist

from metalm.config.schema import Overflow
from metalm.data.collate import collate
from metalm.data.corpus import Corpus
from metalm.data.documents.examples import ExampleMaker
from metalm.data.row import Row, lay_out
from metalm.data.usual_readers import usual_readers
from metalm.document import Document, ReadPart
from metalm.errors import BadSample, ConfigError
from metalm.evaluation.generation import EvaluatedModel, evaluating, generate_by_beams, generate_greedily
from metalm.objectives import encode
from metalm.parallel.topology import Topology
from metalm.tasks.task_file import Decode

Answer = TypeVar("Answer")


class Likelihood(NamedTuple):
    """Of the trained tokens of a document."""

    total: float
    """Sum of their log-likelihoods, natural."""
    num_tokens: int


class Answerer(Protocol):
    """A model that is asked. Documents are open, and their images and clips may not be decoded yet."""

    is_first: bool
    """Whether this process speaks for all that answer together."""
    share: int
    num_shares: int
    """Processes that answer apart: each is asked every `num_shares`-th group of questions, from its `share`
    on. Those of one share answer together."""

    def gathered(self, value: Answer) -> list[Answer]:
        """The values of all shares, in all."""
        ...

    def agreed(self, value: Answer) -> Answer:
        """The first process's value, in all."""
        ...

    def maker(self, readers: Mapping[str, str] | None, overflow: Overflow) -> ExampleMaker:
        """What makes documents of examples.

        Args:
            readers: the encoder of each modality; None: those that the model was trained with.

        Raises:
            ConfigError: the model has no such encoder.
        """
        ...

    def likelihoods(self, documents: Sequence[Document], read: ReadPart) -> list[Likelihood | None]:
        """Of the trained tokens of each document; None: one of its images or clips cannot be decoded.

        Args:
            read: see `Document.decoded`.
        """
        ...

    def continuations(self, prompts: Sequence[Document], read: ReadPart, decode: Decode) -> list[str | None]:
        """What the model generates after each prompt; None as above."""
        ...


def check_readers(readers: Mapping[str, str], encoders: Collection[str]) -> None:
    """
    Raises:
        ConfigError: an encoder is none of the model's.
    """
    for modality, name in readers.items():
        if name not in encoders:
            known = ", ".join(encoders) or "none"
            raise ConfigError(f"the reader of {modality} is {name!r}, but the model's encoders are {known}")


class EngineAnswerer:
    """The engines of a checkpoint. All methods are collective: all ranks, with the same documents."""

    def __init__(self, model: EvaluatedModel, topology: Topology, corpus: Corpus, *, batch_size: int) -> None:
        """
        Args:
            batch_size: documents that a data-parallel rank takes at once.
        """
        self.is_first = topology.rank == 0
        self.share, self.num_shares = 0, 1
        self._model, self._topology, self._corpus = model, topology, corpus
        self._batch_size = batch_size

    def maker(self, readers: Mapping[str, str] | None, overflow: Overflow) -> ExampleMaker:
        """See `Answerer`."""
        if readers is None:
            readers = usual_readers(self._corpus.config)
        check_readers(readers, self._corpus.config.model.encoders)
        return self._corpus.example_maker(readers, overflow=overflow)

    def agreed(self, value: Answer) -> Answer:
        """See `Answerer`."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._topology.world_group)
        return values[0]

    def gathered(self, value: Answer) -> list[Answer]:
        """See `Answerer`."""
        return [value]

    def likelihoods(self, documents: Sequence[Document], read: ReadPart) -> list[Likelihood | None]:
        """See `Answerer`."""
        return self._shared(documents, read, self._likelihoods)

    def continuations(self, prompts: Sequence[Document], read: ReadPart, decode: Decode) -> list[str | None]:
        """See `Answerer`."""
        return self._shared(prompts, read, lambda rows: self._continuations(rows, decode))

    def _shared(
        self,
        documents: Sequence[Document],
        read: ReadPart,
        answer: Callable[[Sequence[Row]], list[Answer]],
    ) -> list[Answer | None]:
        """The answers to all documents, shared out over the data-parallel ranks by their lengths."""
        topology = self._topology
        order = sorted(range(len(documents)), key=lambda number: (-len(documents[number]), number))
        own = order[topology.data_rank :: topology.data_size]
        num_batches = -(-len(documents) // (topology.data_size * self._batch_size))
        mine: dict[int, Answer] = {}
        for batch in range(num_batches):
            rows: dict[int, Row] = {}
            for number in own[batch * self._batch_size : (batch + 1) * self._batch_size]:
                with suppress(BadSample):
                    rows[number] = lay_out([documents[number].decoded(read)], self._corpus.tokenizer)
            # Every rank has as many batches, and a row at least: sharded weights are gathered together.
            answers = answer(list(rows.values()) or [lay_out([_NOTHING], self._corpus.tokenizer)])
            mine |= dict(zip(rows, answers, strict=False))
        gathered: list[dict[int, Answer]] = [{} for _ in range(topology.replica_size)]
        dist.all_gather_object(gathered, mine, group=topology.replica_host_group)
        found = {number: answer for one in gathered for number, answer in one.items()}
        return [found.get(number) for number in range(len(documents))]

    def _continuations(self, rows: Sequence[Row], decode: Decode) -> list[str]:
        config, tokenizer = self._corpus.config, self._corpus.tokenizer
        asked = (self._model, self._topology, config, tokenizer, rows, decode.max_new_tokens)
        if decode.method == "greedy":
            tokens = generate_greedily(*asked)
        else:
            tokens = generate_by_beams(
                *asked, num_beams=decode.num_beams, length_penalty=decode.length_penalty
            )
        return [tokenizer.decode(ids) for ids in tokens]

    def _likelihoods(self, rows: Sequence[Row]) -> list[Likelihood]:
        config, topology = self._corpus.config, self._topology
        multiple = config.parallel.length_multiple
        longest = max(len(row.tokens) for row in rows)
        batch = collate(
            rows,
            model_config=config.model,
            sequence_length=-(-longest // multiple) * multiple,
            tp_size=topology.tensor_size,
            pad_id=self._corpus.tokenizer.pad_id,
            cp_size=topology.context_size,
        ).to(topology.device)
        with evaluating(self._model):
            losses = self._model.decoder(batch, encode(self._model, batch, topology))
        totals = -(losses.double() * batch.loss_weights).sum(dim=1)
        if topology.context_size > 1:
            dist.all_reduce(totals, group=topology.context_group)
        counts = (batch.loss_weights > 0).sum(dim=1)
        return [Likelihood(*one) for one in zip(totals.tolist(), counts.tolist(), strict=True)]


_NOTHING = Document((), ends=False)
