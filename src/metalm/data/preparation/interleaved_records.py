"""Documents of texts and images between them, in the layouts that such corpora come in.

    texts, images           lists of one length, of which one holds something at each place: OBELICS
    text_list, image_info   sentences, and images that stand in front of one of them: MMC4

An image is a name, a link that the table of images has, or its bytes. One that is missing or damaged is left
out alone, and a blank line stands between the texts around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.preparation.chat_records import medium_of
from metalm.data.preparation.media_files import MediaFiles
from metalm.data.tokenizer import BLANK_LINE
from metalm.errors import BadSample
from metalm.modalities import Convert

IMAGE = "image"


def document_of(
    record: Any, files: MediaFiles, paths: Mapping[str, str], convert: Convert
) -> tuple[Example, list[str]]:
    """The document of a record: images are read by their encoder, texts are trained on.

    Args:
        files: that images are looked for in.
        paths: what links of images are called there.
        convert: what checks an image and makes its member.

    Returns:
        The document, and why images of it were left out, one by one.

    Raises:
        BadSample: `no_document`, for the record has neither layout; or `bad_document`, for it is not as its
            layout says.
    """
    if not isinstance(record, dict):
        raise BadSample("no_document")
    if isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
        found = _obelics(record["texts"], record["images"])
    elif isinstance(record.get("text_list"), list) and isinstance(record.get("image_info"), list):
        found = _mmc4(record["text_list"], record["image_info"])
    else:
        raise BadSample("no_document")
    parts: list[ExamplePart] = []
    left_out: list[str] = []
    for one in found:
        if isinstance(one, str):
            parts.append(ExamplePart(one, is_trained=True))
            continue
        try:
            named = one.named
            if isinstance(named, str):
                named = paths.get(named, named)
            suffix, content = convert(bytes(medium_of(named, IMAGE, files).content))
            parts.append(ExamplePart(content, IMAGE, is_encoded=True, suffix=suffix))
        except BadSample as bad:
            left_out.append(bad.cause)
    return Example(tuple(joined(parts))), left_out


class _Image:
    """An image of a record, as it is named there."""

    def __init__(self, named: Any) -> None:
        self.named = named


def _obelics(texts: Sequence[Any], images: Sequence[Any]) -> list[str | _Image]:
    if len(texts) != len(images):
        raise BadSample("bad_document")
    found: list[str | _Image] = []
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            found.append(_Image(image))
        if text is not None:
            found += _text(text)
    return found


def _mmc4(sentences: Sequence[Any], described: Sequence[Any]) -> list[str | _Image]:
    in_front: dict[int, list[_Image]] = {}
    for one in described:
        place = one.get("matched_text_index") if isinstance(one, dict) else None
        if not isinstance(place, int) or not 0 <= place < len(sentences):
            raise BadSample("bad_document")
        named = one.get("image_name") or one.get("raw_url")
        in_front.setdefault(place, []).append(_Image(named))
    found: list[str | _Image] = []
    for number, sentence in enumerate(sentences):
        found += in_front.get(number, [])
        text = _text(sentence)
        # Sentences of one paragraph: what stands between them is not known.
        if text and found and isinstance(found[-1], str):
            found[-1] += f" {text[0]}"
        else:
            found += text
    return found


def _text(text: Any) -> list[str]:
    if not isinstance(text, str):
        raise BadSample("bad_document")
    return [text.strip()] if text.strip() else []


def joined(parts: Sequence[ExamplePart]) -> list[ExamplePart]:
    """The parts with neighbouring texts as one, a blank line between them."""
    found: list[ExamplePart] = []
    for part in parts:
        if part.modality == TEXT and found and found[-1].modality == TEXT:
            found[-1] = ExamplePart(
                BLANK_LINE.join((str(found[-1].content), str(part.content))), is_trained=True
            )
        else:
            found.append(part)
    return found
