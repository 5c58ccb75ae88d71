"""Pairs stay whole, keep their own image, and fill their rows well."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metalm.config.model_schema import EncoderConfig, ImageConfig
from metalm.config.schema import SourceConfig
from metalm.data.documents.pairs import PairMaker
from metalm.data.order.sample_order import SampleOrder
from metalm.data.order.streams import Stream
from metalm.data.packing.whole import WholePacker
from metalm.data.row import Row
from metalm.data.sources import Source, open_sources
from metalm.data.storage.index import build_index
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError
from metalm.modalities.image import ImageReader

IMAGE = ImageConfig(image_size=16, patch_size=8)


def order_of(source: Source) -> SampleOrder:
    return SampleOrder(
        source.index, seed=1, source_name="scenes", num_lanes=1, chunk_samples=16, shuffle_window=64
    )


def packer_of(
    source: Source, length: int, image: ImageConfig = IMAGE, state: dict | None = None
) -> WholePacker:
    encoder = EncoderConfig(num_layers=1, hidden_size=16, num_heads=2, max_text_positions=6, image=image)
    return WholePacker(
        source,
        order_of(source),
        0,
        maker=PairMaker(source, {"vision": ImageReader(image)}, {"vision": encoder}, length),
        sequence_length=length,
        draws=Stream(1, "draws"),
        max_consecutive_failures=3,
        state=state,
    )


@pytest.fixture
def open_pairs(tokenizer: Tokenizer, encoders: dict[str, EncoderConfig]) -> Callable[[Path], Source]:
    """Opens a folder of pairs whose encoder reads prefixes too."""

    def open_folder(folder: Path) -> Source:
        config = SourceConfig(path=folder, readers={"image": "vision", "text": "vision"})
        return open_sources({"scenes": config}, tokenizer, encoders)[0]

    return open_folder


@pytest.fixture
def source(pair_source: Callable[..., Path], open_pairs: Callable[[Path], Source]) -> Source:
    return open_pairs(pair_source([30, 10]))


def pairs_of(row: Row, tokenizer: Tokenizer) -> list[tuple[str, int, np.ndarray]]:
    """Caption, prefix length and patches of each pair, checked for their frame."""
    found = []
    spans = row.spans["vision"]
    patches = spans.media.reshape(len(spans.bounds), IMAGE.num_patches, -1)
    starts = [0, *row.document_ends[:-1]]
    for start, end, (first, last), pixels in zip(
        starts, row.document_ends, spans.bounds, patches, strict=True
    ):
        tokens = row.tokens[start:end]
        assert tokens[0] == tokenizer.start_id
        assert tokens[-1] == tokenizer.document_id
        assert np.all(tokens[1 : 1 + IMAGE.num_patches] == tokenizer.paragraph_id)
        assert first == start + 1
        caption = tokenizer.decode(tokens[1 + IMAGE.num_patches : -1])
        found.append((caption, int(last - first) - IMAGE.num_patches, pixels))
    return found


def test_every_pair_that_was_read_is_used_once_with_its_own_image(source: Source) -> None:
    packer = packer_of(source, 64)
    used: Counter[int] = Counter()
    while packer.counters.rows < 60:
        row = packer.next_row()
        assert len(row.tokens) <= 64
        for caption, _, patches in pairs_of(row, source.tokenizer):
            number = int(caption.split()[1])
            used[number] += 1
            expected = [number, 2 * number, 3 * number]
            np.testing.assert_allclose(patches.reshape(-1, 3).mean(axis=0), expected, atol=3)
    blocks = [order_of(source).block(0, number) for number in range(30)]
    state = packer.state()
    last_block, position = state["place"]
    read = Counter(np.concatenate([*blocks[:last_block], blocks[last_block][:position]]).tolist())
    waiting = Counter(int(blocks[block][position]) for block, position in state["waiting"])
    assert used + waiting == read
    assert used.total() == packer.counters.samples > 6 * 40


def test_prefixes_are_uniform_below_the_caption_and_the_encoders_limit(
    tmp_path: Path,
    tokenizer: Tokenizer,
    open_pairs: Callable[[Path], Source],
    write_shard: Callable[..., None],
    jpeg: Callable[..., bytes],
) -> None:
    caption = "abcdefgh"
    num_tokens = len(tokenizer.encode([caption])[0])
    assert num_tokens > 7
    sample = {"jpg": jpeg((1, 2, 3)), "txt": caption.encode()}
    short = {"jpg": jpeg((1, 2, 3)), "txt": b"a"}
    write_shard(tmp_path / "a.tar", [sample] * 20 + [short] * 20)
    build_index(tmp_path, kind="image_text")
    source = open_pairs(tmp_path)
    packer = packer_of(source, 64)
    counts: Counter[int] = Counter()
    while packer.counters.rows < 300:
        for text, prefix, _ in pairs_of(packer.next_row(), tokenizer):
            if text == caption:
                counts[prefix] += 1
            else:
                assert prefix == 0
    assert sorted(counts) == list(range(7))
    expected = counts.total() / 7
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counts.values())


def test_all_captions_of_an_image_are_used(
    tmp_path: Path,
    tokenizer: Tokenizer,
    open_pairs: Callable[[Path], Source],
    write_shard: Callable[..., None],
    jpeg: Callable[..., bytes],
) -> None:
    captions = ["fox", "dog", "lazy"]
    sample = {"jpg": jpeg((1, 2, 3)), "json": json.dumps({"captions": captions}).encode(), "txt": b"no"}
    write_shard(tmp_path / "a.tar", [sample])
    build_index(tmp_path, kind="image_text")
    source = open_pairs(tmp_path)
    packer = packer_of(source, 64)
    used = {text for _ in range(20) for text, _, _ in pairs_of(packer.next_row(), tokenizer)}
    assert used == set(captions)


def test_long_captions_are_cut_to_the_row_and_counted(
    tmp_path: Path,
    open_pairs: Callable[[Path], Source],
    write_shard: Callable[..., None],
    jpeg: Callable[..., bytes],
) -> None:
    write_shard(tmp_path / "a.tar", [{"jpg": jpeg((1, 2, 3)), "txt": b"quick " * 40}])
    build_index(tmp_path, kind="image_text")
    source = open_pairs(tmp_path)
    packer = packer_of(source, 20)
    row = packer.next_row()
    assert len(row.tokens) == 20
    assert packer.counters.truncated_captions == 1
    with pytest.raises(ConfigError, match="leave no room for a caption"):
        packer_of(source, 6)


def test_a_packer_goes_on_from_its_state_after_any_row(source: Source) -> None:
    whole = packer_of(source, 64)
    for _ in range(25):
        resumed = packer_of(source, 64, state=json.loads(json.dumps(whole.state())))
        expected, row = whole.next_row(), resumed.next_row()
        np.testing.assert_array_equal(row.tokens, expected.tokens)
        np.testing.assert_array_equal(row.spans["vision"].bounds, expected.spans["vision"].bounds)
        np.testing.assert_array_equal(row.spans["vision"].media, expected.spans["vision"].media)
        assert resumed.state() == whole.state()


def test_padding_of_natural_captions_is_below_8_percent(
    tmp_path: Path,
    open_pairs: Callable[[Path], Source],
    write_shard: Callable[..., None],
    jpeg: Callable[..., bytes],
) -> None:
    # Caption lengths like those of COCO and Conceptual Captions: 6 to 60, most about 12.
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(12), 0.45, 600), 6, 60).astype(int)
    data = jpeg((1, 2, 3))
    samples = [{"jpg": data, "txt": bytes(random.integers(97, 123, n).astype(np.uint8))} for n in lengths]
    write_shard(tmp_path / "a.tar", samples)
    build_index(tmp_path, kind="image_text")
    source = open_pairs(tmp_path)
    image = ImageConfig(image_size=56, patch_size=4)  # 196 patches, as 224 / 16
    packer = packer_of(source, 2048, image)
    for _ in range(60):
        packer.next_row()
    counted = packer.counters
    padding = counted.padding_tokens / (counted.padding_tokens + counted.tokens)
    print(f"padding of pair rows: {padding:.4f}")
    assert padding < 0.08
