"""Fixed rows of a held-out source, the same ones each time and on any number of ranks; and its first samples.

Rows are made from the samples in the order of the index. Two rules make pairs comparable: the prefix has
length 0, so that the whole caption is predicted from the image or clip alone, and the first caption is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np

from metalm.batch import SemiCausalBatch
from metalm.config.model_schema import TEXT
from metalm.data.corpus import Corpus
from metalm.data.documents.maker import NUM_DRAWS, DocumentMaker
from metalm.data.documents.pairs import PairMaker
from metalm.data.documents.spans import SpanSampler, text_document
from metalm.data.micro_batch import RowObjective, make_micro_batch
from metalm.data.order.sample_order import SequentialOrder
from metalm.data.order.streams import Stream
from metalm.data.packing.continuous import ContinuousPacker
from metalm.data.row import Row, empty_row, lay_out
from metalm.data.sources import Source
from metalm.data.storage.locations import SampleLocation
from metalm.document import Document
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities import MEDIA

_SEED = 0
"""Of the spans, so that runs with different seeds are evaluated on the same rows."""

_NO_DRAWS = (0.0,) * NUM_DRAWS

PackedRows = list[list[int]]
"""Of each row, the numbers of its samples."""


@dataclass(frozen=True)
class HeldOutSample:
    """A sample as the model is asked about it, and as people look at it, or listen to it."""

    document: Document
    """Decoded: of a pair the image or clip and the first caption, of text its body without a reader."""
    media: Any
    """What `Media.decode` gives, of an example of its first image or clip; None: text alone."""
    captions: tuple[str, ...] = ()
    """What may be said at its end: the captions of a pair, the last answer of an example."""
    modality: str = TEXT
    """Of `media`."""
    num_asked: int | None = None
    """Parts that the model is given to find a caption; None: it goes on with the text itself."""


def evaluation_batches(
    corpus: Corpus,
    source: Source,
    objective: RowObjective,
    *,
    num_rows: int,
    packed: PackedRows | None,
    dp_rank: int,
    dp_size: int,
    tp_size: int,
    cp_size: int = 1,
    wrong_media: bool = False,
) -> Iterator[SemiCausalBatch]:
    """Micro-batches of the first `num_rows` rows of a source of `corpus.held_out`, for one rank.

    Row i goes to rank i mod dp_size. Every rank gets the same number of full micro-batches: rows of
    padding stand in where there is none, as they do when the source has fewer rows.

    Args:
        packed: what `pack_held_out` answers for so many rows.
        wrong_media: give each pair the image or clip of another pair among these rows, half of them away.

    Raises:
        ConfigError: `wrong_media` for a source of text.
        DataError: fewer than two pairs with `wrong_media`.
    """
    if wrong_media and source.media is None:
        raise ConfigError(f"evaluation source {source.name} has no images or clips to exchange")
    own = slice(dp_rank, None, dp_size)
    rows: Iterator[Row]
    if packed is None:
        rows = islice(_text_rows(corpus, source, num_rows), dp_rank, None, dp_size)
    elif source.media is not None:
        rows = _pair_rows(corpus, source, packed, own, wrong_media)
    else:
        rows = _example_rows(corpus, source, packed, own)
    micro_batch_size = corpus.config.training.micro_batch_size
    num_batches = -(-num_rows // (dp_size * micro_batch_size))
    for _ in range(num_batches):
        batch = list(islice(rows, micro_batch_size))
        full = objective.arrange(batch + [empty_row()] * (micro_batch_size - len(batch)))
        yield make_micro_batch(full, corpus, objective, tp_size, cp_size)


def held_out_samples(corpus: Corpus, source: Source, count: int) -> list[HeldOutSample]:
    """The first `count` usable samples of a source, in the order of its index."""
    maker = corpus.document_maker(source)
    samples: list[HeldOutSample] = []
    for location in _in_order(source):
        if len(samples) == count:
            break
        try:
            samples.append(_sample(source, maker, location))
        except BadSample:
            continue
    return samples


def _sample(source: Source, maker: DocumentMaker | None, location: SampleLocation) -> HeldOutSample:
    if maker is None:
        return HeldOutSample(text_document(source.token_ids(location)), None)
    document = maker.finish(maker.look(source, location), _NO_DRAWS).document
    first = next((part for part in document.parts if part.is_media), None)
    media, modality = None, TEXT
    if first is not None:
        assert isinstance(first.content, (bytes, memoryview))
        media, modality = MEDIA[first.modality].decode(first.content), first.modality
    num_asked = 1
    captions = [] if source.media is None else source.captions(location)
    if not captions:
        num_asked, answer = _last_answer(document)
        captions = [source.tokenizer.decode(answer)]
    return HeldOutSample(document.decoded(maker.read), media, tuple(captions), modality, num_asked)


def _last_answer(document: Document) -> tuple[int, np.ndarray]:
    """How many parts stand before the last ones that are trained on, and the tokens of those."""
    end = max(number for number, part in enumerate(document.parts) if part.weight and len(part)) + 1
    start = end
    while start and document.parts[start - 1].weight:
        start -= 1
    return start, np.concatenate([part.tokens for part in document.parts[start:end]])


def _text_rows(corpus: Corpus, source: Source, num_rows: int) -> Iterator[Row]:
    config = corpus.config
    packer = ContinuousPacker(
        source,
        SequentialOrder(source.index),
        0,
        sequence_length=config.data.sequence_length,
        spans=SpanSampler(config.data.spans, Stream(_SEED, f"evaluation spans of {source.name}")),
        max_consecutive_failures=config.data.max_consecutive_failures,
        retokenizer=corpus.retokenizer(source),
    )
    for number in range(num_rows):
        row = packer.next_row()
        if row is None:
            return
        yield replace(row, dropout_seed=number)  # of what an objective draws for the row


def pack_held_out(corpus: Corpus, source: Source, num_rows: int) -> PackedRows | None:
    """Which samples make the first rows of a source, in the order of its index; None for one of text.

    Reads each of these samples. Bad ones are left out. Of pairs there is room for the largest image or clip
    in each one's place, so that they can be exchanged.

    Args:
        source: of `corpus.held_out`.
        num_rows: rows at most.

    Raises:
        ConfigError, DataError: what makes its documents cannot be used, or a shard cannot be read.
    """
    size_of = _size_of_samples(corpus, source)
    if size_of is None:
        return None
    rows: PackedRows = []
    room = 0
    for location in _in_order(source):
        try:
            size = size_of(location)
        except BadSample:
            continue
        if size > room:
            if len(rows) == num_rows:
                break
            rows.append([])
            room = corpus.config.data.sequence_length
        rows[-1].append(location.sample)
        room -= size
    return rows


def _size_of_samples(corpus: Corpus, source: Source) -> Callable[[SampleLocation], int] | None:
    """How many positions a sample of a source takes in a row; raises BadSample of a bad one."""
    if source.media is not None:
        pairs = corpus.pair_maker(source)

        def size_of_pair(location: SampleLocation) -> int:
            pairs.media_part(source.main_member(location))  # a bad header shows here
            return pairs.max_vectors + len(_caption(source, pairs, location)) + 2

        return size_of_pair
    maker = corpus.document_maker(source)
    if maker is None:
        return None
    return lambda location: len(maker.finish(maker.look(source, location), _NO_DRAWS).document)


def _pair_rows(
    corpus: Corpus, source: Source, packed: PackedRows, own: slice, wrong_media: bool
) -> Iterator[Row]:
    assert source.media is not None
    maker = corpus.pair_maker(source)
    pairs = list(chain.from_iterable(packed))
    if wrong_media and len(pairs) < 2:
        name = source.media.noun
        raise DataError(f"evaluation source {source.name} has one pair: its {name} cannot be exchanged")
    shift = len(pairs) // 2 if wrong_media else 0
    first_pairs = list(accumulate((len(row) for row in packed), initial=0))
    for first, row in list(zip(first_pairs, packed, strict=False))[own]:
        documents: list[Document] = []
        for number, sample in enumerate(row, start=first):
            other = pairs[(number + shift) % len(pairs)]
            captioned, shown = source.index.locate(np.array([sample, other]))
            try:
                media = maker.media_part(source.main_member(shown))
                caption = _caption(source, maker, captioned)
                documents.append(maker.document(media, caption).decoded(maker.read))
            except BadSample:
                continue
        yield lay_out(documents, source.tokenizer, source.source_id) if documents else empty_row()


def _caption(source: Source, maker: PairMaker, location: SampleLocation) -> np.ndarray:
    """The tokens of the first caption, as far as they fit beside the largest image or clip."""
    ids = source.tokenizer.encode([source.captions(location)[0]])[0]
    return ids[: maker.longest_caption(maker.max_vectors)]


def _example_rows(corpus: Corpus, source: Source, packed: PackedRows, own: slice) -> Iterator[Row]:
    maker = corpus.document_maker(source)
    assert maker is not None
    for row in packed[own]:
        documents: list[Document] = []
        for location in source.index.locate(np.array(row)):
            try:
                document = maker.finish(maker.look(source, location), _NO_DRAWS).document.decoded(maker.read)
            except BadSample:
                continue
            documents.append(document)
        yield lay_out(documents, source.tokenizer, source.source_id) if documents else empty_row()


def _in_order(source: Source) -> Iterator[SampleLocation]:
    for sample in range(source.index.num_samples):
        yield from source.index.locate(np.array([sample]))
