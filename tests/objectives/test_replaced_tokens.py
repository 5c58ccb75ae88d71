"""Replaced-token detection against each document by itself, the encoder in plain float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from metalm.batch import SemiCausalBatch
from metalm.config import ModelConfig, ReplacedTokensConfig, RunConfig
from metalm.data.collate import collate
from metalm.data.row import Row, empty_row
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.encoder import EncoderBank, encoder_draw
from metalm.model.initialization import initialize_parameters
from metalm.objectives import Losses
from metalm.objectives.replaced_tokens import ReplacedTokens, take_by_probability
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from reference.encoder import encode_span
from reference.rows import DOCUMENT, PAD, START, Document, Span, loss_weights

LENGTH, VOCAB, SPECIAL = 24, 8, (START, 1, DOCUMENT, PAD)
SETTINGS = ReplacedTokensConfig(mask_fraction=0.3, detection_weight=7.0)
ENCODER = {"num_layers": 2, "hidden_size": 24, "num_heads": 2, "max_text_positions": LENGTH}
MODEL = ModelConfig.model_validate(
    {
        "vocab_size": VOCAB,
        "decoder": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "spans": "bidirectional",
            "start": "plain",
        },
        "encoders": {"text": {**ENCODER, "connector": "detection"}},
    }
)

CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "detection"},
        "model": MODEL,
        "data": {
            "tokenizer": "unused",
            "sequence_length": LENGTH,
            "lanes": 1,
            "sources": {"text": {"path": "unused"}},
        },
        "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
)
OBJECTIVE = ReplacedTokens(CONFIG, SETTINGS)
TOKENIZER: Any = SimpleNamespace(pad_id=PAD, special_ids=SPECIAL)


@pytest.fixture
def engines(topology: Topology) -> Engines:
    """The modules themselves, with weights that matter."""
    decoder, encoders = Decoder(MODEL, LENGTH, topology), EncoderBank(MODEL)
    initialize_parameters(decoder, "decoder", 1, lambda n: decoder_draw(MODEL.decoder, n), 0, 1)
    initialize_parameters(encoders, "encoders", 1, lambda n: encoder_draw(MODEL, n), 0, 1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*decoder.parameters(), *encoders.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return Engines(decoder, encoders)


def row(*sizes: int, seed: int) -> Row:
    generator = np.random.default_rng(seed)
    documents = [[START, *generator.integers(4, VOCAB, size - 2), DOCUMENT] for size in sizes]
    tokens = np.concatenate(documents).astype(np.int32)
    ends = np.cumsum(sizes).tolist()
    return Row(tokens, loss_weights(len(tokens), ends, []), ends, dropout_seed=seed)


def masked_batch(rows: list[Row], tp_size: int = 1, model: ModelConfig = MODEL) -> SemiCausalBatch:
    rows = OBJECTIVE.arrange(rows)
    batch = collate(rows, model_config=model, sequence_length=LENGTH, tp_size=tp_size, pad_id=PAD)
    return OBJECTIVE.complete(batch, rows, TOKENIZER)


def rows_of_all_kinds() -> list[Row]:
    return [row(7, 12, seed=11), row(LENGTH, seed=12), empty_row(), row(3, 4, 9, seed=13)]


def test_tokens_are_masked_by_the_row_alone_and_special_ones_never() -> None:
    rows = rows_of_all_kinds()
    batch = masked_batch(rows)
    for number, own in enumerate(rows):
        size = len(own.tokens)
        masked = batch.loss_weights[number].bool()
        assert masked.sum() == (round(0.3 * size) if size else 0)
        assert not masked[size:].any()
        at = masked.nonzero().flatten()
        assert not np.isin(own.tokens[at], SPECIAL).any()
        assert batch.labels[number][at].tolist() == own.tokens[at].tolist()
        assert (batch.tokens[number][at] == PAD).all()
        seen = batch.tokens[number][:size][~masked[:size]]
        assert seen.tolist() == own.tokens[~masked[:size].numpy()].tolist()
        alone = masked_batch([own])
        assert torch.equal(alone.tokens[0], batch.tokens[number])
        mine = batch.masked_positions // LENGTH == number
        assert torch.equal(alone.masked_positions, batch.masked_positions[mine] - number * LENGTH)
        assert torch.equal(alone.replacement_draws, batch.replacement_draws[mine])
    assert not torch.equal(
        masked_batch([row(LENGTH, seed=12)]).tokens, masked_batch([row(LENGTH, seed=14)]).tokens
    )


def test_every_document_sees_itself_alone_and_all_of_itself() -> None:
    batch = masked_batch([row(7, 12, seed=11)])
    assert batch.attention_start[0].tolist()[:19] == [0] * 7 + [7] * 12
    assert batch.attention_end[0].tolist() == [7] * 7 + [19] * 12 + [0] * 5
    share = batch.encoders["text"].shares[0]
    assert sorted(set(zip(share.attention_start.tolist(), share.attention_end.tolist(), strict=True))) == [
        *((0, 0), (0, 7)),
        (7, 19),
    ]


def test_a_token_is_taken_by_its_probability() -> None:
    logits = torch.tensor([0.2, 0.5, 0.0, 0.3]).log().expand(5, 4)
    draws = torch.tensor([0.0, 0.1999, 0.2001, 0.7001, 1 - 2**-53], dtype=torch.float64)
    assert take_by_probability(logits, draws).tolist() == [0, 0, 1, 3, 3]
    many = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    taken = take_by_probability(logits[:1].expand(len(many), 4), many).bincount(minlength=4) / len(many)
    torch.testing.assert_close(
        taken.double(), torch.tensor([0.2, 0.5, 0.0, 0.3]).double(), atol=0.005, rtol=0
    )


def losses_of(engines: Engines, batch: SemiCausalBatch, topology: Topology) -> Losses:
    return OBJECTIVE.losses(engines, batch, topology)


def test_losses_equal_those_of_each_document_by_itself(engines: Engines, topology: Topology) -> None:
    rows = rows_of_all_kinds()
    batch = masked_batch(rows)
    found = losses_of(engines, batch, topology)
    expected = torch.zeros(len(rows), LENGTH, dtype=torch.float64)
    num_replaced = num_correct = 0
    for number, own in enumerate(rows):
        start = 0
        for end in own.document_ends:
            place = slice(start, end)
            masked = batch.loss_weights[number, place].bool()
            mine = (batch.masked_positions >= number * LENGTH + start) & (
                batch.masked_positions < number * LENGTH + end
            )
            logits = generator_logits(engines, batch.tokens[number, place])[masked]
            original = torch.from_numpy(own.tokens[place].astype(np.int64))
            probabilities = logits.double().softmax(-1)
            chosen = [
                next(token for token in range(VOCAB) if row_of[: token + 1].sum() > draw)
                for row_of, draw in zip(probabilities, batch.replacement_draws[mine], strict=True)
            ]
            replaced = original.clone()
            replaced[masked] = torch.tensor(chosen, dtype=torch.int64)
            scores = detector_scores(engines, replaced)
            is_replaced = replaced != original
            cost = -torch.where(is_replaced, scores.sigmoid(), 1 - scores.sigmoid()).log()
            expected[number, place] += 7.0 * 0.3 * cost
            expected[number, place][masked] -= probabilities.gather(1, original[masked][:, None])[:, 0].log()
            num_replaced += int(is_replaced.sum())
            num_correct += int(((scores > 0) == is_replaced).sum())
            start = end
    torch.testing.assert_close(found.weighted.detach().double(), expected, atol=1e-5, rtol=1e-5)
    assert 0 < num_replaced < int(batch.loss_weights.sum())  # some masked tokens got their own token again
    num_tokens = sum(len(own.tokens) for own in rows)
    assert found.parts["replaced_share"].tolist() == [num_replaced, num_tokens]
    assert found.parts["detection_accuracy"].tolist() == [num_correct, num_tokens]
    assert found.parts["detection_recall"][1] == num_replaced
    total = found.parts["masked_token_loss"][0] + 2.1 * found.parts["detection_loss"][0]
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-6)


def test_no_gradient_goes_from_the_detection_to_the_decoder(engines: Engines, topology: Topology) -> None:
    batch = masked_batch(rows_of_all_kinds())
    (losses_of(engines, batch, topology).weighted * (1 - batch.loss_weights)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in engines.decoder.parameters())
    assert all(p.grad is not None for p in engines.encoders.parameters())  # type: ignore[union-attr]


def generator_logits(engines: Engines, tokens: torch.Tensor) -> torch.Tensor:
    """Of one document with its masked tokens: alone in a row, all of it in one span that nothing docks in."""
    size = len(tokens)
    alone = Row(tokens.numpy().astype(np.int32), loss_weights(size, [size], []), [size])
    batch = collate(
        OBJECTIVE.arrange([alone]), model_config=MODEL, sequence_length=LENGTH, tp_size=1, pad_id=PAD
    )
    batch.tokens[0, : len(tokens)] = tokens
    batch.encoders.clear()
    with torch.no_grad():
        return engines.decoder(batch, {}, logits_at=torch.arange(len(tokens)))


def detector_scores(engines: Engines, tokens: torch.Tensor) -> torch.Tensor:
    """[n] float64, by the plain encoder with the identity for its connector."""
    modules = dict(engines.encoders.named_parameters())  # type: ignore[union-attr]
    weights = {f"encoders/{name}": p.detach().double() for name, p in modules.items()}
    hidden, head = ENCODER["hidden_size"], "encoders/encoders.text.detection_head"
    weights["encoders/encoders.text.connector.0.weight"] = torch.eye(hidden, dtype=torch.float64)
    weights["encoders/encoders.text.connector.0.bias"] = torch.zeros(hidden, dtype=torch.float64)
    plain = MODEL.model_copy(
        update={"encoders": {"text": MODEL.encoders["text"].model_copy(update={"connector": "linear"})}}
    )
    span = Span("text", 0, len(tokens))
    vectors = encode_span(Document(tokens.tolist(), [span]), span, weights, plain)
    for layer in (0, 2):
        vectors = vectors @ weights[f"{head}.{layer}.weight"].T + weights[f"{head}.{layer}.bias"]
        vectors = functional.gelu(vectors) if layer == 0 else vectors
    return vectors[:, 0]
