"""Who reads what of a source: what its readers say, what its shards hold, and what the model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.steps import global_rows
from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.lanes import Lane, Mixture
from metalm.data.sources import Source
from metalm.errors import ConfigError

Open = Callable[..., Source]


@pytest.fixture
def opened_as(make_config: Callable[..., RunConfig]) -> Open:
    """The one source of a run, opened."""

    def open_source(path: Path, readers: dict[str, str]) -> Source:
        return Corpus(make_config({"things": {"path": path, "readers": readers}})).sources[0]

    return open_source


def test_text_whose_encoder_the_model_lacks_is_read_by_the_decoder(
    make_config: Callable[..., RunConfig],
    text_source: Callable[..., Path],
) -> None:
    folder = text_source([20])
    lacking, without, with_spans = (
        global_rows(make_config({"prose": {"path": folder, "readers": readers}}), 6, dp_size=1)
        for readers in ({"text": "prosody"}, {}, {"text": "text"})
    )
    assert lacking == without
    assert with_spans[0] != without[0]


def test_prefixes_whose_encoder_the_model_lacks_are_read_by_the_decoder(
    make_config: Callable[..., RunConfig], pair_source: Callable[..., Path], opened_as: Open
) -> None:
    folder = pair_source([12])
    source = opened_as(folder, {"image": "vision", "text": "prosody"})
    assert source.readers == {"image": "vision"}
    rows = []
    for readers in ({"image": "vision", "text": "prosody"}, {"image": "vision"}):
        lane = Lane(Mixture(Corpus(make_config({"scenes": {"path": folder, "readers": readers}}))), 0)
        rows.append([lane.next_row() for _ in range(8)])
    for lacking, without in zip(*rows, strict=True):
        np.testing.assert_array_equal(lacking.tokens, without.tokens)
        np.testing.assert_array_equal(lacking.loss_weights, without.loss_weights)
        np.testing.assert_array_equal(lacking.spans["vision"].bounds, without.spans["vision"].bounds)
        np.testing.assert_array_equal(lacking.spans["vision"].media, without.spans["vision"].media)
        lengths = without.spans["vision"].bounds[:, 1] - without.spans["vision"].bounds[:, 0]
        assert (lengths == 4).all()  # the image alone, no prefix


def test_a_prefix_may_be_read_by_another_encoder_than_the_image(
    pair_source: Callable[..., Path], make_config: Callable[..., RunConfig]
) -> None:
    source = {"path": pair_source([12]), "readers": {"image": "vision", "text": "text"}}
    lane = Lane(Mixture(Corpus(make_config({"scenes": source}))), 0)
    num_prefixes = 0
    for _ in range(12):
        row = lane.next_row()
        images = row.spans["vision"]
        assert (images.bounds[:, 1] - images.bounds[:, 0] == images.num_patches).all()
        if "text" in row.spans:
            prefixes = row.spans["text"]
            num_prefixes += len(prefixes.bounds)
            assert not prefixes.num_patches.any()
            assert set(prefixes.bounds[:, 0]) <= set(images.bounds[:, 1])
            # The last patch predicts the prefix, whose last token predicts the rest of the caption.
            assert row.loss_weights[prefixes.bounds[:, 0] - 1].all()
            assert row.loss_weights[prefixes.bounds[:, 1] - 1].all()
    assert num_prefixes > 5


def test_readers_must_fit_what_the_shards_hold(
    text_source: Callable[..., Path], pair_source: Callable[..., Path], opened_as: Open
) -> None:
    text, pairs = text_source([3]), pair_source([3])
    with pytest.raises(ConfigError) as caught:
        opened_as(text, {"text": "text", "image": "vision"})
    assert str(caught.value) == f"source things has a reader of image, but {text} was indexed as text"
    with pytest.raises(ConfigError) as caught:
        opened_as(pairs, {"audio": "vision"})
    assert str(caught.value) == f"source things has a reader of audio, but {pairs} was indexed as image_text"
    for readers in ({}, {"text": "vision"}):
        with pytest.raises(ConfigError) as caught:
            opened_as(pairs, readers)
        assert str(caught.value) == (
            f"source things ({pairs}) was indexed as image_text: its readers must name an encoder of images, "
            "such as {image: vision}"
        )
