"""Fixed rows of a held-out source, the same ones each time and on any number of ranks.

Rows are made from the samples in the order of the index. Two rules make pairs comparable: the prefix has
length 0, so that the whole caption is predicted from the image or clip alone, and the first caption is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, chain, islice

import numpy as np

from metalm.batch import SemiCausalBatch
from metalm.config.schema import MEDIA_OF_KIND, RunConfig
from metalm.data.failures import BadSample
from metalm.data.media import MediaReader, media_reader, pair_encoder
from metalm.data.micro_batch import make_micro_batch, with_spans
from metalm.data.order import SequentialOrder
from metalm.data.pair_rows import Pair, longest_caption, pair_row
from metalm.data.retokenize import load_retokenizer
from metalm.data.rows import Row, empty_row
from metalm.data.sources import Source, open_sources
from metalm.data.spans import SpanSampler
from metalm.data.streams import Stream
from metalm.data.text_rows import TextPacker
from metalm.data.tokenizer import load_tokenizer
from metalm.errors import ConfigError, DataError

_SEED = 0
"""Of the spans, so that runs with different seeds are evaluated on the same rows."""


def evaluation_batches(
    config: RunConfig,
    source_name: str,
    *,
    num_rows: int,
    dp_rank: int,
    dp_size: int,
    tp_size: int,
    wrong_media: bool = False,
) -> Iterator[SemiCausalBatch]:
    """Micro-batches of the first `num_rows` rows of a source of data.evaluation, for one rank.

    Row i goes to rank i mod dp_size. Every rank gets the same number of full micro-batches: rows of
    padding stand in where there is none, as they do when the source has fewer rows.

    Args:
        wrong_media: give each pair the image or clip of another pair among these rows, half of them away.

    Raises:
        ConfigError: there is no such source, or `wrong_media` for a source of text.
        DataError: as `open_sources`; fewer than two pairs with `wrong_media`.
    """
    source_config = config.data.evaluation.get(source_name)
    if source_config is None:
        raise ConfigError(
            f"data.evaluation has no source {source_name!r}, only {', '.join(config.data.evaluation)}"
        )
    if wrong_media and source_config.kind == "text":
        raise ConfigError(f"evaluation source {source_name} has no images or clips to exchange")
    tokenizer = load_tokenizer(config.data.tokenizer)
    (source,) = open_sources({source_name: source_config}, tokenizer)
    if source_config.kind == "text":
        rows: Iterator[Row] = islice(_text_rows(config, source, num_rows), dp_rank, None, dp_size)
    else:
        rows = _pair_rows(config, source, num_rows, slice(dp_rank, None, dp_size), wrong_media)
    micro_batch_size = config.training.micro_batch_size
    num_batches = -(-num_rows // (dp_size * micro_batch_size))
    for _ in range(num_batches):
        batch = list(islice(rows, micro_batch_size))
        full = with_spans(batch + [empty_row()] * (micro_batch_size - len(batch)), config)
        yield make_micro_batch(full, config, tokenizer, tp_size)
    source.reader.close()


def _text_rows(config: RunConfig, source: Source, num_rows: int) -> Iterator[Row]:
    spans = retokenizer = None
    if source.config.encoder is not None:
        spans = SpanSampler(config.data.spans, Stream(_SEED, f"evaluation spans of {source.name}"))
        retokenizer = load_retokenizer(config.model.encoders[source.config.encoder], source.tokenizer)
    packer = TextPacker(
        source,
        SequentialOrder(source.index),
        0,
        sequence_length=config.data.sequence_length,
        spans=spans,
        max_consecutive_failures=config.data.max_consecutive_failures,
        retokenizer=retokenizer,
    )
    for number in range(num_rows):
        row = packer.next_row()
        if row is None:
            return
        yield replace(row, dropout_seed=number)  # of what replaced-token detection masks


def _pair_rows(
    config: RunConfig, source: Source, num_rows: int, own: slice, wrong_media: bool
) -> Iterator[Row]:
    reader = media_reader(pair_encoder(config, source.name, source.config))
    pairs_of_rows = _pack_in_order(source, num_rows, reader, config.data.sequence_length)
    pairs = list(chain.from_iterable(pairs_of_rows))
    if wrong_media and len(pairs) < 2:
        name = MEDIA_OF_KIND[source.config.kind]
        raise DataError(f"evaluation source {source.name} has one pair: its {name} cannot be exchanged")
    shift = len(pairs) // 2 if wrong_media else 0
    first_pairs = list(accumulate((len(row) for row in pairs_of_rows), initial=0))
    for first, row in list(zip(first_pairs, pairs_of_rows, strict=False))[own]:
        shown: list[Pair] = []
        media: list[np.ndarray] = []
        for number, pair in enumerate(row, start=first):
            other = pairs[(number + shift) % len(pairs)]
            try:
                media.append(reader.read(source.media(other.location)))
            except BadSample:
                continue
            shown.append(pair._replace(num_patches=other.num_patches))
        yield pair_row(shown, media, source) if shown else empty_row()


def _pack_in_order(
    source: Source, num_rows: int, reader: MediaReader, sequence_length: int
) -> list[list[Pair]]:
    """The pairs of the first rows, each row filled in the order of the index. Bad samples are left out.

    There is room for the largest member in each pair's place, so members can be exchanged.
    """
    longest = longest_caption(reader.max_patches, sequence_length)
    rows: list[list[Pair]] = []
    room = 0
    for sample in range(source.index.num_samples):
        (location,) = source.index.locate(np.array([sample]))
        try:
            caption = source.captions(location)[0]
            num_patches = reader.count_patches(source.media(location))
        except BadSample:
            continue
        kept = source.tokenizer.encode([caption])[0][:longest]
        largest = Pair(location, reader.max_patches, kept, 0)
        if largest.size > room:
            if len(rows) == num_rows:
                break
            rows.append([])
            room = sequence_length
        rows[-1].append(largest._replace(num_patches=num_patches))
        room -= largest.size
    return rows
