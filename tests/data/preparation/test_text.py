"""Preparing text: every document once, with the right ids, whatever the processes, formats and restarts."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard

from data.preparation.conftest import PausedTool
from metalm.data.preparation.fast_bpe import why_not_gigatoken
from metalm.data.preparation.text_shards import PAPER_DROPS, SubsetFilter, prepare_text
from metalm.data.preparation.tokenizer_training import training_texts
from metalm.data.storage.index import open_index
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError

Contents = Callable[[Path], dict[str, bytes]]
ReadSamples = Callable[[Path], dict[str, dict[str, bytes]]]
RunTool = Callable[..., tuple[int, str, str]]
SHARD_BYTES = 64 << 10


def test_every_document_becomes_one_sample_of_its_ids(
    corpus: list[dict[str, Any]],
    corpus_file: Path,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    read_samples: ReadSamples,
    tmp_path: Path,
) -> None:
    report = prepare_text([corpus_file], tmp_path / "out", tokenizer_folder, shard_bytes=SHARD_BYTES)
    samples = read_samples(tmp_path / "out")
    texts = [tokenizer.decode(np.frombuffer(sample["u16"], "<u2")) for sample in samples.values()]
    assert texts == [document["text"] for document in corpus]
    assert report["documents"] == len(corpus)
    assert report["tokens"] == sum(len(sample["u16"]) // 2 for sample in samples.values())
    assert report["bytes"] == sum(len(document["text"].encode()) for document in corpus)
    assert report["num_shards"] == len(list((tmp_path / "out").glob("*.tar"))) > 5
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_keys_are_the_places_of_documents_in_the_input(
    corpus_file: Path, tokenizer_folder: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    prepare_text([corpus_file], tmp_path / "out", None, store="text")
    content = corpus_file.read_bytes()
    for key, sample in read_samples(tmp_path / "out").items():
        offset = int(key.split("-")[1])
        assert json.loads(content[offset : content.index(b"\n", offset)])["text"].encode() == sample["txt"]


def test_the_index_knows_tokens_and_tokenizer(
    corpus_file: Path, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    report = prepare_text([corpus_file], tmp_path / "out", tokenizer_folder)
    index = open_index(tmp_path / "out")
    assert (index.num_samples, index.num_tokens) == (report["documents"], report["tokens"])
    assert (index.tokenizer_fingerprint, index.token_dtype) == (tokenizer.fingerprint, "uint16")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_output_depends_on_neither_processes_nor_compression(
    corpus_file: Path,
    tokenizer_folder: Path,
    contents: Contents,
    tmp_path: Path,
    suffix: str,
    processes: int,
) -> None:
    prepare_text([corpus_file], tmp_path / "plain", tokenizer_folder, shard_bytes=SHARD_BYTES)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(compress(corpus_file.read_bytes()))
    out = tmp_path / "out"
    prepare_text([path], out, tokenizer_folder, shard_bytes=SHARD_BYTES, processes=processes)
    expected, found = contents(tmp_path / "plain"), contents(out)
    expected.pop("preparation/plan.json")
    found.pop("preparation/plan.json")
    assert found == expected


def test_several_files_are_numbered_in_the_order_given(
    corpus_file: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "other"}')
    prepare_text([corpus_file, other], tmp_path / "out", None, store="text", processes=2)
    samples = read_samples(tmp_path / "out")
    assert list(samples) == sorted(samples)
    assert samples["0001-0000000000000"] == {"txt": b"other"}


@pytest.mark.parametrize(
    ("subsets", "kept"),
    [
        (SubsetFilter(), {"Pile-CC", "Github", "ArXiv", "Wikipedia (en)"}),
        (SubsetFilter(drop=PAPER_DROPS), {"Pile-CC", "Wikipedia (en)"}),
        (SubsetFilter(keep=("GITHUB", "pile-cc")), {"Pile-CC", "Github"}),
        (SubsetFilter(keep=("Github", "ArXiv"), drop=("ArXiv",)), {"Github"}),
    ],
)
def test_subsets_are_kept_and_dropped_by_name(
    corpus: list[dict[str, Any]], corpus_file: Path, tmp_path: Path, subsets: SubsetFilter, kept: set[str]
) -> None:
    report = prepare_text([corpus_file], tmp_path / "out", None, store="text", subsets=subsets)
    counts = Counter(document["meta"]["pile_set_name"] for document in corpus)
    assert {name: amounts["documents"] for name, amounts in report["subsets"].items()} == {
        name: count for name, count in counts.items() if name in kept
    }
    assert report["dropped"] == {
        f"subset {name}": count for name, count in sorted(counts.items()) if name not in kept
    }


def test_bad_lines_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = [b'{"text": "good"}', b"{", b'{"text": ""}', b'{"text": ""}', b'{"text": "\xff"}', b"{}"]
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join(lines))
    report = prepare_text([tmp_path / "corpus.jsonl"], tmp_path / "out", None, store="text")
    assert report["documents"] == 1
    assert report["dropped"] == {
        "empty_text": 2,
        "invalid_json": 1,
        "invalid_unicode": 1,
        "missing_text": 1,
    }


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("processes", [1, 2])
def test_dropped_lines_are_named_by_file_and_line(tmp_path: Path, suffix: str, processes: int) -> None:
    """Over many stretches, with blank lines between, whoever works on which."""
    path, bad = tmp_path / f"corpus.{suffix}", {7: "invalid_json", 40: "empty_text", 41: "missing_text"}
    content = {"invalid_json": "{", "empty_text": '{"text": " "}', "missing_text": "{}"}
    lines = [
        "" if number % 5 == 0 and number not in bad else content.get(bad.get(number, ""), '{"text": "good"}')
        for number in range(1, 61)
    ]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    out = tmp_path / "out"
    report = prepare_text([path], out, None, store="text", shard_bytes=200, processes=processes)
    assert report["num_shards"] > 3
    found = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert found == [{"cause": cause, "file": path.name, "line": line} for line, cause in bad.items()]


def test_a_text_that_the_tokenizer_gives_up_on_is_dropped_alone(
    tokenizer_folder: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    regex = {"type": "Split", "pattern": {"Regex": "(z+)+#"}, "behavior": "Isolated", "invert": False}
    byte_level = definition["pre_tokenizer"]
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [regex, byte_level]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    texts = ["the fox", "z" * 60, "the dog"]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = prepare_text([path], tmp_path / "out", tmp_path / "tokenizer.json", backend="huggingface")
    assert (report["documents"], report["dropped"]) == (2, {"untokenizable": 1})
    assert len(read_samples(tmp_path / "out")) == 2
    (line,) = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"cause": "untokenizable", "file": "corpus.jsonl", "line": 2}


@pytest.mark.timeout(30)
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, tokenizer_folder: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*pipe\.jsonl: it is no regular file"):
        prepare_text([tmp_path / "pipe.jsonl"], tmp_path / "out", tokenizer_folder)
    for inputs, captions in (([tmp_path / "pipe.jsonl"], []), ([], [tmp_path / "pipe.jsonl"])):
        with pytest.raises(DataError, match="it is no regular file"):
            list(training_texts(inputs, captions, 100))
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match="it is no regular file"):
        prepare_text([tmp_path / "corpus.jsonl"], tmp_path / "out", tmp_path / "tokenizer.json")


def test_files_of_others_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".notes.partial").write_text("mine")
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}')
    prepare_text([tmp_path / "corpus.jsonl"], tmp_path / "out", None, store="text")
    assert (tmp_path / "out" / ".notes.partial").read_text() == "mine"


def test_samples_can_hold_text_and_subset_beside_ids(
    corpus: list[dict[str, Any]],
    corpus_file: Path,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    read_samples: ReadSamples,
    tmp_path: Path,
) -> None:
    prepare_text([corpus_file], tmp_path / "out", tokenizer_folder, store="both", meta=True)
    for document, sample in zip(corpus, read_samples(tmp_path / "out").values(), strict=True):
        assert sample["txt"].decode() == document["text"]
        assert json.loads(sample["json"]) == document["meta"]
        assert tokenizer.decode(np.frombuffer(sample["u16"], "<u2")) == document["text"]


def test_ids_of_a_large_vocabulary_take_four_bytes(
    tokenizer_folder: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), 2**16 + 5)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}')
    prepare_text([tmp_path / "corpus.jsonl"], tmp_path / "out", tmp_path / "tokenizer.json")
    assert read_samples(tmp_path / "out") == {
        "0000-0000000000000": {"u32": vocabulary["a"].to_bytes(4, "little")}
    }
    assert open_index(tmp_path / "out").token_dtype == "uint32"


def test_shards_stay_below_their_size_unless_one_document_is_larger(
    corpus_file: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare_text([corpus_file], out, None, store="text", shard_bytes=8 << 10)
    for shard in out.glob("*.tar"):
        single = open_index(out).shards[sorted(out.glob("*.tar")).index(shard)].num_samples == 1
        assert single or shard.stat().st_size <= (8 << 10) + (10 << 10)  # tar pads its end to 10 KiB
    assert len(read_samples(out)) == 300


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2.4 MB: ten shards."""
    stream = random.Random(3)
    path = tmp_path_factory.mktemp("large") / "corpus.jsonl"
    with path.open("w") as file:
        for _ in range(600):
            words = ["".join(stream.choices("etaoinshr", k=stream.randint(2, 9))) for _ in range(600)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.mark.parametrize(("suffix", "processes"), [("", 1), ("", 2), (".gz", 2)])
def test_a_killed_run_goes_on_and_ends_as_if_never_killed(
    large_corpus: Path,
    tokenizer_folder: Path,
    contents: Contents,
    run_tool: RunTool,
    tmp_path: Path,
    suffix: str,
    processes: int,
) -> None:
    path = large_corpus
    if suffix:
        path = tmp_path / f"corpus.jsonl{suffix}"
        path.write_bytes(gzip.compress(large_corpus.read_bytes(), 1))
    out = tmp_path / "out"
    command: list[Any] = ["prepare_text.py", path, "--tokenizer", tokenizer_folder, "--shard-mib", 0.25]
    command += ["--processes", processes, "--backend", "huggingface", "--out"]
    for shards_at_death in (2, 6):
        tool = PausedTool(tmp_path / f"{shards_at_death}", out, shards_at_death, [*command, out])
        tool.wait_for_shards()
        family = psutil.Process(tool.process.pid).children(recursive=True)
        tool.process.send_signal(signal.SIGKILL)
        tool.process.wait()
        tool.go_on()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
        assert not (out / "index.json").exists() and not (out / "report.json").exists()
    written = {shard: shard.stat().st_mtime_ns for shard in out.glob("*.tar")}
    receipts = len(list((out / "preparation" / "receipts").glob("*.json")))

    code, _, err = run_tool(*command, out)
    assert code == 0, err
    untouched = [shard for shard, mtime_ns in written.items() if shard.stat().st_mtime_ns == mtime_ns]
    assert len(untouched) >= receipts >= 1
    prepare_text([path], tmp_path / "whole", tokenizer_folder, shard_bytes=1 << 18, backend="huggingface")
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*partial"))


def test_a_dead_worker_is_reported_and_its_work_is_done_next_time(
    large_corpus: Path, tokenizer_folder: Path, run_tool: RunTool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command: list[Any] = ["prepare_text.py", large_corpus, "--tokenizer", tokenizer_folder, "--out", out]
    command += ["--shard-mib", 0.25, "--processes", 2, "--backend", "huggingface"]
    tool = PausedTool(tmp_path / "pause", out, 1, command)
    tool.wait_for_shards()
    while not (unfinished := list(out.glob(".*.partial"))):
        time.sleep(0.01)
    psutil.Process(int(unfinished[0].name.split(".")[-2])).kill()
    _, err = tool.process.communicate(timeout=60)
    assert tool.process.returncode == 70
    assert "ended unexpectedly (exit code -9" in err and "Traceback" not in err
    code, table, _ = run_tool(*command)
    assert code == 0 and "600" in table


def test_inputs_prepared_apart_give_the_shards_that_they_give_together(
    corpus_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    inputs = [corpus_file, tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"]
    inputs[1].write_bytes(corpus_file.read_bytes()[::-1][:2000] + b"\n" + corpus_file.read_bytes())
    inputs[2].write_bytes(gzip.compress(corpus_file.read_bytes()))
    prepare_text(inputs, tmp_path / "together", tokenizer_folder, shard_bytes=SHARD_BYTES)
    together = {path.name: path.read_bytes() for path in (tmp_path / "together").glob("*.tar")}
    apart: dict[str, bytes] = {}
    for number, path in enumerate(inputs):
        out = tmp_path / f"part{number}"
        prepare_text([path], out, tokenizer_folder, shard_bytes=SHARD_BYTES, first_number=number)
        apart |= {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert apart == together


def test_a_finished_preparation_is_left_alone(
    corpus_file: Path, tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = tmp_path / "out"
    first = prepare_text([corpus_file], out, tokenizer_folder, shard_bytes=SHARD_BYTES)
    assert "was prepared before" not in caplog.text
    written = {file: file.stat().st_mtime_ns for file in [*out.glob("*.tar"), *out.glob("index*")]}
    assert prepare_text([corpus_file], out, tokenizer_folder, shard_bytes=SHARD_BYTES) == first
    assert f"{out} was prepared before: nothing was left to do" in caplog.text
    assert written == {file: file.stat().st_mtime_ns for file in [*out.glob("*.tar"), *out.glob("index*")]}


def test_a_lost_shard_is_written_again(
    corpus_file: Path, tokenizer_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare_text([corpus_file], out, tokenizer_folder, shard_bytes=SHARD_BYTES)
    expected = contents(out)
    sorted(out.glob("*.tar"))[2].unlink()
    prepare_text([corpus_file], out, tokenizer_folder, shard_bytes=SHARD_BYTES)
    assert contents(out) == expected
    assert open_index(out).num_samples == 300


def test_a_folder_begun_otherwise_is_not_mixed_with(
    corpus_file: Path, tokenizer_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare_text([corpus_file], out, tokenizer_folder)
    before = contents(out)
    with pytest.raises(ConfigError, match="store was 'ids', is 'both'"):
        prepare_text([corpus_file], out, tokenizer_folder, store="both")
    assert contents(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "theirs.tar").touch()
    with pytest.raises(ConfigError, match="no preparation of this program wrote"):
        prepare_text([corpus_file], foreign, tokenizer_folder)


@pytest.mark.parametrize("count", [1, 100_000])
def test_an_edited_input_needs_another_folder(count: int, tmp_path: Path) -> None:
    path, out = tmp_path / "animals.jsonl", tmp_path / "out"
    lines = ['{"text": "a cat"}\n'] * count
    path.write_text("".join(lines))
    prepare_text([path], out, None, store="text")
    path.write_text("".join(lines))  # the same content at another time
    prepare_text([path], out, None, store="text")
    path.write_text("".join(lines).replace("cat", "dog"))
    with pytest.raises(ConfigError, match=r"contents\[0\] was 'animals.jsonl: .*, is 'animals.jsonl: "):
        prepare_text([path], out, None, store="text")


def test_folders_of_versions_that_recorded_no_digests_are_taken_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, plan = tmp_path / "animals.jsonl", tmp_path / "out" / "preparation" / "plan.json"
    path.write_text('{"text": "a cat"}\n')
    report = prepare_text([path], tmp_path / "out", None, store="text")
    today = plan.read_bytes()
    plan.write_text(json.dumps({k: v for k, v in json.loads(today).items() if k != "contents"}))
    assert prepare_text([path], tmp_path / "out", None, store="text") == report
    assert "begun by an earlier version" in caplog.text
    assert plan.read_bytes() == today


def test_two_preparations_of_one_folder_exclude_each_other(
    corpus_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "preparation").mkdir()
    with (tmp_path / "preparation" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another preparation is writing"):
            prepare_text([corpus_file], tmp_path, tokenizer_folder)


def test_after_nothing_was_kept_other_options_may_follow(
    corpus_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nothing was kept .*subset Github"):
        prepare_text([corpus_file], tmp_path, tokenizer_folder, subsets=SubsetFilter(keep=("Pile CC",)))
    report = prepare_text([corpus_file], tmp_path, tokenizer_folder, subsets=SubsetFilter(keep=("Pile-CC",)))
    assert list(report["subsets"]) == ["Pile-CC"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.jsonl", "--store", "text"], 65, "no such input file: missing.jsonl"),
        (["{corpus}", "--tokenizer", "missing"], 65, "no tokenizer at"),
        (["{corpus}"], 64, "needs a tokenizer"),
        (["{corpus}", "--store", "text", "--processes", "0"], 64, "must be positive"),
        (["{corpus}", "--store", "text", "--keep", "No", "--processes", "1"], 65, "nothing was kept"),
    ],
)
def test_mistakes_end_with_a_message_and_an_exit_code(
    corpus_file: Path, run_tool: RunTool, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    arguments = [str(corpus_file) if argument == "{corpus}" else argument for argument in arguments]
    found, _, err = run_tool("prepare_text.py", *arguments, "--out", tmp_path / "out")
    assert found == code, err
    assert message in err and "Traceback" not in err
    assert not list((tmp_path / "out").glob("*.tar"))


def test_damage_in_a_worker_reaches_the_user(corpus_file: Path, run_tool: RunTool, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(corpus_file.read_bytes())[:-20])
    code, _, err = run_tool(
        "prepare_text.py",
        *tmp_path.glob("*.gz"),
        *("--store", "text", "--processes", 2, "--out", tmp_path / "out"),
    )
    assert code == 65, err
    assert "is damaged" in err and "Traceback" not in err


def test_gigatoken_is_used_only_where_it_gives_the_same_ids(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoder(definition: bytes) -> Any:
        def encode(pieces: list[str]) -> Any:
            ids, lengths = tokenizer._encode_with_hugging_face(pieces)
            return np.where(ids == ids.max(), 7, ids), lengths

        return encode

    monkeypatch.setattr("metalm.data.preparation.fast_bpe.gigatoken_encoder", encoder)
    assert "gives other ids for" in str(why_not_gigatoken(tokenizer, ["some text"]))


def test_gigatoken_writes_the_same_shards(
    corpus_file: Path, tokenizer_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    pytest.importorskip("gigatoken")
    for backend in ("huggingface", "gigatoken"):
        prepare_text([corpus_file], tmp_path / backend, tokenizer_folder, backend=backend, processes=2)
    assert contents(tmp_path / "gigatoken") == contents(tmp_path / "huggingface")


def test_energon_prepares_the_shards(corpus_file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("megatron.energon")
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    out = tmp_path / "out"
    report = prepare_text([corpus_file], out, tokenizer_folder, shard_bytes=SHARD_BYTES)
    shards = sorted(shard.name for shard in out.glob("*.tar"))
    found = BaseWebdatasetFactory.prepare_dataset(
        out, shards, split_parts_ratio=[("train", 1.0)], workers=1, progress_fn=lambda items, _: items
    )
    assert "u16" in found
    info = json.loads((out / ".nv-meta" / ".info.json").read_text())
    assert sum(info["shard_counts"].values()) == report["documents"]


def test_without_gigatoken_the_reason_is_given(
    tokenizer_folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    with pytest.raises(ConfigError, match="gigatoken cannot be used: it is not installed"):
        prepare_text([corpus_file], tmp_path, tokenizer_folder, backend="gigatoken")
