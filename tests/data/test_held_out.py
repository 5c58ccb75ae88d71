"""Evaluation rows are fixed, split evenly over ranks, and comparable with exchanged images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metalm.batch import SemiCausalBatch
from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.held_out import evaluation_batches, pack_held_out
from metalm.data.sources import Source
from metalm.data.storage.locations import SampleLocation
from metalm.errors import ConfigError, DataError
from metalm.objectives.semi_causal import SemiCausal


@pytest.fixture
def config(
    make_config: Callable[..., RunConfig],
    text_source: Callable[..., Path],
    pair_source: Callable[..., Path],
) -> RunConfig:
    text = {"path": text_source([20]), "readers": {"text": "text"}}
    pairs = {"path": pair_source([9, 8]), "readers": {"image": "vision", "text": "vision"}}
    one = {"path": pair_source([1]), "readers": {"image": "vision", "text": "vision"}}
    return make_config({"text": text}, evaluation={"text": text, "pairs": pairs, "one": one})


def batches_of(
    config: RunConfig, name: str, num_rows: int, rank: int = 0, size: int = 1, *, wrong: bool = False
) -> list[SemiCausalBatch]:
    corpus = Corpus(config)
    source = corpus.held_out[name]
    found = evaluation_batches(
        corpus,
        source,
        SemiCausal(),
        num_rows=num_rows,
        packed=pack_held_out(corpus, source, num_rows),
        dp_rank=rank,
        dp_size=size,
        tp_size=1,
        wrong_media=wrong,
    )
    return list(found)


@pytest.mark.parametrize("name", ["text", "pairs"])
@pytest.mark.parametrize("num_rows", [1, 5, 8, 100])
def test_ranks_together_have_the_rows_of_one(config: RunConfig, name: str, num_rows: int) -> None:
    alone = torch.cat([batch.tokens for batch in batches_of(config, name, num_rows)])
    weights = torch.cat([batch.loss_weights for batch in batches_of(config, name, num_rows)])
    for size in (2, 4):
        ranks = [batches_of(config, name, num_rows, rank, size) for rank in range(size)]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(batch.tokens.shape == (2, 64) for batches in ranks for batch in batches)
        rows = [torch.cat([batch.tokens for batch in batches]) for batches in ranks]
        for number in range(num_rows):
            torch.testing.assert_close(rows[number % size][number // size], alone[number])
        total = sum(batch.loss_weights.sum() for batches in ranks for batch in batches)
        assert total == weights.sum() > 0


def test_a_rank_reads_the_samples_of_its_own_rows_alone(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(config)
    source = corpus.held_out["pairs"]
    packed = pack_held_out(corpus, source, 8)
    assert packed is not None and sum(map(len, packed)) == 17
    read: list[int] = []
    main_member = Source.main_member

    def counting(self: Source, location: SampleLocation) -> memoryview:
        read.append(location.sample)
        return main_member(self, location)

    monkeypatch.setattr(Source, "main_member", counting)
    for rank in range(3):
        ranks = {"num_rows": 8, "packed": packed, "dp_rank": rank, "dp_size": 3, "tp_size": 1}
        list(evaluation_batches(corpus, source, SemiCausal(), **ranks))
        assert read == [sample for row in packed[rank::3] for sample in row]
        read.clear()


@pytest.mark.parametrize("name", ["text", "pairs"])
def test_rows_depend_neither_on_the_seed_nor_on_the_call(config: RunConfig, name: str) -> None:
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
    for first, second in zip(batches_of(config, name, 6), batches_of(other, name, 6), strict=True):
        torch.testing.assert_close(first.tokens, second.tokens)
        torch.testing.assert_close(first.loss_weights, second.loss_weights)


def test_the_whole_caption_is_predicted_from_the_image(config: RunConfig) -> None:
    for batch in batches_of(config, "pairs", 3):
        encoder = batch.encoders["vision"]
        assert len(encoder.dock_positions) == len(encoder.shares[0].media)
        # Of each pair of 4 patches and n tokens all but 3 patches and </d> are trained.
        real = (batch.attention_end > 0).sum()
        pairs = len(encoder.dock_positions) // 4
        assert batch.loss_weights.sum() == real - pairs * 4


def test_exchanged_images_are_those_of_other_pairs_under_the_same_captions(config: RunConfig) -> None:
    right, wrong = (batches_of(config, "pairs", 4, wrong=flag) for flag in (False, True))
    images = [
        torch.cat([batch.encoders["vision"].shares[0].media.reshape(-1, 4 * 192) for batch in batches])
        for batches in (right, wrong)
    ]
    for first, second in zip(right, wrong, strict=True):
        torch.testing.assert_close(first.tokens, second.tokens)
        torch.testing.assert_close(first.labels, second.labels)
    assert torch.all((images[0] != images[1]).any(dim=1))
    as_sets = [{image.numpy().tobytes() for image in side} for side in images]
    assert as_sets[0] == as_sets[1]
    assert len(as_sets[0]) == len(images[0])


def test_what_cannot_be_evaluated_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="no images or clips to exchange"):
        batches_of(config, "text", 1, wrong=True)
    with pytest.raises(DataError, match="cannot be exchanged"):
        batches_of(config, "one", 1, wrong=True)


def test_evaluation_text_has_spans(config: RunConfig) -> None:
    docked = sum(len(batch.encoders["text"].dock_positions) for batch in batches_of(config, "text", 8))
    assert docked > 20
