"""What is said about an image or a clip, from the forms in which data sets hold it: one reading of each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from metalm.errors import BadSample


def read_captions(text: bytes | memoryview, description: bytes | memoryview) -> list[str]:
    """The captions of a .txt and a .json: all of "captions" in the .json, else the text, else its "caption".

    Args:
        text: empty where there is no .txt.
        description: empty where there is no .json.

    Raises:
        BadSample: `not_utf8`, `bad_json` or `missing_caption`.
    """
    fields = _parse(description) if description else {}
    found = usable_captions(listed(fields.get("captions")))
    if not found and text:
        found = usable_captions([decode_utf8(text)])
    if not found:
        found = usable_captions(listed(fields.get("caption")))
    if not found:
        raise BadSample("missing_caption")
    return found


def listed(captions: Any) -> list[Any]:
    """Several captions or one, as a list; what is neither has none."""
    if isinstance(captions, list):
        return captions
    return [captions] if isinstance(captions, str) else []


def usable_captions(captions: Iterable[Any]) -> list[str]:
    """Those that are text with something in it, without blanks around them.

    JSON can hold half a surrogate pair, which is no text that a tokenizer takes.
    """
    found = []
    for caption in captions:
        if isinstance(caption, str) and (stripped := caption.strip()):
            try:
                stripped.encode()
            except UnicodeEncodeError:
                continue
            found.append(stripped)
    return found


def decode_utf8(data: bytes | memoryview) -> str:
    """The text of a member, without a byte order mark.

    Raises:
        BadSample: `not_utf8`.
    """
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample("not_utf8") from None


def _parse(description: bytes | memoryview) -> dict[str, Any]:
    try:
        fields = json.loads(decode_utf8(description))
    except (ValueError, RecursionError):
        raise BadSample("bad_json") from None
    if not isinstance(fields, dict):
        raise BadSample("bad_json")
    return fields
