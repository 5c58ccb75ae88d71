"""The batch against a reference that goes through the rows position by position, from PAPER alone."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metalm.batch import SemiCausalBatch
from metalm.config.model_schema import ModelConfig
from metalm.data.collate import collate
from metalm.data.row import Row, RowSpans, empty_row, lay_out
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, Part
from metalm.kernels import IntervalMask
from metalm.modalities import MEDIA
from metalm.modalities.image import cut_patches, encode_png
from reference.rows import loss_weights

PAD, PATCHES, PATCH_BYTES = 4, 4, 192
SHAPE = {"num_layers": 1, "hidden_size": 8, "num_heads": 2}
MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 300,
        "decoder": SHAPE,
        "encoders": {
            "text": {**SHAPE, "max_text_positions": 64},
            "vision": {
                **SHAPE,
                "max_text_positions": 64,
                "image": {"image_size": 16, "patch_size": 8},
            },
        },
    }
)


def collated(rows: list[Row], length: int, tp_size: int = 1) -> SemiCausalBatch:
    return collate(rows, model_config=MODEL, sequence_length=length, tp_size=tp_size, pad_id=PAD)


def text_row(length: int, spans: list[tuple[int, int]], *, next_token: int = -1) -> Row:
    bounds = np.array(spans, np.int64).reshape(-1, 2)
    return Row(
        np.arange(10, 10 + length, dtype=np.int32),
        loss_weights(length, [length], spans, goes_on=next_token != -1),
        [length],
        next_token,
        {"text": RowSpans(bounds, np.zeros(len(bounds), np.int64))},
    )


def test_check_value_of_the_objective() -> None:
    batch = collated([text_row(12, [(4, 8)])], 12)
    assert batch.loss_weights[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0]
    assert batch.labels[0].tolist() == [11, 12, 13, 14, PAD, PAD, PAD, 18, 19, 20, 21, PAD]
    assert batch.tokens[0].tolist() == [10, 11, 12, 13, PAD, PAD, PAD, PAD, 18, 19, 20, 21]


def test_a_full_row_predicts_the_first_token_of_the_next() -> None:
    batch = collated([text_row(12, [(4, 12)], next_token=99)], 12)
    assert batch.loss_weights[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert batch.labels[0, -1] == 99


def test_bidirectional_spans_see_themselves_whole_and_are_trained_alike() -> None:
    decoder = MODEL.decoder.model_copy(update={"spans": "bidirectional"})
    model = MODEL.model_copy(update={"decoder": decoder})
    rows = [text_row(9, []), text_row(12, [(2, 4), (4, 8)])]
    batch = collate(rows, model_config=model, sequence_length=12, tp_size=1, pad_id=PAD)
    assert batch.attention_end.tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0],
        [1, 2, 4, 4, 8, 8, 8, 8, 9, 10, 11, 12],
    ]
    IntervalMask(batch.attention_start, batch.attention_end, 12).validate()
    causal = collated(rows, 12)
    assert torch.equal(batch.labels, causal.labels)
    assert torch.equal(batch.loss_weights, causal.loss_weights)


def test_padding_sees_nothing_and_is_not_trained() -> None:
    batch = collated([text_row(5, []), empty_row()], 8)
    assert batch.attention_end.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [0] * 8]
    assert batch.attention_start.tolist() == [[0] * 8] * 2
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [0] * 8]
    assert batch.loss_weights.sum(dim=1).tolist() == [4, 0]


def test_an_encoder_without_spans_gets_one_dummy_element_that_is_docked_nowhere() -> None:
    encoder = collated([text_row(5, [])], 8, tp_size=2).encoders["vision"]
    assert len(encoder.dock_vectors) == len(encoder.dock_positions) == 0
    for share in encoder.shares:
        assert share.attention_end.tolist() == [1] + [0] * 15
        assert share.media.shape == (0, PATCH_BYTES)


def test_context_ranks_dock_what_stands_in_their_run_of_the_positions() -> None:
    """Two rows of 12 over 3 context ranks; a span of the first stands on both sides of position 8."""
    rows = [text_row(12, [(1, 3), (6, 10)]), text_row(12, [(2, 7)])]
    arguments = {"model_config": MODEL, "sequence_length": 12, "tp_size": 2, "pad_id": PAD}
    whole, cut = (collate(rows, **arguments, cp_size=size).encoders["text"] for size in (1, 3))
    assert len(cut.shares) == 6  # of the tensor ranks of each
    assert whole.dock_bounds == (0, 11)
    assert cut.dock_bounds == (0, 4, 8, 11)
    runs = [cut.dock_positions[slice(*cut.dock_bounds[rank : rank + 2])].tolist() for rank in range(3)]
    assert [sorted(run) for run in runs] == [[1, 2, 6, 7], [8, 9, 14, 15], [16, 17, 18]]
    ids = torch.cat([share.token_ids for share in cut.shares])
    tokens = np.concatenate([row.tokens for row in rows])
    assert ids[cut.dock_vectors].tolist() == tokens[cut.dock_positions].tolist()


def test_elements_are_routed_by_the_modality_of_their_span() -> None:
    """An image with two tokens of text, an image alone, text alone, and padding."""
    encoder = MODEL.encoders["vision"].model_copy(update={"joint_layers": 1})
    model = MODEL.model_copy(update={"encoders": {"vision": encoder}})
    spans = RowSpans(
        np.array([[1, 7], [8, 12], [13, 16]]), np.array([4, 4, 0]), np.zeros((8, PATCH_BYTES), np.uint8)
    )
    weights = loss_weights(20, [20], spans.bounds.tolist())
    row = Row(np.arange(20, dtype=np.int32), weights, [20], spans={"vision": spans})
    batch = collate([row], model_config=model, sequence_length=24, tp_size=1, pad_id=PAD)
    (share,) = batch.encoders["vision"].shares
    found = {
        kind: {name: slots.tolist() for name, slots in routes.items()}
        for kind, routes in share.routes.items()
    }
    image, text, lone_image, lone_text = (list(range(*ends)) for ends in ((0, 4), (4, 6), (6, 10), (10, 16)))
    assert found == {
        "separate": {"vision": image + lone_image, "language": text + lone_text},
        "joint": {"joint": image + text, "vision": lone_image, "language": lone_text},
    }


@st.composite
def rows_of_one_batch(draw: st.DrawFn) -> tuple[list[Row], int]:
    """Rows with documents, spans of both encoders, with and without images, some of them full."""
    length = draw(st.integers(20, 48))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        num_tokens = draw(st.sampled_from([0, length, length - 7]))
        full = num_tokens == length
        ends, found, position = [], {"text": [], "vision": []}, 0
        while position < num_tokens:
            end = min(num_tokens, position + int(random.integers(1, 25)))
            start = position + 1
            while start + PATCHES + 1 < end and random.random() < 0.7:
                stop = int(random.integers(start + 1, end))
                name = "vision" if stop - start >= PATCHES and random.random() < 0.6 else "text"
                found[name].append((start, stop))
                start = stop + int(random.integers(0, 3))
            ends.append(end)
            position = end
        spans = {}
        for name, bounds in found.items():
            if bounds:
                images = [name == "vision" and random.random() < 0.8 for _ in bounds]
                count = np.array(images) * PATCHES
                patches = random.integers(0, 256, (count.sum(), PATCH_BYTES)).astype(np.uint8)
                spans[name] = RowSpans(np.array(bounds), count, patches if name == "vision" else None)
        tokens = random.integers(5, 300, num_tokens).astype(np.int32)
        next_token = int(random.integers(5, 300)) if full and random.random() < 0.5 else -1
        all_bounds = [*found["text"], *found["vision"]]
        weights = loss_weights(num_tokens, ends, all_bounds, goes_on=next_token != -1)
        rows.append(Row(tokens, weights, ends, next_token, spans))
    return rows, length


@settings(max_examples=120, deadline=None)
@given(drawn=rows_of_one_batch(), tp_size=st.integers(1, 4))
def test_every_field_against_a_loop_over_positions(drawn: tuple[list[Row], int], tp_size: int) -> None:
    rows, length = drawn
    batch = collated(rows, length, tp_size)
    for b, row in enumerate(rows):
        in_span = {
            p: (start, end)
            for spans in row.spans.values()
            for start, end in spans.bounds.tolist()
            for p in range(start, end)
        }
        for p in range(length):
            if p >= len(row.tokens):
                expected = (PAD, PAD, 0, 0, 0, 0)
            else:
                document = int(np.searchsorted(row.document_ends, p, side="right"))
                start = 0 if document == 0 else int(row.document_ends[document - 1])
                end = int(row.document_ends[document])
                goes_on = end == len(row.tokens) and row.next_token != -1
                trained = (p < end - 1 or goes_on) and not (p in in_span and p < in_span[p][1] - 1)
                label = PAD
                if trained:
                    label = int(row.tokens[p + 1]) if p + 1 < len(row.tokens) else row.next_token
                token = PAD if p in in_span else int(row.tokens[p])
                expected = (token, label, int(trained), p - start, start, p + 1)
            found = (
                batch.tokens[b, p],
                batch.labels[b, p],
                batch.loss_weights[b, p],
                batch.positions[b, p],
                batch.attention_start[b, p],
                batch.attention_end[b, p],
            )
            assert tuple(int(value) for value in found) == expected
    own = [
        IntervalMask(batch.attention_start[[b]], batch.attention_end[[b]], length) for b in range(len(rows))
    ]
    check_views(batch.mask_views, torch.block_diag(*(mask.to_dense()[0] for mask in own)))
    for name in MODEL.encoders:
        check_encoder(batch, rows, name, length, tp_size)


def check_views(views: torch.Tensor, visible: torch.Tensor) -> None:
    mask = IntervalMask.of_views(views, None)
    assert torch.equal(mask.to_dense()[0], visible)
    assert torch.equal(mask.transpose().to_dense()[0], visible.mT)


def check_encoder(batch: SemiCausalBatch, rows: list[Row], name: str, length: int, tp_size: int) -> None:
    encoder = batch.encoders[name]
    assert len(encoder.shares) == tp_size
    share_length = len(encoder.shares[0].token_ids)
    assert share_length % 16 == 0
    vector_at = dict(zip(encoder.dock_positions.tolist(), encoder.dock_vectors.tolist(), strict=True))
    assert len(vector_at) == len(encoder.dock_positions)
    used = set()
    for b, row in enumerate(rows):
        if name not in row.spans:
            continue
        spans = row.spans[name]
        next_patch = 0
        for (start, end), num_patches in zip(spans.bounds.tolist(), spans.num_patches.tolist(), strict=True):
            elements = [divmod(vector_at.pop(b * length + p), share_length) for p in range(start, end)]
            used.update(elements)
            (owner,) = {rank for rank, _ in elements}
            share, first = encoder.shares[owner], elements[0][1]
            slots = share.patch_slots.tolist()
            for offset, (_, element) in enumerate(elements):
                assert element == first + offset
                assert share.attention_start[element] == first
                assert share.attention_end[element] == first + end - start
                if offset < num_patches:
                    assert share.token_ids[element] == PAD
                    assert share.positions[element] == offset
                    expected = spans.media[next_patch + offset]
                    np.testing.assert_array_equal(share.media[slots.index(element)], expected)
                else:
                    assert element not in slots
                    assert share.token_ids[element] == row.tokens[start + offset]
                    assert share.positions[element] == offset - num_patches
            next_patch += num_patches
    assert not vector_at
    for rank, share in enumerate(encoder.shares):
        docked = sum(owner == rank for owner, _ in used)
        dummy = 1 if docked == 0 else 0
        assert (share.attention_end > 0).sum() == docked + dummy
        assert torch.all(share.token_ids[docked:] == PAD)
        assert len(share.media) == len(share.patch_slots)
        mask = IntervalMask(share.attention_start[None], share.attention_end[None], share_length)
        check_views(share.mask_views, mask.to_dense()[0])


def test_prompts_are_left_open_and_dock_what_they_encode(tokenizer: Tokenizer) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    encoder = MODEL.encoders["vision"]
    reader = MEDIA["image"].reader(encoder)
    data = encode_png(pixels)
    image = MEDIA["image"].part(data, reader, "vision", tokenizer.paragraph_id)
    asked = Document((image, text([7, 8], "vision"), text([9])), ends=False)
    row = lay_out([asked.decoded(lambda _: reader.read(data))], tokenizer)
    assert row.tokens.tolist() == [0, 1, 1, 1, 1, 7, 8, 9]
    spanned = Document((text([5]), text([6, 7], "text")), ends=False)
    batch = collated([row, lay_out([spanned], tokenizer)], 8)
    assert batch.tokens.tolist() == [[0] + [PAD] * 6 + [9], [0, 5] + [PAD] * 6]
    assert batch.attention_end[1].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert batch.encoders["vision"].dock_positions.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.encoders["text"].dock_positions.tolist() == [10, 11]
    assert batch.encoders["text"].shares[0].token_ids[:2].tolist() == [6, 7]
    assert batch.loss_weights[0].tolist() == [1, 0, 0, 0, 0, 0, 1, 0]
    assert batch.labels[0, 0] == 1
    (share,) = batch.encoders["vision"].shares
    assert encoder.image is not None
    np.testing.assert_array_equal(share.media, cut_patches(pixels, encoder.image))


def text(ids: list[int], reader: str | None = None) -> Part:
    return Part("text", np.array(ids, np.int32), reader)
