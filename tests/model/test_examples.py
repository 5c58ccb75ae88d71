"""What is learnt from examples: nothing leaks from answers, and packed rows are what documents are alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metalm.config.model_schema import EncoderConfig
from metalm.config.schema import RunConfig
from metalm.conversion.hf_config import processor_config
from metalm.data.collate import collate
from metalm.data.corpus import Corpus
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.row import lay_out
from metalm.data.usual_readers import usual_readers
from metalm.document import Document
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.encoder import EncoderBank, encoder_draw
from metalm.model.initialization import initialize_parameters

LENGTH = 64
READERS = [{"image": "vision", "text": "text"}, {"image": "vision", "text": "vision"}]


class Model:
    """Decoder and encoders on one rank, and documents of examples."""

    def __init__(self, config: RunConfig, readers: dict[str, str], topology: Any) -> None:
        self._config, self._corpus = config, Corpus(config)
        self._maker = self._corpus.example_maker(readers, overflow="split")
        self._decoder, self._encoders = Decoder(config.model, LENGTH, topology), EncoderBank(config.model)
        draws = (lambda n: decoder_draw(config.model.decoder, n)), (lambda n: encoder_draw(config.model, n))
        initialize_parameters(self._decoder, "decoder", 1, draws[0], 0, 1)
        initialize_parameters(self._encoders, "encoders", 1, draws[1], 0, 1)

    def document(self, example: Example) -> Document:
        return self._maker.make(example).document.decoded(self._maker.read)

    def run(self, documents: list[Document]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Encoders' vectors, logits and weighted losses of a row of documents."""
        row = lay_out(documents, self._corpus.tokenizer)
        batch = collate(
            [row],
            model_config=self._config.model,
            sequence_length=LENGTH,
            tp_size=1,
            pad_id=self._corpus.tokenizer.pad_id,
        )
        with torch.no_grad():
            encoded = self._encoders({name: one.shares[0] for name, one in batch.encoders.items()})
            logits = self._decoder(batch, encoded, torch.arange(len(row.tokens)))
            losses = self._decoder(batch, encoded) * batch.loss_weights
        return encoded, logits, losses.flatten()[: len(row.tokens)]


@pytest.fixture(params=READERS, ids=["apart", "joint"])
def model(
    request: pytest.FixtureRequest,
    topology: Any,
    make_config: Callable[..., RunConfig],
    encoders: dict[str, EncoderConfig],
) -> Model:
    return Model(make_config({"unused": {"path": "unused"}}), request.param, topology)


def example(jpeg: Callable[..., bytes], answers: tuple[str, str], colour: int = 9) -> Example:
    image = ExamplePart(jpeg((colour, 2, 3)), "image", is_encoded=True)
    questions = [ExamplePart(text, is_encoded=True) for text in ("fox", "dog")]
    first, second = (ExamplePart(text, is_trained=True) for text in answers)
    return Example((image, questions[0], first, ExamplePart("\n\n"), questions[1], second))


def test_an_answer_changes_no_vector_and_no_logit_before_it(model: Model, jpeg: Callable[..., bytes]) -> None:
    vectors, before, _ = model.run([model.document(example(jpeg, ("abc", "xyz")))])
    for answers, num_parts in ((("qbc", "xyz"), 2), (("abc", "qyz"), 5)):
        document = model.document(example(jpeg, answers))
        found, after, _ = model.run([document])
        assert all(torch.equal(found[name], vectors[name]) for name in vectors)
        same = 1 + sum(map(len, document.parts[:num_parts]))
        assert torch.equal(before[:same], after[:same])
        assert not torch.allclose(before[same], after[same])


def test_packed_examples_have_the_losses_of_each_alone(model: Model, jpeg: Callable[..., bytes]) -> None:
    documents = [model.document(example(jpeg, ("a", "b"), colour)) for colour in (10, 90)]
    documents.append(
        model.document(Example((ExamplePart("fox", is_encoded=True), ExamplePart("c", is_trained=True))))
    )
    alone = torch.cat([model.run([document])[2] for document in documents])
    packed = model.run(documents)[2]
    assert (packed > 0).sum() == (alone > 0).sum() == 2 * 3 + 2
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sources", "usual"),
    [
        ({"pairs": {"image": "vision"}}, {"image": "vision", "text": "text"}),
        ({"pairs": {"image": "vision", "text": "vision"}}, {"image": "vision", "text": "vision"}),
        (
            {"pairs": {"image": "vision", "text": "vision"}, "prose": {"text": "text"}},
            {"image": "vision", "text": "text"},
        ),
        (
            {"prose": {"text": "text"}, "chats": {"image": "vision", "text": "vision"}},
            {"image": "vision", "text": "vision"},
        ),
        ({"chats": {"image": "vision", "text": "absent"}}, {"image": "vision"}),
        ({"chats": {"image": "vision"}}, {"image": "vision"}),
        ({"chats": {}}, {"image": "vision"}),
        ({"chats": {"text": "text"}}, {"image": "vision", "text": "text"}),
    ],
)
def test_who_usually_reads_what_follows_training(
    sources: dict[str, dict[str, str]], usual: dict[str, str], make_config: Callable[..., RunConfig]
) -> None:
    """The decoder itself reads the texts of examples where their source names nobody for them, or nobody that
    there is. An export is asked, and chats, as its run."""
    found = {
        name: {"path": "unused", "readers": readers, **({"overflow": "split"} if name == "chats" else {})}
        for name, readers in sources.items()
    }
    config = make_config(found)
    assert usual_readers(config) == usual
    exported = processor_config(config)
    assert exported["readers"] == usual
    assert (exported["image_encoder"], exported["text_encoder"]) == (usual["image"], usual.get("text"))
