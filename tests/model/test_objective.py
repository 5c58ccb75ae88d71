"""What the model is trained on, against the paper: the trained positions, the leaks, the gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distributed.tiny import LENGTH, OPTIONS, VOCAB, tiny_config, to_row
from metalm.batch import SemiCausalBatch
from metalm.config import ModelConfig
from metalm.data.collate import collate
from metalm.kernels import backend_counts, reset_backend_counts
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.encoder import EncoderBank, encoder_draw
from metalm.model.initialization import initialize_parameters
from metalm.parallel.topology import Topology
from reference import model as plain
from reference.rows import DOCUMENT, PAD, START, Document, PlainRow, Span, random_rows
from reference.training import gradients


class Model:
    """Decoder and encoders on one rank, without engines."""

    def __init__(self, config: ModelConfig, topology: Topology) -> None:
        self.config = config
        self.decoder = Decoder(config, LENGTH, topology)
        self.encoders = EncoderBank(config)
        initialize_parameters(self.decoder, "decoder", 1, lambda n: decoder_draw(config.decoder, n), 0, 1)
        initialize_parameters(self.encoders, "encoders", 1, lambda n: encoder_draw(config, n), 0, 1)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        parts = {"decoder": self.decoder, "encoders": self.encoders}
        return {f"{part}/{n}": p for part, module in parts.items() for n, p in module.named_parameters()}

    def batch(self, rows: list[PlainRow]) -> SemiCausalBatch:
        return collate(
            [to_row(row) for row in rows],
            model_config=self.config,
            sequence_length=LENGTH,
            tp_size=1,
            pad_id=PAD,
        )

    def encode(self, batch: SemiCausalBatch) -> dict[str, torch.Tensor]:
        return self.encoders({name: spans.shares[0] for name, spans in batch.encoders.items()})

    def loss(self, rows: list[PlainRow]) -> torch.Tensor:
        batch = self.batch(rows)
        losses = self.decoder(batch, self.encode(batch)) * batch.loss_weights
        return losses.sum() / batch.loss_weights.sum()

    def logits(self, document: Document) -> torch.Tensor:
        """[n, vocabulary] of one document."""
        batch = self.batch([PlainRow([document], 0)])
        with torch.no_grad():
            return self.decoder(batch, self.encode(batch), torch.arange(len(document.tokens)))


def build(topology: Topology, options: str = "paper") -> Model:
    return Model(tiny_config("unused", options=options).model, topology)


def twelve_tokens() -> Document:
    return Document([START, *range(10, 20), DOCUMENT], [Span("text", 4, 8)])


def test_check_value_of_the_trained_positions(topology: Topology) -> None:
    batch = build(topology).batch([PlainRow([twelve_tokens()], 0)])
    assert batch.loss_weights[0, :11].tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    assert batch.loss_weights[0, 11:].sum() == 0
    assert [t - 1 for t in plain.trained_targets(twelve_tokens())] == [0, 1, 2, 3, 7, 8, 9, 10]


@pytest.mark.parametrize("options", ["paper", "mixed"])
def test_a_token_after_the_span_changes_nothing_up_to_its_end(topology: Topology, options: str) -> None:
    model, document = build(topology, options), twelve_tokens()
    changed = replace(document, tokens=[*document.tokens[:8], 50, *document.tokens[9:]])
    before, after = model.logits(document), model.logits(changed)
    assert torch.equal(before[:8], after[:8])
    assert not torch.allclose(before[8:], after[8:])


@pytest.mark.parametrize("options", ["paper", "mixed"])
def test_a_token_inside_the_span_changes_the_spans_first_position_and_none_before(
    topology: Topology, options: str
) -> None:
    model, document = build(topology, options), twelve_tokens()
    changed = replace(document, tokens=[*document.tokens[:7], 50, *document.tokens[8:]])
    before, after = model.logits(document), model.logits(changed)
    assert torch.equal(before[:4], after[:4])
    assert not torch.allclose(before[4], after[4])


def test_the_decoder_does_not_embed_the_spans_tokens(topology: Topology) -> None:
    batch = build(topology).batch([PlainRow([twelve_tokens()], 0)])
    assert batch.tokens[0, 4:8].tolist() == [PAD] * 4


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradients_equal_the_plain_model(topology: Topology, options: str) -> None:
    model = build(topology, options)
    config = tiny_config("unused", options=options)
    with torch.no_grad():  # so that norms and biases matter
        draw = torch.Generator().manual_seed(2)
        for parameter in model.decoder.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    rows = random_rows(7, 4, VOCAB, LENGTH)
    loss = model.loss(rows)
    loss.backward()
    weights = {name: p.detach().double() for name, p in model.parameters().items()}
    expected_loss, expected = gradients(rows, weights, config)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-5)
    for name, parameter in model.parameters().items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad.double(), expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_rows_without_any_span_still_reach_every_encoder_parameter(topology: Topology) -> None:
    model = build(topology)
    document = Document([START, *range(10, 20), DOCUMENT])
    model.loss([PlainRow([document], 0)]).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.encoders.parameters())
    assert all(p.grad is not None for p in model.encoders.parameters())


def test_every_layers_attention_runs_through_the_interval_kernel(topology: Topology) -> None:
    model = build(topology)
    reset_backend_counts()
    model.loss(random_rows(1, 2, VOCAB, LENGTH))
    assert backend_counts() == {"tiled": 2 + 2 + 2}  # decoder, text encoder, image encoder


def test_recomputation_runs_every_layer_once_more_in_the_backward(topology: Topology) -> None:
    model = build(topology, "mixed")
    reset_backend_counts()
    loss = model.loss(random_rows(1, 2, VOCAB, LENGTH))
    assert backend_counts() == {"tiled": 2 + 2 + 2}
    loss.backward()
    assert backend_counts() == {"tiled": 2 * (2 + 2 + 2)}
