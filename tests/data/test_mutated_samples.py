"""Samples and lists of every kind, with bytes exchanged, cut and doubled: counted, or one message."""

from __future__ import annotations

import gzip
import io
import json
import random
import warnings
import wave
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import zstandard
from PIL import Image, ImageCms

from metalm.data.captions import read_captions
from metalm.data.preparation.jsonl import Document, JsonLinesFile, parse_document
from metalm.data.preparation.pair_sources import read_list
from metalm.data.storage.shard_scan import scan_stream
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample, MetaLMError
from metalm.modalities import MEDIA
from metalm.modalities.image import decode_image, prepare_image
from mutations import mutate_bytes, mutate_value

pytestmark = pytest.mark.timeout(60)
PIXELS = np.random.default_rng(1).integers(0, 256, (24, 18, 4), dtype=np.uint8)
MUTATIONS = 1500


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    fields = Image.Exif()
    fields[0x0112], fields[0x010F], fields[0x9003] = 6, "maker", "2026:01:01 00:00:00"
    return fields


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IMAGES = [
    saved("JPEG", exif=exif(), icc_profile=bytes(300)),
    saved("JPEG", quality=20, icc_profile=SRGB),
    saved("JPEG", "CMYK"),
    saved("PNG", "RGBA"),
    saved("PNG", "P", transparency=3),
    saved("PNG", "I;16"),
    saved("WEBP", "RGBA"),
]


def test_mutated_images_are_bad_samples_or_pixels() -> None:
    chance, causes = random.Random(1), Counter[str]()
    for number in range(MUTATIONS):
        data = mutate_bytes(IMAGES[number % len(IMAGES)], chance)
        for read in (lambda d: decode_image(d, image_size=16).shape, lambda d: prepare_image(d, 8)[0]):
            try:
                found = read(data)
            except BadSample as bad:
                causes[bad.cause] += 1
            else:
                assert found == (16, 16, 3) or found in ("jpg", "png", "webp")
    assert causes.keys() <= {"undecodable_image", "image_bomb"} and causes.total() > MUTATIONS // 2


def clips() -> list[bytes]:
    samples = np.random.default_rng(2).normal(0, 0.1, (800, 2)).astype(np.float32)
    found = []
    for kind, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 16_000, format=kind, subtype=subtype)
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(range(256)))
    return [*found, buffer.getvalue()]


def test_mutated_clips_are_bad_samples_or_samples() -> None:
    chance, causes, originals = random.Random(2), Counter[str](), clips()
    for number in range(MUTATIONS):
        try:
            clip = MEDIA["audio"].decode(mutate_bytes(originals[number % len(originals)], chance))
        except BadSample as bad:
            causes[bad.cause] += 1
        else:
            assert np.isfinite(clip.samples).all()
    assert causes.total() > MUTATIONS // 3, causes


def test_mutated_captions_are_bad_samples_or_text(tokenizer: Tokenizer) -> None:
    """What comes out, the tokenizer takes."""
    chance, num_bad = random.Random(3), 0
    content = {"caption": "a fox", "captions": ["a dog", "dögs"], "url": "x", "sizes": [1, {"a": 2}]}
    encoded = json.dumps(content, ensure_ascii=False).encode()
    for number in range(4 * MUTATIONS):
        description, text = b"", b""
        if number % 3 == 0:
            description = mutate_bytes(encoded, chance)
        elif number % 3 == 1:
            description = json.dumps(mutate_value(content, chance)).encode()
        else:
            text = mutate_bytes("a fox, größer\n".encode(), chance)
        try:
            captions = read_captions(text, description)
        except BadSample:
            num_bad += 1
        else:
            assert captions and all(isinstance(caption, str) and caption.strip() for caption in captions)
            tokenizer.encode(captions)
    assert num_bad > MUTATIONS // 2


def test_mutated_lines_are_documents_or_causes(tokenizer: Tokenizer) -> None:
    chance, causes = random.Random(4), Counter[str]()
    content = {"text": "a fox\n\nand a dög", "meta": {"pile_set_name": "Pile-CC"}}
    line = json.dumps(content, ensure_ascii=False).encode()
    for number in range(4 * MUTATIONS):
        changed = (
            json.dumps(mutate_value(content, chance)).encode() if number % 2 else mutate_bytes(line, chance)
        )
        found = parse_document(changed)
        if isinstance(found, Document):
            tokenizer.encode([found.text])
        elif found is not None:
            causes[found] += 1
    assert causes.keys() == {"invalid_json", "invalid_unicode", "missing_text", "empty_text"}


TABLES = {
    "coco.json": json.dumps(
        {
            "images": [{"id": 7, "file_name": "one.jpg"}, {"id": 5, "file_name": "two.png"}],
            "annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 5, "caption": "b"}],
        }
    ),
    "table.csv": 'path,caption\none.jpg,"a, ""b"""\ntwo.png,c\n',
    "table.tsv": "path\tcaption\none.jpg\ta\ntwo.png\tc\n",
    "table.jsonl": '{"path": "one.jpg", "caption": "a"}\n{"path": "two.png", "captions": ["b", "c"]}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_mutated_lists_are_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    chance, path, refused = random.Random(5), tmp_path / name, 0
    for number in range(MUTATIONS // 2):
        content = mutate_bytes(TABLES[name].encode(), chance)
        if name == "coco.json" and number % 2:
            content = json.dumps(mutate_value(json.loads(TABLES[name]), chance)).encode()
        path.write_bytes(content)
        try:
            records = read_list(path, tmp_path, "path", "caption")
        except MetaLMError as error:
            refused += 1
            assert name in str(error)
        else:
            assert all(isinstance(text, str) for record in records for text in record.captions or ())
    assert refused > MUTATIONS // 20


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_mutated_files_of_lines_end_or_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    plain = b'{"text": "a fox and a dog"}\n' * 40
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".jsonl": bytes,
        ".jsonl.gz": gzip.compress,
        ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    content, chance, path = compress[suffix](plain), random.Random(6), tmp_path / f"a{suffix}"
    for _ in range(MUTATIONS // 3):
        changed = mutate_bytes(content, chance)
        path.write_bytes(changed)
        try:
            with JsonLinesFile(path) as file:
                lines = b"".join(line or b"" for _, line in file.lines())
        except MetaLMError as error:
            assert path.name in str(error)
        else:
            assert suffix == ".jsonl" or plain.startswith(lines) or changed == content


def test_mutated_archives_are_scanned_to_their_end(tmp_path: Path, write_shard: Callable[..., None]) -> None:
    """What a record states lies in the archive; the rest is counted."""
    samples = [{"jpg": bytes([n]) * 600, "txt": b"fox", "json": b"{}"} for n in range(4)]
    write_shard(tmp_path / "a.tar", samples)
    content, chance, skipped = (tmp_path / "a.tar").read_bytes(), random.Random(7), Counter[str]()
    words = (
        b"0000777\0",
        b"-0000001",
        b"\x80" + b"\xff" * 11,
        b"9" * 30,
        b"x",
        b"L",
        b"2",
        b"5",
        b"\0",
        b"\xff",
    )
    for _ in range(MUTATIONS):
        changed = _with_sums(mutate_bytes(content, chance, words), chance)
        shard, records = scan_stream(io.BytesIO(changed), "a.tar", "image_text")
        skipped.update(shard.skipped)
        assert (records["offset"] + records["size"] <= len(changed)).all()
        assert len(records) == shard.num_samples <= len(samples)
    assert {"truncated_tar", "damaged_tar", "missing_image"} <= skipped.keys()


def _with_sums(content: bytes, chance: random.Random) -> bytes:
    """Half of the time, all headers with the checksums that they should have."""
    if chance.random() < 0.5:
        return content
    changed = bytearray(content)
    for at in range(0, len(changed) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
