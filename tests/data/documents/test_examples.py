"""Examples become documents: who reads what, what is trained on, and what is too long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from metalm.config.model_schema import DecoderConfig, EncoderConfig, ModelConfig
from metalm.config.schema import Overflow
from metalm.data.collate import collate
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.documents.examples import ExampleMaker
from metalm.data.documents.retokenize import SpanRetokenizer
from metalm.data.row import NO_TOKEN, Row, lay_out
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample, ConfigError
from metalm.modalities.image import ImageReader
from reference.encoder_tokenizer import save_tokenizer

PATCHES = 4
LONGEST = 16
MakeMaker = Callable[..., ExampleMaker]


def encoded(text: str) -> ExamplePart:
    return ExamplePart(text, is_encoded=True)


def trained(text: str) -> ExamplePart:
    return ExamplePart(text, is_trained=True)


def image(data: bytes) -> ExamplePart:
    return ExamplePart(data, "image", is_encoded=True)


@pytest.fixture
def make_maker(tokenizer: Tokenizer, encoders: dict[str, EncoderConfig]) -> MakeMaker:
    def make(
        readers: Mapping[str, str],
        overflow: Overflow = "split",
        *,
        length: int = 200,
        own: SpanRetokenizer | None = None,
    ) -> ExampleMaker:
        assert encoders["vision"].image is not None
        return ExampleMaker(
            tokenizer,
            readers,
            media_readers={"vision": ImageReader(encoders["vision"].image)},
            encoders=encoders,
            retokenizer=lambda name: own,
            sequence_length=length,
            overflow=overflow,
        )

    return make


def row_of(maker: ExampleMaker, example: Example, tokenizer: Tokenizer, *, is_open: bool = False) -> Row:
    document = maker.make(example, is_open=is_open).document
    return lay_out([document.decoded(maker.read)], tokenizer)


def trained_tokens(row: Row) -> list[int]:
    """Those that the positions of weight 1 predict."""
    return row.tokens[1:][row.loss_weights[:-1] == 1].tolist()


def test_answers_and_the_end_are_trained_and_inputs_encoded(
    tokenizer: Tokenizer, make_maker: MakeMaker, jpeg: Callable[..., bytes]
) -> None:
    maker = make_maker({"text": "text", "image": "vision"})
    ids = {text: tokenizer.encode([text])[0].tolist() for text in ("the fox", "dog", "\n\n", "lazy", "quick")}
    parts = (
        image(jpeg((1, 2, 3))), encoded("the "), encoded("fox"), trained("dog"),
        ExamplePart("\n\n", is_end=True), encoded("quick"), trained("lazy"),
    )  # fmt: skip
    row = row_of(maker, Example(parts), tokenizer)
    assert row.tokens.tolist() == [
        tokenizer.start_id, *[tokenizer.paragraph_id] * PATCHES, *ids["the fox"], *ids["dog"], *ids["\n\n"],
        *ids["quick"], *ids["lazy"], tokenizer.document_id,
    ]  # fmt: skip
    paragraph, end = tokenizer.paragraph_id, tokenizer.document_id
    assert trained_tokens(row) == [*ids["dog"], paragraph, *ids["lazy"], end]
    assert row.targets is not None
    assert row.targets[row.targets != NO_TOKEN].tolist() == [end]
    assert row.spans["vision"].bounds.tolist() == [[1, 1 + PATCHES]]
    first = 1 + PATCHES
    second = first + len(ids["the fox"]) + len(ids["dog"]) + 1
    assert row.spans["text"].bounds.tolist() == [
        [first, first + len(ids["the fox"])],
        [second, second + len(ids["quick"])],
    ]


def test_an_end_within_is_learnt_where_a_paragraph_stands(
    tokenizer: Tokenizer, make_maker: MakeMaker, encoders: dict[str, EncoderConfig]
) -> None:
    parts = (encoded("fox"), trained("a"), ExamplePart("\n\n", is_end=True), encoded("dog"), trained("b"))
    row = row_of(make_maker({"text": "text"}), Example(parts), tokenizer)
    model = ModelConfig(
        vocab_size=300, decoder=DecoderConfig(num_layers=1, hidden_size=8, num_heads=1), encoders=encoders
    )
    batch = collate([row], model_config=model, sequence_length=32, tp_size=1, pad_id=tokenizer.pad_id)
    (first,), (second,) = (ids.tolist() for ids in tokenizer.encode(["a", "b"]))
    end = tokenizer.document_id
    assert batch.labels[batch.loss_weights == 1].tolist() == [first, end, second, end]
    place = row.tokens.tolist().index(first)
    assert batch.tokens[0, place + 1] == tokenizer.paragraph_id
    assert batch.loss_weights[0, place + 1] == 0


def test_a_prompt_is_the_beginning_of_its_row(
    tokenizer: Tokenizer, make_maker: MakeMaker, jpeg: Callable[..., bytes]
) -> None:
    example = Example((image(jpeg((1, 2, 3))), encoded("fox"), ExamplePart("is"), trained("a"), trained("b")))
    for readers in ({"text": "text", "image": "vision"}, {"image": "vision"}):
        maker = make_maker(readers)
        row = row_of(maker, example, tokenizer)
        prompt = row_of(maker, example.prompt(), tokenizer, is_open=True)
        count = len(prompt.tokens)
        assert prompt.tokens.tolist() == row.tokens[:count].tolist()
        assert {name: spans.bounds.tolist() for name, spans in prompt.spans.items()} == {
            name: spans.bounds.tolist() for name, spans in row.spans.items()
        }
        assert np.flatnonzero(row.loss_weights)[0] == count - 1


def test_an_image_and_its_question_are_one_span_of_one_encoder(
    tokenizer: Tokenizer, make_maker: MakeMaker, jpeg: Callable[..., bytes]
) -> None:
    maker = make_maker({"text": "vision", "image": "vision"})
    data = jpeg((9, 9, 9))
    row = row_of(
        maker, Example((image(data), encoded("a"), image(data), encoded("b"), trained("c"))), tokenizer
    )
    step = PATCHES + 1
    assert row.spans["vision"].bounds.tolist() == [[1, 1 + step], [1 + step, 1 + 2 * step]]
    assert row.spans["vision"].num_patches.tolist() == [PATCHES, PATCHES]


def test_without_an_encoder_a_paragraph_ends_what_was_to_be_encoded(
    tokenizer: Tokenizer, make_maker: MakeMaker
) -> None:
    maker = make_maker({})
    for asked in ("the fox", "the fox\n\n"):
        row = row_of(maker, Example((encoded(asked), trained("dog"))), tokenizer)
        assert tokenizer.decode(row.tokens) == "the fox\n\ndog"
        assert tokenizer.decode(trained_tokens(row)) == "dog"
        assert not row.spans
    row = row_of(maker, Example((encoded("the fox"), ExamplePart("\n\nis"))), tokenizer)
    assert tokenizer.decode(row.tokens) == "the fox\n\nis"


def test_an_empty_part_keeps_two_encoded_texts_apart(tokenizer: Tokenizer, make_maker: MakeMaker) -> None:
    example = Example((encoded("a"), ExamplePart(""), encoded("b"), trained("c")))
    row = row_of(make_maker({"text": "text"}), example, tokenizer)
    assert row.spans["text"].bounds.tolist() == [[1, 2], [2, 3]]


def test_texts_too_long_for_the_encoder_are_split_or_cut(tokenizer: Tokenizer, make_maker: MakeMaker) -> None:
    text = "abcdefgh" * 5
    ids = tokenizer.encode([text])[0].tolist()
    assert len(ids) == 40
    example = Example((encoded(text), trained("z")))
    split = row_of(make_maker({"text": "text"}), example, tokenizer)
    assert split.spans["text"].bounds.tolist() == [[1, 17], [17, 33], [33, 41]]
    assert split.tokens[1:41].tolist() == ids
    for overflow, kept in (("cut_left", ids[-LONGEST:]), ("cut_right", ids[:LONGEST])):
        made = make_maker({"text": "text"}, overflow).make(example)
        assert made.document.parts[0].tokens.tolist() == kept
        assert made.overflowed_tokens == 40 - LONGEST


def test_a_document_longer_than_a_row_is_refused_or_its_texts_are_cut_alike(make_maker: MakeMaker) -> None:
    example = Example(
        (encoded("a" * 12), trained("z" * 5), ExamplePart("\n\n"), encoded("b" * 3), trained("y"))
    )
    readers = {"text": "text"}
    fits = 2 + 12 + 5 + 1 + 3 + 1
    assert len(make_maker(readers, length=fits).make(example).document) == fits
    for overflow in ("split", "cut_left"):
        assert make_maker(readers, overflow, length=fits).make(example).overflowed_tokens == 0
    with pytest.raises(BadSample, match="too_long"):
        make_maker(readers, length=fits - 1).make(example)
    made = make_maker(readers, "cut_right", length=fits - 4).make(example)
    assert [len(part) for part in made.document.parts] == [8, 5, 1, 3, 1]
    assert made.overflowed_tokens == 4
    with pytest.raises(BadSample, match="too_long"):
        make_maker(readers, "cut_right", length=10).make(example)


@pytest.mark.parametrize(("overflow", "kept"), [("cut_left", "bcde"), ("cut_right", "abcd")])
def test_a_text_that_the_decoder_reads_instead_of_an_encoder_is_cut_to_the_row(
    tokenizer: Tokenizer, make_maker: MakeMaker, overflow: Overflow, kept: str
) -> None:
    for asked, following in (("abcde", "\n\nis"), ("abcde", "is"), ("abcde\n\n", "is")):
        example = Example((encoded(asked), ExamplePart(following), trained("z")))
        whole = make_maker({}, overflow).make(example).document
        plain = make_maker({}, "split").make(example).document
        assert [part.tokens.tolist() for part in whole.parts if len(part)] != []
        ids = [token for part in whole.parts for token in part.tokens.tolist()]
        assert ids == [token for part in plain.parts for token in part.tokens.tolist()]
        made = make_maker({}, overflow, length=len(whole) - 1).make(example)
        row = lay_out([made.document], tokenizer)
        assert tokenizer.decode(row.tokens) == f"{kept}\n\nisz"
        assert made.overflowed_tokens == 1
    with pytest.raises(BadSample, match="too_long"):
        make_maker({}, "split", length=len(whole) - 1).make(example)


@pytest.mark.parametrize("overflow", ["split", "cut_left", "cut_right"])
def test_an_encoder_with_a_tokenizer_of_its_own_reads_its_tokens(
    tokenizer: Tokenizer, make_maker: MakeMaker, tmp_path: Path, overflow: Overflow
) -> None:
    own = save_tokenizer(tmp_path)
    maker = make_maker({"text": "text"}, overflow, own=SpanRetokenizer(own, tokenizer, LONGEST))
    short, text = "the fox", "a quick brown fox, über, and lazy dogs"
    example = Example((encoded(short), trained("a"), ExamplePart("\n\n"), encoded(text), trained("z")))
    made = maker.make(example)
    row = lay_out([made.document], tokenizer)
    spans = row.spans["text"]
    lengths = (spans.bounds[:, 1] - spans.bounds[:, 0]).tolist()
    pieces = np.split(spans.ids, np.cumsum(lengths)[:-1])
    texts = [own.decode(ids.tolist()) for ids in pieces]
    assert all(ids.tolist() == own.encode(one).ids for ids, one in zip(pieces, texts, strict=True))
    assert max(lengths) <= LONGEST
    assert texts[0] == short
    body = LONGEST - 2
    if overflow == "split":
        assert "".join(texts[1:]) == text
        assert len(texts) == 1 + -(-len(text.encode()) // body)
    else:
        kept = text[-body:] if overflow == "cut_left" else text[:body]
        assert texts[1:] == [kept]
        assert made.overflowed_tokens == len(text.encode()) - body
    assert trained_tokens(row) == [
        *np.concatenate(tokenizer.encode(["a", "z"])).tolist(),
        tokenizer.document_id,
    ]


def test_readers_that_cannot_read_are_named(
    make_maker: MakeMaker, encoders: dict[str, EncoderConfig], jpeg: Callable[..., bytes]
) -> None:
    with pytest.raises(ConfigError, match="encoder text does not read any image"):
        make_maker({"image": "text"})
    maker = make_maker({"image": "gone"})
    with pytest.raises(ConfigError, match=r"name an encoder of the model in its readers.*\{image: NAME\}"):
        maker.make(Example((image(jpeg((1, 2, 3))), trained("a"))))
