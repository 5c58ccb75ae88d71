"""Documents with images between their texts: prepared from the layouts of others, cut to rows, and learnt."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.lanes import Lane, Mixture
from metalm.data.preparation.document_cutting import DocumentCutter
from metalm.data.preparation.interleaved_records import document_of
from metalm.data.preparation.interleaved_shards import RowSize, prepare_interleaved
from metalm.data.preparation.media_files import MediaFiles
from metalm.data.sources import open_source
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities import MEDIA
from mutations import mutate_value

MakeConfig = Callable[..., RunConfig]
RunTool = Callable[..., tuple[int, str, str]]
CONVERTS = {"image": MEDIA["image"].convert(shorter_side=None)}
IMAGE_VECTORS = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, jpeg: Callable[..., bytes]) -> Path:
    """Image n has the colour (n, 2 n, 3 n)."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(jpeg((number, 2 * number, 3 * number)))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


def of_obelics(number: int) -> dict[str, Any]:
    """Of two to four texts with images between them."""
    texts: list[str | None] = []
    shown: list[str | None] = []
    for place in range(2 + number % 3):
        texts += [None, f"fox {number} {place}."]
        shown += [f"https://web/{number}", None]
    return {"texts": texts, "images": shown, "general_metadata": "{}"}


def prepare(inputs: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    return prepare_interleaved(inputs, out, converts=CONVERTS, settings={}, **options)


def written(out: Path, tokenizer: Tokenizer) -> list[Example]:
    source = open_source("documents", out, tokenizer)
    return [source.example(location) for location in source.index.locate(np.arange(source.index.num_samples))]


def test_documents_of_datasets_are_learnt_with_their_images_in_place(
    images: Path, tokenizer: Tokenizer, make_config: MakeConfig, run_tool: RunTool, tmp_path: Path
) -> None:
    """Links find their images through a table; texts are trained on, images are encoded."""
    table = tmp_path / "images.csv"
    table.write_text("url,path\n" + "".join(f"https://web/{n},{n}.jpg\n" for n in range(20)))
    rows = datasets.Dataset.from_list([of_obelics(number) for number in range(20)])
    rows.to_parquet(tmp_path / "a.parquet", batch_size=7)
    out = tmp_path / "out"
    code, printed, error = run_tool(
        "prepare_interleaved.py", tmp_path / "a.parquet", "--media-folder", images, "--image-table", table,
        "--out", out, "--processes", 1,
    )  # fmt: skip
    assert code == 0, error
    assert "dropped" not in printed
    num_images = sum(2 + number % 3 for number in range(20))
    report = json.loads((out / "report.json").read_text())
    assert (report["examples"], report["media"], report["answers"]) == (20, num_images, num_images)

    config = make_config(
        {"documents": {"path": out, "readers": {"image": "vision"}, "overflow": "split"}}, data={"lanes": 1}
    )
    lane = Lane(Mixture(Corpus(config)), 0)
    seen: set[int] = set()
    for _ in range(40):
        row = lane.next_row()
        vision = row.spans["vision"]
        places = [start for start, _ in vision.bounds]
        colours = vision.media.reshape(-1, IMAGE_VECTORS * 8 * 8, 3).mean(axis=1)
        for start, end in zip([0, *row.document_ends[:-1]], row.document_ends, strict=True):
            own = [(at, colour) for at, colour in zip(places, colours, strict=True) if start <= at < end]
            at = start + 1
            words = []
            for place, _ in own:
                words.append(tokenizer.decode(row.tokens[at:place]))
                at = place + IMAGE_VECTORS
            words.append(tokenizer.decode(row.tokens[at : end - 1]))
            number = int(words[1].split()[1])
            seen.add(number)
            assert words == ["", *(f"fox {number} {place}." for place in range(2 + number % 3))]
            for _, colour in own:
                np.testing.assert_allclose(colour, [number, 2 * number, 3 * number], atol=3)
            trained = row.tokens[start + 1 : end][row.loss_weights[start : end - 1] == 1]
            assert tokenizer.decode(trained) == "".join(words)
            assert trained[-1] == tokenizer.document_id
    assert seen == set(range(20))


def test_sentences_of_mmc4_have_their_images_in_front(
    images: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record = {
        "text_list": ["A fox.", "It runs.", " ", "A dog."],
        "image_info": [
            {"image_name": "3.jpg", "raw_url": "https://web/3", "matched_text_index": 3, "matched_sim": 0.3},
            {"image_name": "1.jpg", "raw_url": "https://web/1", "matched_text_index": 0, "matched_sim": 0.2},
        ],
        "similarity_matrix": [[0.1] * 4] * 2,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", media_folder=images)
    [document] = written(tmp_path / "out", tokenizer)
    kinds = [(part.modality, part.is_encoded, part.is_trained) for part in document.parts]
    assert kinds == [("image", True, False), ("text", False, True)] * 2
    assert [part.content for part in document.parts[1::2]] == ["A fox. It runs.", "A dog."]
    files = [bytes(part.content) for part in document.parts[::2] if not isinstance(part.content, str)]
    assert files == [(images / "1.jpg").read_bytes(), (images / "3.jpg").read_bytes()]


def test_what_cannot_be_used_is_counted_and_placed_and_the_rest_kept(
    images: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = [
        {"texts": ["a", None, "b", None, "c"], "images": [None, "gone.jpg", None, "1.jpg", None]},
        {"texts": ["a", None, "b", None], "images": [None, "broken.jpg", None, "2.jpg"]},
        {"texts": ["a"], "images": ["https://web/1"]},
        {"texts": ["a", None, "b"], "images": [None, "broken.jpg", None]},
        {"texts": ["a", "b"], "images": [None]},
        {"texts": [], "images": []},
        {"text": "fox"},
        {"texts": [None], "images": ["1.jpg"]},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a.jsonl").write_text(content.replace('{"text":', '\n{"text":'))  # with a blank line
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", media_folder=images)
    assert report["dropped"] == {
        "bad_document": 1, "empty_document": 1, "missing_image": 1, "no_answer": 1, "no_document": 1,
        "no_image": 2, "remote_image": 1, "undecodable_image": 2,
    }  # fmt: skip
    assert (report["examples"], report["media"]) == (2, 2)
    first, second = written(tmp_path / "out", tokenizer)
    assert [part.content for part in first.parts if part.modality == "text"] == ["a\n\nb", "c"]
    assert [part.content for part in second.parts if part.modality == "text"] == ["a\n\nb"]
    assert [part.modality for part in second.parts] == ["text", "image"]
    dropped = map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text().splitlines())
    assert Counter((one["cause"], one["file"], one["line"]) for one in dropped) == Counter(
        [
            *[("missing_image", "a.jsonl", 1), ("undecodable_image", "a.jsonl", 2)],
            *[("remote_image", "a.jsonl", 3), ("no_image", "a.jsonl", 3)],
            *[("undecodable_image", "a.jsonl", 4), ("no_image", "a.jsonl", 4)],
            *[("bad_document", "a.jsonl", 5), ("empty_document", "a.jsonl", 6)],
            *[("no_document", "a.jsonl", 8), ("no_answer", "a.jsonl", 9)],
        ]
    )


def test_long_documents_become_pieces_that_fit_and_lose_nothing(
    images: Path, tokenizer: Tokenizer, tokenizer_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    words = [f"fox{number} jumps" for number in range(60)]
    record = {
        "texts": [" ".join(words[:30]), None, None, " ".join(words[30:]), None],
        "images": [None, "1.jpg", "2.jpg", None, "3.jpg"],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    size = RowSize(tokenizer_folder, 64, IMAGE_VECTORS)
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", media_folder=images, row_size=size)
    assert (report["dropped"], report["media"]) == ({}, 3)
    pieces = written(tmp_path / "out", tokenizer)
    assert len(pieces) == report["examples"] > 3
    texts = [str(part.content) for piece in pieces for part in piece.parts if part.modality == "text"]
    assert " ".join(texts).split() == " ".join(words).split()
    source = {"path": tmp_path / "out", "readers": {"image": "vision"}, "overflow": "split"}
    corpus = Corpus(make_config({"documents": source}))
    maker = corpus.document_maker(corpus.sources[0])
    assert maker is not None
    locations = corpus.sources[0].index.locate(np.arange(len(pieces)))
    lengths = [len(maker.finish(maker.look(corpus.sources[0], one), ()).document) for one in locations]
    assert max(lengths) <= 64 and min(lengths[:-1]) > 50


def test_long_documents_are_cut_as_if_damaged_images_were_missing(
    images: Path, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    size, found = RowSize(tokenizer_folder, 32, IMAGE_VECTORS), {}
    texts = [one for number in range(12) for one in (f"fox {number} jumps over the dog.", None)]
    for name in ("broken.jpg", "gone.jpg"):
        records = [
            {"texts": texts, "images": [one for image in 2 * shown for one in (None, image)]}
            for shown in (6 * [name], [name, None, "1.jpg", name, name, name])
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        report = prepare([path], tmp_path / name, media_folder=images, row_size=size)
        assert report["dropped"].pop("no_image") == 1 and report["media"] == 2
        assert list(report["dropped"].values()) == [20]
        found[name] = [
            [part.content if isinstance(part.content, str) else None for part in piece.parts]
            for piece in written(tmp_path / name, tokenizer)
        ]
    pieces = found["broken.jpg"]
    assert pieces == found["gone.jpg"] and len(pieces) > 4
    assert any("dog.\n\nfox" in text for piece in pieces for text in piece if text is not None)
    for piece in pieces:
        sizes = [IMAGE_VECTORS if text is None else len(tokenizer.encode([text])[0]) for text in piece]
        assert sum(sizes) <= 30
        assert not any(one and other for one, other in itertools.pairwise(piece))


def test_pieces_hold_whole_words_and_whole_images(tokenizer: Tokenizer) -> None:
    cutter = DocumentCutter(tokenizer, positions=20, image_positions=10)
    image = ExamplePart(b"", "image", is_encoded=True)
    document = Example((image, ExamplePart("the fox jumps over the lazy dog", is_trained=True), image))
    pieces = cutter.cut(document)
    assert [part.modality for part in pieces[0].parts] == ["image", "text"]
    texts = [str(part.content) for piece in pieces for part in piece.parts if part.modality == "text"]
    assert " ".join(texts) == "the fox jumps over the lazy dog"
    assert sum(part.modality == "image" for piece in pieces for part in piece.parts) == 2
    without_blanks = cutter.cut(Example((ExamplePart("q" * 100, is_trained=True),)))
    assert "".join(str(part.content) for piece in without_blanks for part in piece.parts) == "q" * 100
    assert all(len(tokenizer.encode([str(piece.parts[0].content)])[0]) <= 18 for piece in without_blanks)
    with pytest.raises(BadSample, match="too_long"):
        DocumentCutter(tokenizer, positions=20, image_positions=19).cut(Example((image,)))


def test_a_book_is_not_tokenised_anew_for_each_of_its_pieces(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = 0
    measure = DocumentCutter._size

    def count(cutter: DocumentCutter, text: str) -> int:
        nonlocal letters
        letters += len(text)
        return measure(cutter, text)

    monkeypatch.setattr(DocumentCutter, "_size", count)
    cutter = DocumentCutter(tokenizer, positions=34, image_positions=10)
    spent = []
    for times in (100, 400):
        book = "the fox jumps over the lazy dog " * times
        letters = 0
        pieces = cutter.cut(Example((ExamplePart(book, is_trained=True),)))
        texts = [str(part.content) for piece in pieces for part in piece.parts]
        assert " ".join(texts).split() == book.split()
        spent.append(letters)
    assert spent[1] < 5 * spent[0]


def test_wrong_options_are_refused(
    images: Path, tokenizer_folder: Path, run_tool: RunTool, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(of_obelics(1)) + "\n")
    arguments = ("prepare_interleaved.py", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    code, _, error = run_tool(*arguments, "--tokenizer", tokenizer_folder)
    assert code == 64 and "belong together" in error
    with pytest.raises(ConfigError, match="an image has 196 positions, a row 64"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", row_size=RowSize(tokenizer_folder, 64, 196))
    (tmp_path / "t.csv").write_text("link,path\n1,2\n")
    with pytest.raises(DataError, match=r"t\.csv has no column 'url': it needs `url` and `path`"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", image_table=tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("url,path\n")
    for table, message in (
        ("t.csv", "has no rows"),
        ("t.txt", r"is no table of images: expected one of \.csv"),
    ):
        (tmp_path / "t.txt").write_text("url,path\n1,2\n")
        with pytest.raises(DataError, match=message):
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", image_table=tmp_path / table)
    with pytest.raises(DataError, match=r"a\.txt: expected a file of records that ends in \.jsonl"):
        (tmp_path / "a.txt").write_text("")
        prepare([tmp_path / "a.txt"], tmp_path / "out")


def test_an_edited_file_needs_another_folder(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"texts": [None, "a fox"], "images": ["1.jpg", None]}) + "\n")
    for _ in range(2):
        prepare([path], tmp_path / "out", media_folder=images)
    path.write_text(path.read_text().replace("fox", "cat"))
    with pytest.raises(ConfigError, match=r"contents\[0\] was 'a.jsonl: .*, is 'a.jsonl: "):
        prepare([path], tmp_path / "out", media_folder=images)


def test_mutated_records_are_documents_or_causes(images: Path) -> None:
    chance, files, kept = random.Random(3), MediaFiles(images), 0
    mmc4 = {"text_list": ["a", "b"], "image_info": [{"image_name": "1.jpg", "matched_text_index": 1}]}
    obelics = {"texts": ["a", None, "b"], "images": [None, "1.jpg", None]}
    for number in range(400):
        record = mutate_value([mmc4, obelics][number % 2], chance)
        try:
            document, left_out = document_of(record, files, {}, CONVERTS["image"])
        except BadSample as bad:
            assert bad.cause in ("no_document", "bad_document")
        else:
            kept += bool(document.parts)
            assert all(cause.replace("_", "").isalpha() for cause in left_out)
    assert 100 < kept < 400
