"""Spans in an encoder's own tokens: nothing of the text is lost, and rows stay as long as they may be."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from metalm.config.model_schema import EncoderConfig, ModelConfig
from metalm.config.schema import SourceConfig, SpanConfig
from metalm.data.collate import collate
from metalm.data.documents.retokenize import SpanRetokenizer, load_retokenizer
from metalm.data.documents.spans import SpanSampler
from metalm.data.order.sample_order import SequentialOrder
from metalm.data.order.streams import Stream
from metalm.data.packing.continuous import ContinuousPacker
from metalm.data.sources import Source, open_sources
from metalm.data.storage.index import build_index
from metalm.data.tokenizer import Tokenizer
from metalm.errors import DataError
from reference.encoder_tokenizer import save_tokenizer

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "zebra", "quartz"]
LONGEST = 40


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    encoders: dict[str, EncoderConfig],
    write_shard: Callable[..., None],
) -> Source:
    """Forty documents of ASCII words, a tenth of them of one word."""
    folder = tmp_path_factory.mktemp("words")
    draw = np.random.default_rng(5)
    samples = []
    for number in range(40):
        count = 1 if number % 10 == 0 else int(draw.integers(3, 60))
        body = tokenizer.encode([" ".join(draw.choice(WORDS, count))])[0]
        samples.append({"u16": body.astype("<u2").tobytes()})
    write_shard(folder / "words-00000.tar", samples)
    build_index(folder, kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
    return open_sources({"words": SourceConfig(path=folder, readers={"text": "text"})}, tokenizer, encoders)[
        0
    ]


@pytest.fixture(scope="module", params=["bytes", "words"])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    """Tokens that make rows longer, or shorter."""
    folder = tmp_path_factory.mktemp("own")
    return save_tokenizer(folder, words=None if request.param == "bytes" else [" ".join(WORDS)] * 50)


def packer_of(
    source: Source, own: tokenizers.Tokenizer, length: int, state: dict | None = None, longest: int = LONGEST
) -> ContinuousPacker:
    return ContinuousPacker(
        source,
        SequentialOrder(source.index),
        0,
        sequence_length=length,
        spans=SpanSampler(SpanConfig(fraction=0.4, min_length=2, max_length=9), Stream(1, "test")),
        max_consecutive_failures=3,
        retokenizer=SpanRetokenizer(own, source.tokenizer, longest),
        state=state,
    )


@pytest.mark.parametrize("length", [24, 61, 200])
def test_the_text_of_all_rows_is_that_of_the_documents(
    source: Source, own: tokenizers.Tokenizer, length: int
) -> None:
    shared, found, num_spans, num_grown = source.tokenizer, "", 0, 0
    for row in iter(packer_of(source, own, length).next_row, None):
        assert len(row.tokens) <= length
        assert row.document_ends == sorted(set(row.document_ends))
        assert row.document_ends[-1] == len(row.tokens)
        at = first = 0
        spans = row.spans.get("text")
        bounds = [] if spans is None else spans.bounds.tolist()
        for start, end in bounds:
            ids = spans.ids[first : first + end - start]
            text = own.decode(ids.tolist(), skip_special_tokens=True)
            assert ids.tolist() == own.encode(text).ids  # the encoder's special tokens are there
            assert shared.decode(row.tokens[start : start + 1])[:1] == text[:1]
            found += shared.decode(row.tokens[at:start]) + text
            num_grown += end - start > len(shared.encode([text])[0])
            at, first, num_spans = end, first + end - start, num_spans + 1
        found += shared.decode(row.tokens[at:])
    locations = source.index.locate(np.arange(source.index.num_samples))
    assert found == "".join(shared.decode(source.token_ids(location)) for location in locations)
    assert num_spans > 10
    assert num_grown > 5 or length < 60


@pytest.mark.parametrize("length", [24, 61, 200])
def test_any_row_can_be_resumed_from(source: Source, own: tokenizers.Tokenizer, length: int) -> None:
    whole = packer_of(source, own, length)
    while True:
        state = whole.state()
        resumed = packer_of(source, own, length, state)
        row, again = whole.next_row(), resumed.next_row()
        if row is None:
            assert again is None
            break
        assert again is not None
        np.testing.assert_array_equal(row.tokens, again.tokens)
        assert (row.document_ends, row.next_token) == (again.document_ends, again.next_token)
        assert row.spans.keys() == again.spans.keys()
        for name, spans in row.spans.items():
            np.testing.assert_array_equal(spans.bounds, again.spans[name].bounds)
            np.testing.assert_array_equal(spans.ids, again.spans[name].ids)
        assert whole.state() == resumed.state()
    assert whole.counters.samples == source.index.num_samples


def test_the_next_token_of_a_cut_row_is_the_first_of_the_following(
    source: Source, own: tokenizers.Tokenizer
) -> None:
    rows = list(iter(packer_of(source, own, 61).next_row, None))
    for row, following in itertools.pairwise(rows):
        begins_anew = following.tokens[0] == source.tokenizer.start_id
        assert row.next_token == (-1 if begins_anew else following.tokens[0])


def test_spans_that_are_too_long_for_the_encoder_stay_text(source: Source, own: tokenizers.Tokenizer) -> None:
    rows = list(iter(packer_of(source, own, 61, longest=2).next_row, None))
    assert not any(row.spans["text"].bounds.size for row in rows if "text" in row.spans)
    assert sum(len(row.tokens) for row in rows[:-1]) == 61 * (len(rows) - 1)


def test_the_encoder_reads_its_own_tokens_and_the_rest_is_trained(
    source: Source, own: tokenizers.Tokenizer
) -> None:
    encoder = EncoderConfig(
        num_layers=1,
        hidden_size=8,
        num_heads=1,
        max_text_positions=LONGEST,
        pretrained={"path": "unused", "definition": {"model_type": "bert"}},
    )
    model = ModelConfig(
        vocab_size=source.tokenizer.size,
        decoder={"num_layers": 1, "hidden_size": 8, "num_heads": 1},
        encoders={"text": encoder},
    )
    rows = [row for row in iter(packer_of(source, own, 61).next_row, None) if row.spans][:4]
    pad = source.tokenizer.pad_id
    for tp_size in (1, 2):
        batch = collate(rows, model_config=model, sequence_length=61, tp_size=tp_size, pad_id=pad)
        found = {}
        for share in batch.encoders["text"].shares:
            for position, start in enumerate(share.attention_start.tolist()):
                if share.attention_end[position] > position == start:
                    span = slice(start, int(share.attention_end[position]))
                    found[tuple(share.token_ids[span].tolist())] = share.positions[span].tolist()
            assert int(share.token_ids.max()) < own.get_vocab_size()
        expected = []
        for b, row in enumerate(rows):
            spans, first = row.spans["text"], 0
            for start, end in spans.bounds.tolist():
                expected.append(tuple(spans.ids[first : first + end - start].tolist()))
                first += end - start
                assert int(batch.labels[b, start - 1]) == int(row.tokens[start])
                assert batch.loss_weights[b, start : end - 1].sum() == 0
                assert (batch.tokens[b, start:end] == pad).all()
        assert expected
        assert all(found[ids] == list(range(len(ids))) for ids in expected)
        docked = sum(len(ids) for ids in expected)
        assert len(batch.encoders["text"].dock_positions) == docked


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def encoder(vocab_size: int) -> EncoderConfig:
        pretrained = {"path": tmp_path, "definition": {"model_type": "bert", "vocab_size": vocab_size}}
        return EncoderConfig(
            num_layers=1, hidden_size=8, num_heads=1, max_text_positions=8, pretrained=pretrained
        )

    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        load_retokenizer(encoder(300), tokenizer)
    save_tokenizer(tmp_path)
    assert load_retokenizer(encoder(300), tokenizer) is not None
    with pytest.raises(DataError, match="ids, the encoder beside it 100"):
        load_retokenizer(encoder(100), tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        load_retokenizer(encoder(300), tokenizer)
