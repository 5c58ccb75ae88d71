"""Bad samples met while training: skipped, counted by cause exactly, shown; too many stop the run."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.steps import opened
from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.held_out import evaluation_batches, held_out_samples, pack_held_out
from metalm.data.order.sample_order import SampleOrder
from metalm.data.storage.index import build_index, open_index
from metalm.data.tokenizer import Tokenizer
from metalm.errors import DataError
from metalm.objectives.semi_causal import SemiCausal


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


def one_lane(config: RunConfig) -> RunConfig:
    """One row per step from one lane that reads chunk after chunk."""
    data = config.data.model_copy(update={"lanes": 1, "chunk_samples": 1, "shuffle_window": 1})
    training = config.training.model_copy(update={"global_batch_size": 1, "micro_batch_size": 1})
    return config.model_copy(update={"data": data, "training": training})


def run_steps(config: RunConfig, steps: int) -> tuple[dict[str, float], Counter[int], Counter[int]]:
    """The counters of the source, how often each sample was read, and how often of those it still waits."""
    with opened(one_lane(config)) as data:
        for _ in range(steps):
            next(data)
        counts = {key.removeprefix("source/"): count for key, count in data.counters().items()}
        packer = data.lane_states()[0]["sources"]["source"]["packer"]
    order = SampleOrder(
        open_index(config.data.sources["source"].path),
        seed=config.run.seed,
        source_name="source",
        num_lanes=1,
        chunk_samples=1,
        shuffle_window=1,
    )
    num_read = packer["place"][0] + packer["place"][1] + (packer.get("consumed", 0) > 0)
    read = Counter(int(order.block(0, number)[0]) for number in range(num_read))
    waiting = Counter(int(order.block(0, block)[0]) for block, _ in packer.get("waiting", []))
    return counts, read, waiting


def test_every_cause_of_a_bad_pair_has_its_counter(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_shard: Callable[..., None],
    jpeg: Callable[..., bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = jpeg((1, 2, 3))
    cases: list[tuple[str | None, dict[str, bytes]]] = [
        (None, {"jpg": good, "txt": b"fox"}),
        ("undecodable_image", {"jpg": b"no image", "txt": b"fox"}),
        ("undecodable_image", {"jpg": good[: len(good) // 2], "txt": b"fox"}),
        ("image_bomb", {"png": bomb(), "txt": b"fox"}),
        ("not_utf8", {"jpg": good, "txt": b"\xff\xfe fox"}),
        ("not_utf8", {"jpg": good, "json": b'{"caption": "\xff"}'}),
        ("missing_caption", {"jpg": good, "txt": b" \n"}),
        ("missing_caption", {"jpg": good, "json": json.dumps({"captions": [None, ""]}).encode()}),
        ("bad_json", {"jpg": good, "json": b"{"}),
        ("bad_json", {"jpg": good, "json": b"[" * 100_000}),
        ("bad_json", {"jpg": good, "json": b"[1]"}),
        (None, {"jpg": good, "json": b'{"caption": "dog"}'}),
    ]
    write_shard(tmp_path / "a.tar", [sample for _, sample in cases])
    build_index(tmp_path, kind="image_text")
    config = make_config({"source": {"path": tmp_path, "readers": {"image": "vision", "text": "vision"}}})
    with caplog.at_level(logging.WARNING):
        counts, read, waiting = run_steps(config, 40)
    expected: Counter[str] = Counter()
    for number, (cause, _) in enumerate(cases):
        # Captions are read ahead, images when the pair gets its row.
        in_image = cause is not None and cause.endswith(("_image", "_bomb"))
        expected[cause or "used"] += read[number] - (waiting[number] if in_image or not cause else 0)
    assert counts["samples"] == expected.pop("used") > 20
    skipped = {key: count for key, count in counts.items() if key.startswith("skipped/")}
    assert skipped == {f"skipped/{cause}": count for cause, count in expected.items()}
    assert all(count > 20 for count in expected.values())
    assert f"skipped sample 3 of shard {tmp_path}/a.tar: image_bomb" in caplog.text


def test_counters_of_bad_documents_are_exact(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_shard: Callable[..., None],
    tokenizer: Tokenizer,
) -> None:
    good = np.full(70, 9, "<u2").tobytes()
    strange = np.array([9, tokenizer.size], "<u2").tobytes()
    write_shard(
        tmp_path / "a.tar", [{"u16": good}, {"u16": strange}, {"txt": b"\xc3("}, {"txt": b"fox" * 30}]
    )
    build_index(tmp_path, kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
    config = make_config({"source": {"path": tmp_path}})
    counts, read, _ = run_steps(config, 60)
    assert counts["skipped/token_out_of_range"] == read[1] > 5
    assert counts["skipped/not_utf8"] == read[2] > 5
    assert counts["samples"] == read[0] + read[3] > 10


def test_too_many_failures_in_a_row_stop_the_run_with_the_shards_name(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_shard: Callable[..., None],
    jpeg: Callable[..., bytes],
) -> None:
    write_shard(tmp_path / "good.tar", [{"jpg": jpeg((1, 2, 3)), "txt": b"fox"}])
    write_shard(tmp_path / "rotten.tar", [{"jpg": b"no image", "txt": b"fox"}] * 300)
    build_index(tmp_path, kind="image_text")
    config = make_config(
        {"source": {"path": tmp_path, "readers": {"image": "vision", "text": "vision"}}},
        data={"max_consecutive_failures": 10},
    )
    with (
        opened(config) as data,
        pytest.raises(DataError, match=r"10 bad samples in a row, the last in shard .*rotten.tar: undecod"),
    ):
        for _ in range(50):
            next(data)


def test_a_shard_replaced_under_the_run_by_one_of_the_same_size_is_found_out(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_shard: Callable[..., None],
    tokenizer: Tokenizer,
) -> None:
    write_shard(tmp_path / "a.tar", [{"u16": np.full(n, 9, "<u2").tobytes()} for n in range(200, 240)])
    build_index(tmp_path, kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
    size = (tmp_path / "a.tar").stat().st_size
    write_shard(tmp_path / "a.tar", [{"u16": np.full(n, 9, "<u2").tobytes()} for n in range(239, 199, -1)])
    assert (tmp_path / "a.tar").stat().st_size == size
    config = make_config({"source": {"path": tmp_path}})
    with (
        opened(config) as data,
        pytest.raises(DataError, match=r"a\.tar holds no member of \d+ bytes.*replaced"),
    ):
        next(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_behind_a_right_header_ends_training_with_shard_and_fix(
    text_source: Callable[..., Path], make_config: Callable[..., RunConfig], workers: int
) -> None:
    folder = text_source([30])
    shard = folder / "text-00000.tar"
    content = bytearray(shard.read_bytes())
    record = open_index(folder).records[17]
    content[int(record["offset"] + record["main_offset"])] ^= 2  # another id of the vocabulary
    shard.write_bytes(content)
    config = make_config({"source": {"path": folder}}, data={"workers": workers})
    with (
        opened(config) as data,
        pytest.raises(
            DataError, match=rf"shard {shard} is damaged.*sample 17.*copy it anew.*index the folder again"
        ),
    ):
        for _ in range(20):
            next(data)


def test_evaluation_and_samples_leave_bad_pairs_out(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_shard: Callable[..., None],
    jpeg: Callable[..., bytes],
) -> None:
    good = jpeg((1, 2, 3))
    write_shard(
        tmp_path / "a.tar",
        [
            {"jpg": good, "txt": b"fox"},
            {"jpg": b"no image", "txt": b"fox"},
            {"jpg": good, "txt": b"\xff"},
            {"jpg": good, "json": b'{"captions": ["dog", "a dog"]}'},
        ],
    )
    build_index(tmp_path, kind="image_text")
    source = {"path": tmp_path, "readers": {"image": "vision", "text": "vision"}}
    config = make_config({"source": source}, evaluation={"source": source})
    corpus = Corpus(config)
    source = corpus.held_out["source"]
    ranks = {"packed": pack_held_out(corpus, source, 2), "dp_rank": 0, "dp_size": 1, "tp_size": 1}
    batches = list(evaluation_batches(corpus, source, SemiCausal(), num_rows=2, **ranks))
    assert sum(len(batch.encoders["vision"].shares[0].media) for batch in batches) == 2 * 4
    samples = held_out_samples(corpus, source, 9)
    assert [sample.captions for sample in samples] == [("fox",), ("dog", "a dog")]
    assert all(sample.media is not None and sample.media.shape == (20, 24, 3) for sample in samples)


def test_samples_of_text_are_its_text(
    make_config: Callable[..., RunConfig],
    text_source: Callable[..., Path],
    tokenizer: Tokenizer,
    tmp_path: Path,
    write_shard: Callable[..., None],
) -> None:
    write_shard(tmp_path / "a.tar", [{"txt": b"a fox\n\nand a dog"}] * 3)
    build_index(tmp_path, kind="text")
    held_out = {"raw": {"path": tmp_path}, "tokens": {"path": text_source([3])}}
    corpus = Corpus(make_config(held_out, evaluation=held_out))
    samples = held_out_samples(corpus, corpus.held_out["raw"], 2)
    texts = [tokenizer.decode(np.concatenate([p.tokens for p in s.document.parts])) for s in samples]
    assert texts == ["a fox\n\nand a dog"] * 2
    assert all(sample.media is None for sample in samples)
    assert len(held_out_samples(corpus, corpus.held_out["tokens"], 9)) == 3
