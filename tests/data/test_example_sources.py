"""Sources of examples: rows of whole documents, the same on any ranks and after any resume, all counted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.steps import global_rows, opened, with_data
from metalm.config.schema import RunConfig
from metalm.data.checking import check_shards
from metalm.data.corpus import Corpus
from metalm.data.held_out import evaluation_batches, held_out_samples, pack_held_out
from metalm.data.lanes import Lane, Mixture
from metalm.data.storage.index import build_index
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError
from metalm.objectives.semi_causal import SemiCausal

READERS = {"image": "vision", "text": "text"}
MakeConfig = Callable[..., RunConfig]
WriteShard = Callable[..., None]


def described(parts: list[dict[str, Any]]) -> bytes:
    return json.dumps({"parts": parts}).encode()


def chat(number: int) -> list[dict[str, Any]]:
    """Of one to three turns."""
    parts: list[dict[str, Any]] = []
    for turn in range(1 + number % 3):
        parts += [{"text": "\n\n", "end": True}] if parts else []
        parts += [
            {"text": f"fox {number} {turn}", "encoded": True},
            {"text": f"dog {number}", "trained": True},
        ]
    return parts


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_shard: WriteShard, jpeg: Callable[..., bytes]
) -> Path:
    """Thirty chats; every third one begins with an image, of colour (n, 2 n, 3 n), every ninth with two."""
    folder = tmp_path_factory.mktemp("chats")
    samples = []
    for number in range(30):
        images = 0 if number % 3 else 2 if number % 9 == 0 else 1
        parts = [{"image": f"{one}.jpg"} for one in range(images)]
        files = {f"{one}.jpg": jpeg((number, 2 * number, 3 * number)) for one in range(images)}
        samples.append({"json": described([*parts, *chat(number)]), **files})
    write_shard(folder / "chats-00000.tar", samples[:20])
    write_shard(folder / "chats-00001.tar", samples[20:], 20)
    build_index(folder, kind="examples")
    return folder


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, folder: Path, text_source: Callable[..., Path]) -> RunConfig:
    chats = {"path": folder, "readers": READERS, "overflow": "split"}
    prose = {"path": text_source([30]), "readers": {"text": "text"}}
    return make_config({"chats": chats, "prose": prose}, evaluation={"chats": chats})


def test_rows_depend_on_neither_ranks_nor_workers_nor_resumes(config: RunConfig) -> None:
    reference, _ = global_rows(config, 16, dp_size=1)
    assert global_rows(with_data(config, workers=2), 16, dp_size=2, tp_size=2)[0] == reference
    states, done = None, 0
    for steps, dp_size in [(1, 2), (6, 1), (2, 4), (7, 1)]:
        rows, states = global_rows(config, steps, dp_size=dp_size, states=states)
        assert rows == reference[done : done + steps]
        done += steps


def test_streamed_shards_give_whole_examples_and_are_resumed(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    for name in ("index.json", *(path.name for path in folder.glob("*.records"))):
        shutil.copy(folder / name, tmp_path / name)
    away = {"path": tmp_path, "readers": READERS, "overflow": "split", "url": f"pipe:cat {folder}/{{shard}}"}
    config = make_config({"chats": away})
    reference, _ = global_rows(config, 6, dp_size=1)
    rows, states = global_rows(config, 4, dp_size=2)
    assert rows == reference[:4]
    assert global_rows(config, 2, dp_size=1, states=states)[0] == reference[4:]


def test_every_chat_is_whole_in_its_row_with_its_own_images(config: RunConfig, tokenizer: Tokenizer) -> None:
    only = with_data(config, sources={"chats": config.data.sources["chats"]}, lanes=1)
    lane = Lane(Mixture(Corpus(only)), 0)
    seen: Counter[int] = Counter()
    for _ in range(40):
        row = lane.next_row()
        starts = [0, *row.document_ends[:-1]]
        vision = row.spans.get("vision")
        images = [] if vision is None else [start for start, _ in vision.bounds]
        colours = [] if vision is None else vision.media.reshape(-1, 4 * 8 * 8, 3).mean(axis=1)
        for start, end in zip(starts, row.document_ends, strict=True):
            own = [colour for at, colour in zip(images, colours, strict=True) if start <= at < end]
            words = tokenizer.decode(row.tokens[start + 1 + 4 * len(own) : end - 1])
            number = int(words.split()[1])
            seen[number] += 1
            count = 1 + number % 3
            asked = [f"fox {number} {turn}dog {number}" for turn in range(count)]
            assert words == "\n\n".join(asked)
            trained = row.tokens[start + 1 : end][row.loss_weights[start : end - 1] == 1]
            assert tokenizer.decode(trained) == "\n\n".join([f"dog {number}"] * count)
            assert trained[-1] == tokenizer.document_id
            assert (row.targets is not None) or count == 1
            assert len(own) == (0 if number % 3 else 2 if number % 9 == 0 else 1)
            for colour in own:
                np.testing.assert_allclose(colour, [number, 2 * number, 3 * number], atol=3)
    assert set(seen) == set(range(30))


def test_bad_examples_are_counted_by_cause_and_cut_ones_by_token(
    tmp_path: Path, make_config: MakeConfig, write_shard: WriteShard, jpeg: Callable[..., bytes],
    tokenizer_folder: Path,
) -> None:  # fmt: skip
    good = [{"text": "fox", "encoded": True}, {"text": "dog", "trained": True}]
    samples: list[dict[str, bytes]] = [
        {"json": b"{"}, {"json": b"[]"}, {"json": described([{"text": 3}])},
        {"json": described([{"text": "a", "image": "0.jpg"}])}, {"json": described([{"image": "0.jpg"}])},
        {"json": described([{"image": "0.jpg"}, *good]), "0.jpg": b"no image"},
        {"json": described([{"text": "fox", "encoded": True}])},
        {"json": described([{"text": "a", "encoded": True, "trained": True}])},
        {"json": b'{"parts": [{"text": "\\ud800", "trained": true}]}'},
        {"json": described([*good, {"text": "z" * 99}])},
        {"json": described([{"text": "q" * 30, "encoded": True}, {"text": "dog", "trained": True}])},
        {"json": described([{"image": "0.JPG"}, *good]), "0.jpg": jpeg((1, 2, 3))},
    ]  # fmt: skip
    write_shard(tmp_path / "a.tar", [*samples, {"txt": b"fox"}, {"json": b""}])
    index = build_index(tmp_path, kind="examples")
    assert index.skipped == {"bad_json": 1, "missing_json": 1}
    source = {"path": tmp_path, "readers": READERS, "overflow": "cut_right"}
    config = make_config({"chats": source}, data={"lanes": 1, "chunk_samples": 12})
    with opened(config) as data:
        next(data)
        counts = data.counters()
    expected = {
        "bad_json": 1, "bad_parts": 4, "missing_member": 1, "no_answer": 1, "not_unicode": 1, "too_long": 1
    }  # fmt: skip
    skipped = {key.rpartition("/")[2]: count for key, count in counts.items() if "/skipped/" in key}
    assert skipped.pop("undecodable_image") > 0
    assert skipped.keys() == expected.keys()
    epochs = sum(skipped.values()) / sum(expected.values())
    assert all(abs(skipped[cause] / each - epochs) < 1 < epochs for cause, each in expected.items())
    assert counts["chats/overflowed_tokens"] % (30 - 16) == 0 < counts["chats/overflowed_tokens"]
    (check,) = check_shards(tmp_path, tokenizer_folder, samples_per_shard=12)
    assert len(check.problems) == 9
    assert "sample 5: undecodable_image" in check.problems


def test_readers_and_overflow_must_fit_the_shards(
    config: RunConfig, make_config: MakeConfig, folder: Path, pair_source: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=r"source chats .* indexed as examples: say what becomes of texts"):
        Corpus(make_config({"chats": {"path": folder, "readers": READERS}})).check()
    pairs = {"path": pair_source([3]), "readers": {"image": "vision"}, "overflow": "split"}
    with pytest.raises(ConfigError, match="indexed as image_text: `overflow` is of examples"):
        Corpus(make_config({"pairs": pairs})).check()
    text_only = {"path": folder, "readers": {"text": "text"}, "overflow": "split"}
    with (
        opened(make_config({"chats": text_only})) as data,
        pytest.raises(ConfigError, match="source chats: .* in its readers"),
    ):
        next(data)


def test_held_out_rows_are_fixed_and_answers_are_asked_for(config: RunConfig, tokenizer: Tokenizer) -> None:
    corpus = Corpus(config)
    source = corpus.held_out["chats"]
    packed = pack_held_out(corpus, source, 6)

    def weights(rank: int, size: int) -> list[float]:
        ranks = {"dp_rank": rank, "dp_size": size, "tp_size": 1}
        batches = evaluation_batches(corpus, source, SemiCausal(), num_rows=6, packed=packed, **ranks)
        return [float(one) for batch in batches for one in batch.loss_weights.sum(1)]

    alone, shared = weights(0, 1), [weights(rank, 2) for rank in range(2)]
    assert [shared[row % 2][row // 2] for row in range(6)] == alone
    assert min(alone) > 0
    with pytest.raises(ConfigError, match="no images or clips to exchange"):
        next(
            evaluation_batches(
                corpus,
                source,
                SemiCausal(),
                num_rows=6,
                packed=packed,
                dp_rank=0,
                dp_size=1,
                tp_size=1,
                wrong_media=True,
            )
        )
    first, second = held_out_samples(corpus, source, 2)
    assert (first.modality, first.media.shape, first.captions) == ("image", (20, 24, 3), ("dog 0",))
    assert (second.modality, second.media, second.captions) == ("text", None, ("dog 1",))
    asked = second.document.prompt(second.num_asked)
    words = tokenizer.decode(np.concatenate([part.tokens for part in asked.parts]))
    assert words == "fox 1 0dog 1\n\nfox 1 1"
