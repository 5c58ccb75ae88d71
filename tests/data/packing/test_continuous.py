"""Documents reach the decoder whole: no token lost, repeated or out of place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metalm.config.model_schema import EncoderConfig
from metalm.config.schema import RunConfig, SourceConfig, SpanConfig
from metalm.data.corpus import Corpus
from metalm.data.documents.spans import SpanSampler
from metalm.data.lanes import Lane, Mixture
from metalm.data.order.sample_order import SequentialOrder
from metalm.data.order.streams import Stream
from metalm.data.packing.continuous import ContinuousPacker
from metalm.data.sources import Source, open_sources
from metalm.data.storage.index import build_index
from metalm.data.tokenizer import Tokenizer

NO_SPANS = SpanSampler(SpanConfig(fraction=0.0), Stream(1, "no spans"))


def packer_of(
    source: Source, length: int, spans: SpanSampler = NO_SPANS, state: dict | None = None
) -> ContinuousPacker:
    return ContinuousPacker(
        source,
        SequentialOrder(source.index),
        0,
        sequence_length=length,
        spans=spans,
        max_consecutive_failures=3,
        state=state,
    )


@pytest.fixture
def source(
    text_source: Callable[..., Path], tokenizer: Tokenizer, encoders: dict[str, EncoderConfig]
) -> Source:
    folder = text_source([25, 15])
    config = SourceConfig(path=folder, readers={"text": "text"})
    return open_sources({"prose": config}, tokenizer, encoders)[0]


def framed_documents(source: Source) -> list[list[int]]:
    tokenizer = source.tokenizer
    locations = source.index.locate(np.arange(source.index.num_samples))
    return [
        [tokenizer.start_id, *source.token_ids(location).tolist(), tokenizer.document_id]
        for location in locations
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 16, 61, 5000])
def test_rows_end_to_end_are_the_documents_end_to_end(source: Source, length: int) -> None:
    packer = packer_of(source, length)
    rows = list(iter(packer.next_row, None))
    documents = framed_documents(source)
    stream = np.concatenate(documents)
    np.testing.assert_array_equal(np.concatenate([row.tokens for row in rows]), stream)
    assert all(len(row.tokens) == length for row in rows[:-1])

    ends = np.cumsum([len(document) for document in documents])
    for number, row in enumerate(rows):
        first, last = number * length, number * length + len(row.tokens)
        inside = ends[(ends > first) & (ends <= last)]
        expected = np.unique(np.append(inside, last)) - first
        np.testing.assert_array_equal(row.document_ends, expected)
        assert row.next_token == (-1 if last in ends else stream[last])


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_a_packer_goes_on_from_its_state_after_any_row(source: Source, length: int) -> None:
    whole = packer_of(source, length)
    resumed = packer_of(source, length)
    while (expected := whole.next_row()) is not None:
        resumed = packer_of(source, length, state=resumed.state())
        row = resumed.next_row()
        assert row is not None
        np.testing.assert_array_equal(row.tokens, expected.tokens)
        np.testing.assert_array_equal(row.document_ends, expected.document_ends)
        assert row.next_token == expected.next_token
        assert resumed.state() == whole.state()


def test_spans_cover_neither_start_nor_end_nor_two_documents(source: Source) -> None:
    config = SpanConfig(fraction=0.9, min_length=2, max_length=5)
    packer = packer_of(source, 40, SpanSampler(config, Stream(1, "spans")))
    special = {source.tokenizer.start_id, source.tokenizer.document_id}
    num_spans = 0
    while (row := packer.next_row()) is not None:
        for start, end in row.spans["text"].bounds if row.spans else []:
            assert not special & set(row.tokens[start:end].tolist())
            document = np.searchsorted(row.document_ends, start, side="right")
            assert end <= row.document_ends[document]
            num_spans += 1
    assert num_spans > 100
    assert packer.counters.span_tokens > 2.5 * num_spans


def test_raw_text_gives_the_rows_of_its_tokens(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    tokenizer: Tokenizer,
    write_shard: Callable[..., None],
) -> None:
    texts = [f"the quick fox {number}\n\njumps over " * (number % 4 + 1) for number in range(12)]
    for name in ("raw", "tokens"):
        (tmp_path / name).mkdir()
    write_shard(tmp_path / "raw" / "a.tar", [{"txt": text.encode()} for text in texts])
    ids = [ids.astype("<u2").tobytes() for ids in tokenizer.encode(texts)]
    write_shard(tmp_path / "tokens" / "a.tar", [{"u16": body} for body in ids])
    build_index(tmp_path / "raw", kind="text")
    build_index(tmp_path / "tokens", kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
    lanes = []
    for name in ("raw", "tokens"):
        config = make_config({"prose": {"path": tmp_path / name, "readers": {"text": "text"}}})
        lanes.append(Lane(Mixture(Corpus(config)), 1))
    for _ in range(30):
        raw, tokens = (lane.next_row() for lane in lanes)
        np.testing.assert_array_equal(raw.tokens, tokens.tokens)
    assert tokenizer.paragraph_id in raw.tokens
