"""Preparing pairs: all forms of input, every caption kept, bad images counted."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet

from metalm.data.preparation.pair_shards import prepare_pairs
from metalm.data.storage.index import open_index
from metalm.errors import ConfigError, DataError
from metalm.modalities import MEDIA
from metalm.modalities.image import prepare_image

ImageBytes = Callable[..., bytes]
ReadSamples = Callable[[Path], dict[str, dict[str, bytes]]]
Contents = Callable[[Path], dict[str, bytes]]
RunTool = Callable[..., tuple[int, str, str]]
EXPECTED = [("jpg", ["a red thing"]), ("png", ["a blue thing", "it is blue"])]


@pytest.fixture
def images(tmp_path: Path, image_bytes: ImageBytes) -> Path:
    """A folder with one.jpg and two.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "one.jpg").write_bytes(image_bytes("JPEG"))
    (folder / "two.png").write_bytes(image_bytes("PNG", color="blue"))
    return folder


def prepare_image_text(
    inputs: list[Path], out: Path, *, shorter_side: int | None = None, **options: Any
) -> dict[str, Any]:
    convert = functools.partial(prepare_image, shorter_side=shorter_side)
    settings = {"shorter_side": shorter_side}
    return prepare_pairs(inputs, out, modality=MEDIA["image"], convert=convert, settings=settings, **options)


def captions_of(sample: dict[str, bytes]) -> list[str]:
    return [sample["txt"].decode()] if "txt" in sample else json.loads(sample["json"])["captions"]


def pairs(samples: dict[str, dict[str, bytes]]) -> list[tuple[str, list[str]]]:
    return [
        (next(iter(sample.keys() & {"jpg", "png", "webp"})), captions_of(sample))
        for sample in samples.values()
    ]


def write_tars(folder: Path, images: Path) -> Path:
    tars = folder / "tars"
    tars.mkdir()
    samples = [
        {"jpg": (images / "one.jpg").read_bytes(), "txt": b"a red thing", "json": b'{"caption": "a red"}'},
        {
            "png": (images / "two.png").read_bytes(),
            "json": b'{"captions": ["a blue thing", "it is blue"], "status": "success"}',
        },
    ]
    for number, sample in enumerate(samples):
        with webdataset.TarWriter(str(tars / f"{number:05d}.tar"), encoder=False) as writer:
            writer.write({"__key__": f"{number:09d}", **sample})
    return tars


def write_files(folder: Path, images: Path) -> Path:
    (images / "one.txt").write_text("a red thing\n")
    (images / "two.json").write_text('{"captions": ["a blue thing", "it is blue"]}')
    return images


def write_coco(folder: Path, images: Path) -> Path:
    path = folder / "captions.json"
    texts = [(7, "a red thing"), (5, "a blue thing"), (5, "it is blue")]
    content = {
        "images": [{"id": 7, "file_name": "one.jpg"}, {"id": 5, "file_name": "two.png"}],
        "annotations": [{"image_id": image, "caption": text} for image, text in texts],
    }
    path.write_text(json.dumps(content))
    return path


def write_table(separator: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, images: Path) -> Path:
        path = folder / f"table.{'csv' if separator == ',' else 'tsv'}"
        rows = [("caption", "path"), ("a red thing", "one.jpg"), ("a  blue thing", "two.png")]
        rows.append(("it is\\nblue".replace("\\n", " "), "two.png"))
        path.write_text("".join(separator.join(row) + "\n" for row in rows))
        return path

    return write


def write_jsonl(folder: Path, images: Path) -> Path:
    path = folder / "table.jsonl"
    rows = [
        {"path": "one.jpg", "caption": "a red thing"},
        {"path": "two.png", "captions": ["a blue thing", " it is\nblue ", " "]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(kind: str) -> Callable[[Path, Path], Path]:
    """Images as bytes, as paths, or as the package `datasets` writes them."""

    def write(folder: Path, images: Path) -> Path:
        path, names = folder / "table.parquet", ["one.jpg", "two.png"]
        captions = [["a red thing"], ["a blue thing", " it is\nblue ", " "]]
        if kind == "datasets":
            features = datasets.Features(
                {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
            )
            files = [{"bytes": (images / name).read_bytes(), "path": None} for name in names]
            datasets.Dataset.from_dict({"image": files, "captions": captions}, features).to_parquet(path)
        else:
            column = names if kind == "paths" else [(images / name).read_bytes() for name in names]
            name = {"paths": "path", "bytes": "image"}[kind]
            table = pyarrow.table({name: column, "captions": captions, "more": [1, 2]})
            parquet.write_table(table, path, row_group_size=1)
        return path

    return write


@pytest.mark.parametrize(
    "write",
    [
        *(write_tars, write_files, write_coco, write_table(","), write_table("\t"), write_jsonl),
        *map(write_parquet, ("bytes", "paths", "datasets")),
    ],
)
def test_every_form_of_input_gives_the_same_pairs(
    write: Callable[[Path, Path], Path], images: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    source = write(tmp_path, images)
    report = prepare_image_text([source], tmp_path / "out", media_folder=images)
    samples = read_samples(tmp_path / "out")
    assert pairs(samples) == EXPECTED
    stored = [sample.get("jpg") or sample.get("png") for sample in samples.values()]
    assert stored == [(images / "one.jpg").read_bytes(), (images / "two.png").read_bytes()]
    assert (report["images"], report["captions"], report["dropped"]) == (2, 3, {})
    assert open_index(tmp_path / "out").num_samples == 2


def huge_png() -> bytes:
    """A PNG of a few bytes that states 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def test_bad_images_are_skipped_and_counted(
    image_bytes: ImageBytes, read_samples: ReadSamples, tmp_path: Path
) -> None:
    files = {
        "good.webp": image_bytes("WEBP"),
        "cut.jpg": image_bytes("JPEG", (300, 300))[:-500],
        "text.png": b"<html>not found</html>",
        "gif.jpg": image_bytes("GIF"),
        "huge.png": huge_png(),
        "silent.png": image_bytes("PNG"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [
        {"path": name, "caption": " " if name == "silent.png" else "x"} for name in [*files, "absent.png"]
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare_image_text([tmp_path / "table.jsonl"], tmp_path / "out")
    assert pairs(read_samples(tmp_path / "out")) == [("webp", ["x"])]
    assert report["dropped"] == {
        "image_bomb": 1,
        "missing_caption": 1,
        "missing_image": 1,
        "undecodable_image": 3,
    }


def test_bad_rows_of_parquet_are_counted_with_their_places(images: Path, tmp_path: Path) -> None:
    good = (images / "one.jpg").read_bytes()
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": good, "path": "x.jpg"}, "caption": "x"},
        {"image": {"bytes": None, "path": str(images / "two.png")}, "caption": "x"},
        {"image": {"bytes": None, "path": "absent.png"}, "caption": "x"},
        {"image": {"bytes": None, "path": None}, "caption": "x"},
        {"image": None, "caption": "x"},
        {"image": {"bytes": good[:-50], "path": None}, "caption": "x"},
        {"image": {"bytes": good, "path": None}, "caption": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet", row_group_size=3)
    report = prepare_image_text([tmp_path / "table.parquet"], tmp_path / "out")
    assert report["images"] == 2
    assert report["dropped"] == {"missing_caption": 1, "missing_image": 3, "undecodable_image": 1}
    found = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["cause"], row["row_group"], row["row"]) for row in found] == [
        ("missing_image", 0, 2),
        ("missing_image", 1, 0),
        ("missing_image", 1, 1),
        ("undecodable_image", 1, 2),
        ("missing_caption", 2, 0),
    ]


def test_a_caption_column_that_is_named_is_the_one_that_is_read(
    images: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    rows = [{"path": "one.jpg", "captions": ["old"], "new": ["first", "second"], "meta.text": "other"}]
    (images / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), images / "table.parquet")
    for name in ("table.jsonl", "table.parquet"):
        for column, expected in ((None, ["old"]), ("new", ["first", "second"]), ("meta.text", ["other"])):
            out = tmp_path / f"{name} {column}"
            prepare_image_text([images / name], out, caption_column=column)
            assert [captions_of(sample) for sample in read_samples(out).values()] == [expected]


def test_rows_without_a_path_or_captions_are_counted(images: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"path": "one.jpg", "caption": "x"},
        {"path": "two.png", "captions": []},
        {"path": None, "caption": "x"},
        {"path": None, "caption": "y"},
        {"path": "three.png", "caption": ["x", "y"]},
    ]
    shutil.copy(images / "two.png", images / "three.png")
    (images / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare_image_text([images / "table.jsonl"], tmp_path / "out")
    assert (report["images"], report["captions"]) == (2, 3)
    assert report["dropped"] == {"missing_caption": 1, "missing_path": 2}


def test_annotations_of_images_that_a_coco_file_lacks_are_left_out(images: Path, tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "one.jpg"}],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 7, "caption": "y"}],
    }
    (images / "subset.json").write_text(json.dumps(content))
    assert prepare_image_text([images / "subset.json"], tmp_path / "out")["captions"] == 1


def test_another_folder_of_images_is_another_preparation(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({"path": ["one.jpg", "two.png"], "caption": ["x", "y"]}), table)
    shutil.copy(images / "one.jpg", tmp_path)
    assert prepare_image_text([table], tmp_path / "out")["dropped"] == {"missing_image": 1}
    with pytest.raises(ConfigError, match="begun from other input"):
        prepare_image_text([table], tmp_path / "out", media_folder=images)


def test_parquet_is_split_by_row_groups_and_whatever_works_on_it_writes_the_same(
    images: Path, read_samples: ReadSamples, tmp_path: Path
) -> None:
    rows = [{"image": (images / "one.jpg").read_bytes(), "caption": f"{number}"} for number in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet", row_group_size=2)
    size = 2 * len(rows[0]["image"])
    for processes in (1, 2):
        prepare_image_text(
            [tmp_path / "table.parquet"], tmp_path / str(processes), shard_bytes=size, processes=processes
        )
    one, two = (read_samples(tmp_path / str(processes)) for processes in (1, 2))
    assert one == two
    assert [captions_of(sample) for sample in one.values()] == [[f"{number}"] for number in range(6)]
    assert len({key.rpartition("-")[0] for key in one}) > 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"picture": [b"x"], "caption": ["x"]},
            "no column path or image; it has picture, caption",
        ),
        ({"image": [b"x"], "words": ["x"]}, "no column captions or caption; it has image, words"),
    ],
)
def test_columns_of_parquet_that_are_not_there_are_named(
    columns: dict[str, list[Any]], message: str, tmp_path: Path
) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    with pytest.raises(DataError, match=message):
        prepare_image_text([tmp_path / "table.parquet"], tmp_path / "out")


def test_dropped_pairs_are_named_by_file_and_line(images: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("path,caption\none.jpg,x\nabsent.png,x\ntwo.png, \none.jpg,y\n")
    report = prepare_image_text([tmp_path / "table.csv"], tmp_path / "out", media_folder=images)
    assert report["dropped"] == {"missing_caption": 1, "missing_image": 1}
    found = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert found == [
        {"cause": "missing_image", "file": "table.csv", "line": 3, "path": str(images / "absent.png")},
        {"cause": "missing_caption", "file": "table.csv", "line": 4, "path": str(images / "two.png")},
    ]


def test_other_formats_and_orphans_are_counted_under_a_name(
    images: Path, image_bytes: ImageBytes, tmp_path: Path
) -> None:
    (images / "one.txt").write_text("x")
    for name, kind in (("moving.gif", "GIF"), ("scan.TIFF", "TIFF")):
        (images / name).write_bytes(image_bytes(kind))
    for name in ("moving.txt", "alone.txt", "alone.json", "00000_stats.json"):
        (images / name).write_text("x")
    report = prepare_image_text([images], tmp_path / "out")
    assert report["images"] == 1
    assert report["dropped"] == {"missing_caption": 1, "missing_image": 2, "unsupported_image": 2}
    lines = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    found = {(row["cause"], Path(row["file"]).name) for row in map(json.loads, lines)}
    assert found == {
        ("missing_caption", "two.png"),
        ("missing_image", "alone.txt"),
        ("missing_image", "alone.json"),
        ("unsupported_image", "moving.gif"),
        ("unsupported_image", "scan.TIFF"),
    }
    for image in ("one.jpg", "two.png"):
        (images / image).unlink()
    with pytest.raises(DataError, match="lists no image, but 2 unsupported_image, 3 missing_image"):
        prepare_image_text([images], tmp_path / "other")


def test_other_formats_in_archives_are_counted_under_a_name(
    image_bytes: ImageBytes, write_shard: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "tars").mkdir()
    good, gif = image_bytes("JPEG"), image_bytes("GIF")
    samples = [{"jpg": good, "txt": b"x"}, {"gif": gif, "txt": b"x"}, {"txt": b"x"}]
    write_shard(tmp_path / "tars" / "a.tar", samples)
    report = prepare_image_text([tmp_path / "tars"], tmp_path / "out")
    assert report["dropped"] == {"missing_image": 1, "unsupported_image": 1}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["list.json", "list.csv", "list.jsonl", "folder/a.tar"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"cannot read {path}: it is no regular file"):
        prepare_image_text([path.parent if path.suffix == ".tar" else path], tmp_path / "out")


def test_a_link_to_nothing_is_named(tmp_path: Path, run_tool: RunTool) -> None:
    (tmp_path / "a.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(DataError, match=f"no such input file: {tmp_path / 'a.tar'}"):
        prepare_image_text([tmp_path], tmp_path / "out")
    code, _, error = run_tool("index_shards.py", tmp_path, "--kind", "image_text", "--processes", 1)
    assert (code, "Traceback" in error) == (65, False), error
    assert f"shard {tmp_path / 'a.tar'} cannot be read: No such file or directory" in error


def test_a_suffix_that_lies_is_corrected(
    image_bytes: ImageBytes, read_samples: ReadSamples, tmp_path: Path
) -> None:
    (tmp_path / "one.jpg").write_bytes(image_bytes("PNG"))
    (tmp_path / "one.txt").write_text("x")
    prepare_image_text([tmp_path], tmp_path / "out")
    assert pairs(read_samples(tmp_path / "out")) == [("png", ["x"])]


@pytest.mark.parametrize(("size", "expected"), [((300, 200), (48, 32)), ((40, 20), (40, 20))])
def test_large_images_shrink_to_a_shorter_side_and_small_ones_stay(
    image_bytes: ImageBytes,
    read_samples: ReadSamples,
    tmp_path: Path,
    size: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    content = image_bytes("JPEG", size)
    (tmp_path / "one.jpg").write_bytes(content)
    (tmp_path / "one.txt").write_text("x")
    prepare_image_text([tmp_path], tmp_path / "out", shorter_side=32)
    (sample,) = read_samples(tmp_path / "out").values()
    assert Image.open(io.BytesIO(sample["jpg"])).size == expected
    assert (sample["jpg"] == content) == (size == expected)


def test_images_are_turned_upright(read_samples: ReadSamples, tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "one.jpg", exif=exif)
    (tmp_path / "one.txt").write_text("x")
    prepare_image_text([tmp_path], tmp_path / "out")
    (sample,) = read_samples(tmp_path / "out").values()
    upright = Image.open(io.BytesIO(sample["jpg"]))
    assert upright.size == (20, 40) and 0x0112 not in upright.getexif()


@pytest.fixture
def table(images: Path) -> Path:
    """Fifty rows about two images under fifty names."""
    rows = []
    for number in range(50):
        (images / f"{number:02d}.png").symlink_to(images / "two.png")
        rows.append({"path": f"{number:02d}.png", "caption": f"number {number}"})
    path = images / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_output_depends_on_neither_processes_nor_losses_on_the_way(
    table: Path, contents: Contents, read_samples: ReadSamples, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prepare_image_text([table], one, pairs_per_unit=8)
    prepare_image_text([table], two, pairs_per_unit=8, processes=2)
    assert contents(one) == contents(two)
    assert [captions for _, captions in pairs(read_samples(two))] == [[f"number {n}"] for n in range(50)]
    kept = {shard: shard.stat().st_mtime_ns for shard in sorted(two.glob("*.tar"))[1:]}
    sorted(two.glob("*.tar"))[0].unlink()
    prepare_image_text([table], two, pairs_per_unit=8)
    assert contents(one) == contents(two)
    assert kept == {shard: shard.stat().st_mtime_ns for shard in kept}


def test_other_captions_need_another_folder(table: Path, tmp_path: Path) -> None:
    prepare_image_text([table], tmp_path / "out")
    table.write_text(table.read_text().replace("number 7", "number seven"))
    with pytest.raises(ConfigError, match="begun from other input"):
        prepare_image_text([table], tmp_path / "out")


def test_edited_files_need_another_folder(image_bytes: ImageBytes, tmp_path: Path) -> None:
    folder, out = tmp_path / "pairs", tmp_path / "out"
    folder.mkdir()
    files = {"one.png": image_bytes("PNG"), "one.txt": b"a cat"}

    def write(name: str, content: bytes, seconds: int) -> None:
        (folder / name).write_bytes(content)
        os.utime(folder / name, (seconds, seconds))

    for name, content in files.items():
        write(name, content, 10**9)
    prepare_image_text([folder], out)
    prepare_image_text([folder], out)
    for name, edited in (("one.txt", b"a dog"), ("one.png", image_bytes("PNG", color="blue"))):
        write(name, edited, 10**9 + 1)
        with pytest.raises(ConfigError, match="contents was .*, is "):
            prepare_image_text([folder], out)
        write(name, files[name], 10**9)
    prepare_image_text([folder], out)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "", "expected a folder"),
        ("absent.csv", None, "No such file"),
        ("empty.jsonl", "", "lists no image"),
        ("rows.jsonl", "{", "line 1: not JSON"),
        ("rows.jsonl", "[]", "expected an object"),
        ("rows.csv", "file,text\na.jpg,x\n", "there is no 'captions' or 'caption'; it has file, text"),
        ("coco.json", '{"images": []}', "no COCO captions file"),
        ("latin.csv", b"path,caption\na.jpg,\xe9\n", "is not UTF-8"),
    ],
)
def test_unusable_lists_are_data_errors(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        prepare_image_text([tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tool_reports_and_ends_with_exit_codes(table: Path, run_tool: RunTool, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "out", "--shard-images", 30, "--processes", 1]
    code, out, err = run_tool("prepare_image_text.py", table, *options)
    assert code == 0 and "2 shards" in out, err
    code, _, err = run_tool("prepare_image_text.py", tmp_path / "no.csv", "--out", tmp_path / "other")
    assert code == 65 and "No such file" in err and "Traceback" not in err
    code, _, err = run_tool("prepare_image_text.py", table, "--out", tmp_path / "out", "--resize", 0)
    assert code == 64 and "must be positive" in err
