"""Text in the forms of others: each file made by its own writer, counted exactly, damaged files refused."""

from __future__ import annotations

import bz2
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pyarrow import parquet

from metalm.data.preparation.megatron_tokens import open_token_dataset
from metalm.data.preparation.text_document import Document, TextFields
from metalm.data.preparation.text_files import documents, open_text_files
from metalm.data.preparation.text_shards import SubsetFilter, prepare_text
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError, MetaLMError
from mutations import mutate_bytes

Contents = Callable[[Path], dict[str, bytes]]
ReadSamples = Callable[[Path], dict[str, dict[str, bytes]]]
RunTool = Callable[..., tuple[int, str, str]]
SHARD_BYTES = 64 << 10
MUTATIONS = 300


@pytest.fixture(scope="module")
def table(corpus: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in 15 row groups."""
    path = tmp_path_factory.mktemp("table") / "corpus.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(corpus), path, row_group_size=20, compression="zstd")
    return path


def write_token_dataset(path: Path, texts: list[list[str]], tokenizer: Tokenizer) -> None:
    """A text is a sequence; each ends with the end of the document, as Megatron's own tool leaves them."""
    model = tokenizers.Tokenizer.from_buffer(tokenizer.definition)
    model.encode_special_tokens = True
    builder = IndexedDatasetBuilder(str(path), dtype=np.uint16)
    for sequences in texts:
        ids = [[*model.encode(text).ids, tokenizer.document_id] for text in sequences]
        builder.add_document(
            torch.tensor([one for sequence in ids for one in sequence]), [len(one) for one in ids]
        )
    builder.finalize(str(path.with_suffix(".idx")))


@pytest.mark.parametrize("processes", [1, 3])
def test_row_groups_become_the_same_shards_for_any_number_of_processes(
    corpus: list[dict[str, Any]],
    table: Path,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    contents: Contents,
    read_samples: ReadSamples,
    tmp_path: Path,
    processes: int,
) -> None:
    out = tmp_path / "out"
    report = prepare_text([table], out, tokenizer_folder, shard_bytes=SHARD_BYTES, processes=processes)
    samples = read_samples(out)
    texts = [tokenizer.decode(np.frombuffer(sample["u16"], "<u2")) for sample in samples.values()]
    assert texts == [document["text"] for document in corpus]
    assert [int(key.partition("-")[2]) for key in samples] == list(range(300))
    subsets = [document["meta"]["pile_set_name"] for document in corpus]
    counted = {name: amounts["documents"] for name, amounts in report["subsets"].items()}
    assert counted == {name: subsets.count(name) for name in sorted(set(subsets))}
    assert len(list((out / "preparation" / "receipts").iterdir())) > 4
    again = tmp_path / "again"
    prepare_text([table], again, tokenizer_folder, shard_bytes=SHARD_BYTES)
    assert contents(again) == contents(out)


def test_an_interrupted_table_goes_on_with_the_row_groups_that_are_missing(
    table: Path, tokenizer_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare_text([table], out, tokenizer_folder, shard_bytes=SHARD_BYTES)
    whole = contents(out)
    receipts = sorted((out / "preparation" / "receipts").iterdir())
    untouched = receipts[0].stat().st_mtime_ns
    receipts[1].unlink()
    (out / "index.json").unlink()
    prepare_text([table], out, tokenizer_folder, shard_bytes=SHARD_BYTES)
    assert contents(out) == whole
    assert receipts[0].stat().st_mtime_ns == untouched


def test_a_table_of_datasets_is_read_by_the_columns_that_are_named(
    tmp_path: Path, read_samples: ReadSamples, run_tool: RunTool
) -> None:
    rows = datasets.Dataset.from_dict({"content": ["a fox", "a dog"], "dump": ["x", "y"], "n": [1, 2]})
    rows.to_parquet(tmp_path / "a.parquet")
    out = tmp_path / "out"
    options = ("--text-field", "content", "--subset-field", "dump", "--keep", "y")
    code, printed, error = run_tool(
        "prepare_text.py", tmp_path / "a.parquet", *options, "--store", "text", "--out", out, "--processes", 1
    )
    assert code == 0, error
    assert read_samples(out) == {"0000-0000000000001": {"txt": b"a dog"}}
    assert "dropped: subset x" in printed


def test_dropped_rows_are_counted_with_their_row_group_and_row(tmp_path: Path) -> None:
    texts = pyarrow.array(["good", "", None, " ", b"\xff".decode("latin-1"), "good"])
    damaged = pyarrow.array([b"good", b"\xff\xfe", b"good"]).cast(pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    parquet.write_table(pyarrow.table({"text": damaged}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "c.parquet")
    inputs = [tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")]
    report = prepare_text(inputs, tmp_path / "out", None, store="text")
    assert report["documents"] == 5
    assert report["dropped"] == {"empty_text": 2, "invalid_unicode": 1, "missing_text": 3}
    lines = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    places = {(one["cause"], one["file"], one["row_group"], one["row"]) for one in map(json.loads, lines)}
    assert places == {
        ("empty_text", "a.parquet", 0, 1),
        ("missing_text", "a.parquet", 1, 0),
        ("empty_text", "a.parquet", 1, 1),
        ("invalid_unicode", "b.parquet", 0, 1),
        ("missing_text", "c.parquet", 0, 0),
        ("missing_text", "c.parquet", 0, 1),
    }


@pytest.mark.parametrize(
    "text_type", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()]
)
def test_texts_of_any_type_are_read_from_within_other_columns(
    tmp_path: Path, text_type: pyarrow.DataType
) -> None:
    inner = pyarrow.struct([("body", text_type), ("n", pyarrow.int64())])
    values = [{"body": b"a fox" if text_type == pyarrow.binary() else "a fox", "n": 1}, None]
    columns = {"page": pyarrow.array(values, inner), "set": pyarrow.array(["x", None])}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    [file] = open_text_files([tmp_path / "a.parquet"], TextFields("page.body", "set"))
    _, records = next(stretches := file.stretches(1, 0))
    assert [record.document for record in records] == [Document("a fox", "x", 5), "missing_text"]
    stretches.close()


def test_one_text_in_many_rows_is_held_once(tmp_path: Path) -> None:
    """What is small as stored may stand for more than memory holds."""
    text = "a fox " * (1 << 17)
    path = tmp_path / "a.parquet"
    writer = parquet.ParquetWriter(
        path,
        pyarrow.schema({"text": pyarrow.string()}),
        compression="zstd",
        dictionary_pagesize_limit=1 << 22,
    )
    index = pyarrow.array([0] * 1000, pyarrow.int32())
    with writer:
        writer.write_table(
            pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(index, [text]).cast(pyarrow.string())})
        )
    before = pyarrow.total_allocated_bytes()
    [file] = open_text_files([path], TextFields())
    _, records = next(stretches := file.stretches(1 << 20, 0))
    first = next(records)
    assert first.document == Document(text, "unknown", len(text))
    assert pyarrow.total_allocated_bytes() - before < 20 * len(text)  # of 1,000
    stretches.close()


def test_documents_of_a_token_dataset_keep_their_bounds(
    corpus: list[dict[str, Any]], tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """One sequence is a document, or several, as sentences are."""
    texts = [document["text"] for document in corpus[:40]]
    split = [text.partition(" ") for text in texts[:20]]
    sequences = [[a, b + c] for a, b, c in split] + [[text] for text in texts[20:]]
    write_token_dataset(tmp_path / "old.bin", sequences, tokenizer)
    [file] = open_text_files([tmp_path / "old.bin"], TextFields(), tokenizer_folder)
    found = [document.text for document in documents([file])]
    assert found == texts
    in_stretches = []
    for number in range(file.num_stretches(1000)):
        for _, records in file.stretches(1000, number):
            in_stretches += [(record.key, record.place) for record in records]
    assert in_stretches == [(number, {"document": number}) for number in range(40)]


def test_a_token_dataset_is_prepared_with_another_tokenizer(
    corpus: list[dict[str, Any]],
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    read_samples: ReadSamples,
    run_tool: RunTool,
    tmp_path: Path,
) -> None:
    texts = [document["text"] for document in corpus[:40]]
    write_token_dataset(tmp_path / "old.bin", [[text] for text in [*texts, "", "good"]], tokenizer)
    out = tmp_path / "out"
    arguments = (tmp_path / "old.bin", "--store", "both", "--tokenizer", tokenizer_folder, "--out", out)
    code, _, error = run_tool("prepare_text.py", *arguments, "--processes", 1)
    assert code == 64 and "old.bin holds token ids: name their tokenizer with --from-tokenizer" in error
    code, _, error = run_tool(
        "prepare_text.py", *arguments, "--processes", 1, "--from-tokenizer", tokenizer_folder
    )
    assert code == 0, error
    samples = list(read_samples(out).values())
    assert [sample["txt"].decode() for sample in samples] == [*texts, "good"]
    assert np.frombuffer(samples[0]["u16"], "<u2").tolist() == tokenizer.encode(texts)[0].tolist()
    [line] = (out / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"cause": "empty_text", "file": "old.bin", "document": 40}


def test_an_edited_index_of_a_token_dataset_needs_another_folder(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    def prepare() -> None:
        prepare_text(
            [tmp_path / "old.bin"], tmp_path / "out", None, from_tokenizer=tokenizer_folder, store="text"
        )

    write_token_dataset(tmp_path / "old.bin", [["a cat"], ["a dog"]], tokenizer)
    ids = (tmp_path / "old.bin").read_bytes()
    prepare()
    write_token_dataset(tmp_path / "old.bin", [["a cat", "a dog"]], tokenizer)
    assert (tmp_path / "old.bin").read_bytes() == ids
    with pytest.raises(ConfigError, match=r"contents\[1\] was 'old.idx: "):
        prepare()


def test_ids_that_the_tokenizer_lacks_are_counted(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for ids in ([70, 71], [70, tokenizer.size], [-1], [70]):
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "a.idx"))
    [file] = open_text_files([tmp_path / "a.bin"], TextFields(), tokenizer_folder)
    [(_, records)] = file.stretches(1 << 20, 0)
    causes = [record.document for record in records if isinstance(record.document, str)]
    assert causes == ["token_out_of_range"] * 2


def test_a_file_of_bzip2_gives_the_shards_of_a_plain_one(
    corpus_file: Path, tokenizer_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    """Of several streams, as parallel compressors write it."""
    content = corpus_file.read_bytes()
    path = tmp_path / "corpus.jsonl.bz2"
    path.write_bytes(bz2.compress(content[:100_000]) + bz2.compress(content[100_000:]))
    for name, given, processes in (("plain", corpus_file, 1), ("packed", path, 2)):
        prepare_text([given], tmp_path / name, tokenizer_folder, shard_bytes=SHARD_BYTES, processes=processes)
    plain, packed = contents(tmp_path / "plain"), contents(tmp_path / "packed")
    assert plain.pop("preparation/plan.json") != packed.pop("preparation/plan.json")
    assert packed == plain
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"corpus\.jsonl\.bz2.* is damaged"):
        list(documents(open_text_files([path], TextFields())))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.xz", "a", "a.tar", "a.idx", "a.gz"])
def test_an_unknown_form_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"{name}: its form is unknown; expected .*\.parquet"):
        prepare_text([tmp_path / name], tmp_path / "out", None, store="text")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(table: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'body', but text, meta\.pile_set_name: .*--text-field"):
        prepare_text([table], tmp_path / "out", None, store="text", fields=TextFields("body"))
    with pytest.raises(ConfigError, match=r"--from-tokenizer is of token ids, but no input is a \.bin"):
        open_text_files([table], TextFields(), tokenizer_folder)
    (tmp_path / "alone.bin").write_bytes(b"\1\0")
    with pytest.raises(DataError, match=r"alone\.idx does not exist"):
        open_text_files([tmp_path / "alone.bin"], TextFields(), tokenizer_folder)


def test_other_fields_are_another_preparation(table: Path, tmp_path: Path) -> None:
    prepare_text([table], tmp_path / "out", None, store="text")
    with pytest.raises(ConfigError, match="begun from other input or options"):
        prepare_text([table], tmp_path / "out", None, store="text", fields=TextFields("meta.pile_set_name"))
    prepare_text([table], tmp_path / "out", None, store="text", subsets=SubsetFilter())


def test_mutated_tables_are_read_or_refused_by_name(tmp_path: Path) -> None:
    rows = [{"text": f"a fox and {number} dogs", "meta": {"pile_set_name": "x"}} for number in range(40)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=15, write_page_checksum=True)
    content, chance, refused = path.read_bytes(), random.Random(8), 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutate_bytes(content, chance))
        try:
            files = open_text_files([path], TextFields())
            found = list(documents(files))
        except MetaLMError as error:
            refused += 1
            assert path.name in str(error)
        else:
            assert all(isinstance(document.text, str) for document in found)
    assert refused > MUTATIONS // 2


@pytest.mark.parametrize("changed", [".bin", ".idx"])
def test_mutated_token_datasets_are_read_or_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, changed: str
) -> None:
    path = tmp_path / "a.bin"
    write_token_dataset(path, [[f"a fox and {number} dogs"] for number in range(20)], tokenizer)
    file = path.with_suffix(changed)
    content, chance, refused = file.read_bytes(), random.Random(9), 0
    for _ in range(MUTATIONS):
        file.write_bytes(mutate_bytes(content, chance))
        try:
            dataset = open_token_dataset(path)
            for ids in dataset.documents(dataset.beginning_in(0, dataset.size), 1000):
                assert ids is not None and len(ids) <= dataset.size // 2
        except MetaLMError as error:
            refused += 1
            assert "a.bin" in str(error) or "a.idx" in str(error)
    assert refused > MUTATIONS // 4
