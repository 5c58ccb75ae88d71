"""Rows that documents are laid out in, against what was drawn and the plain rule of PAPER section 3."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metalm.data.documents.spans import text_document
from metalm.data.row import NO_TOKEN, Row, lay_out
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, Part
from reference import model as plain
from reference import rows as plain_rows
from reference.rows import loss_weights

WEIGHTS = (0.0, 0.5, 1.0)
VECTORS, VALUES = 3, 5


def text(ids: list[int] | np.ndarray, reader: str | None = None, weight: float = 1.0) -> Part:
    return Part("text", np.asarray(ids, np.int32), reader, weight)


def image(tokenizer: Tokenizer, seed: int = 0, reader: str = "vision", weight: float = 1.0) -> Part:
    patches = np.random.default_rng(seed).integers(0, 256, (VECTORS, VALUES), dtype=np.uint8)
    return Part("image", np.full(VECTORS, tokenizer.paragraph_id, np.int32), reader, weight, patches)


@dataclass
class Drawn:
    """Documents, and what their row must be, known from how they were drawn."""

    documents: list[Document] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    token_weights: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    spans: dict[str, list[tuple[int, int, Part | None]]] = field(default_factory=dict)

    def write(self, ids: list[int] | np.ndarray, weight: float = 1.0) -> None:
        self.tokens += [int(token) for token in ids]
        self.token_weights += [weight] * len(ids)


def draw_document(
    random: np.random.Generator, tokenizer: Tokenizer, drawn: Drawn, *, begins: bool, ends: bool
) -> None:
    """Stretches that the decoder reads, of no token too, and spans: an image, text, or both."""
    parts: list[Part] = []
    span_reader = None
    if begins:
        drawn.write([tokenizer.start_id])

    def add(part: Part) -> None:
        parts.append(part)
        drawn.write(part.tokens, part.weight)

    def ids(smallest: int) -> np.ndarray:
        return random.integers(5, 260, random.integers(smallest, 5))

    for _ in range(random.integers(0, 7)):
        if random.random() < 0.3:
            add(text(ids(0), None, random.choice(WEIGHTS)))
            span_reader = None
            continue
        reader = str(random.choice(["text", "vision", "sketch"]))
        has_image = reader != "text" and random.random() < 0.6
        if reader == span_reader and not has_image:
            add(text([]))
        start = len(drawn.tokens)
        pieces = [text(ids(0), reader, random.choice(WEIGHTS)) for _ in range(random.integers(0, 3))]
        if has_image:
            pieces.insert(0, image(tokenizer, int(random.integers(99)), reader, random.choice(WEIGHTS)))
        elif not sum(map(len, pieces)):
            pieces.append(text(ids(1), reader, random.choice(WEIGHTS)))
        for piece in pieces:
            add(piece)
        lead = pieces[0] if has_image else None
        drawn.spans.setdefault(reader, []).append((start, len(drawn.tokens), lead))
        span_reader = reader
    if ends:
        drawn.write([tokenizer.document_id], parts[-1].weight if parts else 1.0)
    drawn.ends.append(len(drawn.tokens))
    drawn.documents.append(Document(tuple(parts), begins=begins, ends=ends))


def check(row: Row, drawn: Drawn) -> None:
    assert row.tokens.dtype == np.int32 and row.loss_weights.dtype == np.float32
    assert row.tokens.tolist() == drawn.tokens
    assert row.document_ends == drawn.ends
    assert row.spans.keys() == drawn.spans.keys()
    for reader, expected in drawn.spans.items():
        found = row.spans[reader]
        assert found.bounds.tolist() == [[start, end] for start, end, _ in expected]
        leads = [lead for *_, lead in expected]
        assert found.num_patches.tolist() == [0 if lead is None else VECTORS for lead in leads]
        media = [lead.decoded_content for lead in leads if lead is not None]
        if media:
            np.testing.assert_array_equal(found.media, np.concatenate(media))
        else:
            assert found.media is None
        assert found.ids is None
    goes_on = row.next_token != -1
    bounds = [(start, end) for spans in drawn.spans.values() for start, end, _ in spans]
    last = drawn.documents[-1].parts
    weights = [*drawn.token_weights, last[-1].weight if last else 1.0]
    expected = loss_weights(len(drawn.tokens), drawn.ends, bounds, goes_on=goes_on, token_weights=weights)
    assert row.loss_weights.tolist() == expected.tolist()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), begins=st.booleans(), goes_on=st.booleans())
def test_rows_of_any_documents(
    tokenizer: Tokenizer, seed: int, count: int, begins: bool, goes_on: bool
) -> None:
    random, drawn = np.random.default_rng(seed), Drawn()
    for number in range(count):
        draw_document(
            random,
            tokenizer,
            drawn,
            begins=begins or number > 0,
            ends=not goes_on or number < count - 1,
        )
    assume(np.diff([0, *drawn.ends]).all())  # no stretch of a document is empty
    row = lay_out(drawn.documents, tokenizer, source_id=3, next_token=77 if goes_on else NO_TOKEN)
    assert (row.next_token, row.source_id) == (77 if goes_on else -1, 3)
    check(row, drawn)


def test_check_value_of_the_objective(tokenizer: Tokenizer) -> None:
    document = Document((text([10, 11, 12]), text([13, 14, 15, 16], "text"), text([17, 18, 19])))
    row = lay_out([document], tokenizer)
    assert len(row.tokens) == 12 and row.spans["text"].bounds.tolist() == [[4, 8]]
    assert row.loss_weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_text_with_random_spans_is_trained_as_the_paper_prints(tokenizer: Tokenizer, seed: int) -> None:
    """The case of weight 1 everywhere, against the formula's sums over targets; spans may touch."""
    random = np.random.default_rng(seed)
    body = random.integers(5, 260, random.integers(1, 60))
    cuts = np.unique(random.integers(0, len(body) + 1, 2 * random.integers(0, 5)))
    spans = np.array([(a, b) for a, b in itertools.pairwise(cuts) if random.random() < 0.6], np.int64)
    document = text_document(body, spans.reshape(-1, 2), "text", begins=True, ends=True)
    row = lay_out([document], tokenizer)
    tokens = [tokenizer.start_id, *body.tolist(), tokenizer.document_id]
    assert row.tokens.tolist() == tokens
    framed = [plain_rows.Span("text", 1 + int(start), 1 + int(end)) for start, end in spans]
    assert ([] if not framed else row.spans["text"].bounds.tolist()) == [[s.start, s.end] for s in framed]
    targets = plain.trained_targets(plain_rows.Document(tokens, framed))
    expected = np.zeros(len(tokens))
    expected[np.array(targets) - 1] = 1
    assert row.loss_weights.tolist() == expected.tolist()


def test_an_empty_part_of_the_decoder_keeps_touching_spans_apart(tokenizer: Tokenizer) -> None:
    first, second = text([10, 11], "text"), text([12, 13, 14], "text")
    joined = lay_out([Document((first, second))], tokenizer)
    assert joined.spans["text"].bounds.tolist() == [[1, 6]]
    assert joined.loss_weights.tolist() == [1, 0, 0, 0, 0, 1, 0]
    apart = lay_out([Document((first, text([]), second))], tokenizer)
    assert apart.spans["text"].bounds.tolist() == [[1, 3], [3, 6]]
    assert apart.loss_weights.tolist() == [1, 0, 1, 0, 0, 1, 0]
    unread = lay_out([Document((first, text([], "text"), second))], tokenizer)
    assert unread.spans["text"].bounds.tolist() == [[1, 6]]


def test_spans_never_reach_over_documents(tokenizer: Tokenizer) -> None:
    document = Document((text([10, 11], "text"),), begins=False, ends=False)
    row = lay_out([document, document], tokenizer)
    assert row.document_ends == [2, 4]
    assert row.spans["text"].bounds.tolist() == [[0, 2], [2, 4]]
    assert row.loss_weights.tolist() == [0, 0, 0, 0]


def test_every_image_leads_a_span_of_its_own(tokenizer: Tokenizer) -> None:
    """Two images of one encoder side by side, the second with text, and text of the same encoder alone."""
    pictures = [image(tokenizer, seed) for seed in (1, 2)]
    parts = (*pictures, text([10, 11], "vision"), text([12]), text([13, 14], "vision"), text([15]))
    row = lay_out([Document(parts)], tokenizer)
    spans = row.spans["vision"]
    assert spans.bounds.tolist() == [[1, 4], [4, 9], [10, 12]]
    assert spans.num_patches.tolist() == [3, 3, 0]
    assert spans.media is not None
    np.testing.assert_array_equal(spans.media, np.concatenate([p.decoded_content for p in pictures]))
    assert row.loss_weights.tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0]


def test_own_ids_of_spans_stand_end_to_end(tokenizer: Tokenizer) -> None:
    parts = [replace(text([9] * size, "text"), content=np.arange(size) + 100 * size) for size in (2, 3)]
    row = lay_out([Document((parts[0], text([]), parts[1]))], tokenizer)
    assert row.spans["text"].ids is not None and row.spans["text"].media is None
    assert row.spans["text"].ids.tolist() == [200, 201, 300, 301, 302]


def finetuning(tokenizer: Tokenizer) -> Document:
    """An instruction and an image that are read and not learnt, and an answer."""
    return Document(
        (
            text([10, 11, 12], "text", weight=0.0),
            image(tokenizer, weight=0.0),
            text([13, 14], "vision", weight=0.0),
            text([15, 16, 17]),
        )
    )


def test_of_a_finetuning_document_the_answer_and_its_end_are_learnt(tokenizer: Tokenizer) -> None:
    document = finetuning(tokenizer)
    row = lay_out([document, document], tokenizer)
    labels = row.tokens.tolist()[1:]
    learnt = [label for label, weight in zip(labels, row.loss_weights, strict=False) if weight]
    assert learnt == [15, 16, 17, tokenizer.document_id] * 2
    assert row.loss_weights.tolist() == ([0] * 8 + [1] * 4 + [0]) * 2
    assert row.spans["text"].bounds.tolist() == [[1, 4], [14, 17]]
    assert row.spans["vision"].bounds.tolist() == [[4, 9], [17, 22]]


def test_the_end_of_a_document_weighs_what_its_last_part_weighs(tokenizer: Tokenizer) -> None:
    row = lay_out([Document((text([10]), text([11], weight=0.25)))], tokenizer)
    assert row.loss_weights.tolist() == [1, 0.25, 0.25, 0]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_document_that_goes_on_predicts_its_next_token_with_its_weight(
    tokenizer: Tokenizer, weight: float
) -> None:
    goes_on = Document((text([10]), text([11, 12], "text", weight)), ends=False)
    row = lay_out([Document((text([8]),)), goes_on], tokenizer, next_token=99)
    assert row.next_token == 99
    assert row.document_ends == [3, 7]
    assert row.loss_weights.tolist() == [1, 1, 0, 1, weight, 0, weight]


def test_a_prompt_is_the_open_beginning_of_its_document(tokenizer: Tokenizer) -> None:
    document = finetuning(tokenizer)
    whole = lay_out([document], tokenizer)
    for num_parts, size in enumerate((1, 4, 7, 9, 12)):
        prompt = lay_out([document.prompt(num_parts)], tokenizer)
        assert prompt.tokens.tolist() == whole.tokens[:size].tolist()
        assert prompt.document_ends == [size] and prompt.next_token == -1
        assert prompt.loss_weights[-1] == 0
    asked = lay_out([document.prompt(3)], tokenizer)
    assert {name: spans.bounds.tolist() for name, spans in asked.spans.items()} == {
        "text": [[1, 4]],
        "vision": [[4, 9]],
    }
    np.testing.assert_array_equal(asked.spans["vision"].media, whole.spans["vision"].media)


@pytest.mark.parametrize("begins", [True, False])
def test_a_document_can_be_cut_anywhere(tokenizer: Tokenizer, begins: bool) -> None:
    parts = (text([10, 11]), text([12, 13, 14], "text"), text([]), text([15], "text"), text([16, 17, 18]))
    document = Document(parts, begins=begins)
    whole = lay_out([document], tokenizer)
    spans = whole.spans["text"].bounds.tolist()
    for length in range(1, len(document)):
        cut = document.cut(length)
        assert len(cut) == length and cut.begins == begins and not cut.ends
        next_token = int(whole.tokens[length])
        row = lay_out([cut], tokenizer, next_token=next_token)
        assert row.tokens.tolist() == whole.tokens[:length].tolist()
        assert row.document_ends == [length] and row.next_token == next_token
        bounds = [(start, min(end, length)) for start, end in spans if start < length]
        found = row.spans["text"].bounds.tolist() if bounds else []
        assert found == [list(span) for span in bounds]
        assert row.loss_weights.tolist() == loss_weights(length, [length], bounds, goes_on=True).tolist()
