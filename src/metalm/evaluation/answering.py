"""What is asked of a model about documents: how likely their answers are, and how it goes on from prompts.

`EngineAnswerer` asks the engines of a checkpoint on the ranks of its topology; that of an exported folder is
in `metalm.conversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Protocol, TypeVar

import torch.distributed as dist

from metalm.config.schema import Overflow
from metalm.data.corpus import Corpus
from metalm.data.documents.examples import ExampleMaker
from metalm.data.row import Row, lay_out
from metalm.data.usual_readers import usual_readers
from metalm.document import Document, ReadPart
from metalm.errors import BadSample, ConfigError, MetaLMError
from metalm.evaluation.continued_rows import ContinuedRows
from metalm.evaluation.generation import EvaluatedModel, evaluating, generate_by_beams, generate_greedily
from metalm.evaluation.likelihoods import Likelihood, by_beginning, likelihoods, of_documents
from metalm.parallel.topology import Topology
from metalm.tasks.task_file import Decode

Answer = TypeVar("Answer")


class Answerer(Protocol):
    """A model that is asked. Documents are open, and their images and clips may not be decoded yet."""

    is_first: bool
    """Whether this process speaks for all that answer together."""
    share: int
    num_shares: int
    """Processes that answer apart: each is asked every `num_shares`-th group of questions, from its `share`
    on. Those of one share answer together."""

    def gathered(self, value: Answer) -> list[Answer]:
        """The values of all shares, in all; of one in which a process has an error, that."""
        ...

    def from_each(self, value: Answer) -> list[Answer]:
        """The values of all processes, in all."""
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
            documents: from the first trained part on, their parts are text that the decoder reads.
            read: see `Document.decoded`.
        """
        ...

    def continuations(self, prompts: Sequence[Document], read: ReadPart, decode: Decode) -> list[str | None]:
        """What the model generates after each prompt; None as above.

        Args:
            prompts: leave as many positions of a row free as tokens may be generated.
        """
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
        errors = self.from_each(value if isinstance(value, MetaLMError) else None)
        return [next((error for error in errors if error is not None), value)]

    def from_each(self, value: Answer) -> list[Answer]:
        """See `Answerer`."""
        values = [value] * self._topology.world_size
        dist.all_gather_object(values, value, group=self._topology.world_group)
        return values

    def likelihoods(self, documents: Sequence[Document], read: ReadPart) -> list[Likelihood | None]:
        """See `Answerer`."""
        begun = by_beginning(documents, self._corpus.tokenizer.document_id)

        def answer(
            rows: Sequence[Row], numbers: Sequence[int], together: Sequence[int]
        ) -> list[list[Likelihood]]:
            endings = [begun[number].endings for number in numbers] or [[]]
            lengths = ([len(one.tokens) for one in begun[number].endings] for number in together)
            longest = [max(turn) for turn in zip_longest(*lengths, fillvalue=0)]
            with evaluating(self._model):
                return likelihoods(self._continued(rows), endings, longest)

        said = self._shared([one.beginning for one in begun], read, answer)
        return of_documents(begun, said)

    def continuations(self, prompts: Sequence[Document], read: ReadPart, decode: Decode) -> list[str | None]:
        """See `Answerer`."""
        return self._shared(prompts, read, lambda rows, *_: self._continuations(rows, decode))

    def _shared(
        self,
        documents: Sequence[Document],
        read: ReadPart,
        answer: Callable[[Sequence[Row], Sequence[int], Sequence[int]], list[Answer]],
    ) -> list[Answer | None]:
        """The answers to all documents, shared out over the data-parallel ranks by their lengths.

        Args:
            answer: gives those to rows, which are of these documents by number; of none there is one row.
                Last come the numbers of all ranks' documents that are answered in the same batch.
        """
        topology = self._topology
        order = sorted(range(len(documents)), key=lambda number: (-len(documents[number]), number))
        at_once = topology.data_size * self._batch_size
        mine: dict[int, Answer] = {}
        for first in range(0, len(order), at_once):
            together = order[first : first + at_once]
            rows: dict[int, Row] = {}
            for number in together[topology.data_rank :: topology.data_size]:
                with suppress(BadSample):
                    rows[number] = lay_out([documents[number].decoded(read)], self._corpus.tokenizer)
            # Every rank has as many batches, and a row at least: sharded weights are gathered together.
            nothing = [lay_out([_NOTHING], self._corpus.tokenizer)]
            answers = answer(list(rows.values()) or nothing, list(rows), together)
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

    def _continued(self, rows: Sequence[Row]) -> ContinuedRows:
        config, tokenizer = self._corpus.config, self._corpus.tokenizer
        return ContinuedRows(self._model, self._topology, config, tokenizer, rows)


_NOTHING = Document((), ends=False)
