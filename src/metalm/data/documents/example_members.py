"""An example as a sample of a shard: `KEY.json` with its parts in order, and the files that these name.

    {"parts": [{"image": "0.jpg"}, {"text": "What?", "encoded": true}, {"text": "A fox.", "trained": true}]}

The image is the member `KEY.0.jpg`. A part is a text, or the name of a member under its modality; what is
encoded and trained is false where it is not said. `{"text": "\\n\\n", "end": true}` stands behind an answer
that is not the last. Other keys are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.storage.tar import BytesStream, Member, scan_members
from metalm.data.tokenizer import BLANK_LINE
from metalm.errors import BadSample
from metalm.modalities import MEDIA, Convert

DESCRIPTION = "json"
_ENCODED, _TRAINED, _END = "encoded", "trained", "end"


def members_of(example: Example, converts: Mapping[str, Convert]) -> dict[str, bytes]:
    """The members of a sample by suffix, the `json` first.

    Args:
        converts: what checks images and clips that have no suffix yet and makes their members, by modality.

    Raises:
        BadSample: an image or a clip cannot be used, or a text is no Unicode.
    """
    parts: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for part in example.parts:
        if isinstance(part.content, str):
            flags = {_ENCODED: part.is_encoded, _TRAINED: part.is_trained, _END: part.is_end}
            parts.append({TEXT: part.content, **{name: True for name, is_set in flags.items() if is_set}})
            continue
        suffix, content = part.suffix, bytes(part.content)
        if suffix is None:
            suffix, content = converts[part.modality](content)
        name = f"{len(files)}.{suffix}"
        files[name] = content
        parts.append({part.modality: name})
    try:
        description = json.dumps({"parts": parts}, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        raise BadSample("not_unicode") from None
    return {DESCRIPTION: description, **files}


def read_example(sample: memoryview) -> Example:
    """The example of a sample as it lies in its shard.

    Raises:
        BadSample: `bad_json`; `bad_parts`, which are not as this module says; `missing_member`, that a part
            names; or `no_answer`, for nothing is trained.
    """
    members: dict[str, memoryview] = {}
    for member in scan_members(BytesStream(sample)):
        if isinstance(member, Member):
            suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
            members.setdefault(suffix, sample[member.offset : member.offset + member.size])
    try:
        description = json.loads(bytes(members[DESCRIPTION]))
    except (ValueError, RecursionError, KeyError):
        raise BadSample("bad_json") from None
    listed = description.get("parts") if isinstance(description, dict) else None
    if not isinstance(listed, list):
        raise BadSample("bad_parts")
    example = Example(tuple(_part(one, members) for one in listed))
    if not any(part.is_trained and part.content for part in example.parts):
        raise BadSample("no_answer")
    return example


def _part(described: Any, members: Mapping[str, memoryview]) -> ExamplePart:
    if not isinstance(described, dict):
        raise BadSample("bad_parts")
    found = [name for name in (TEXT, *MEDIA) if name in described]
    if len(found) != 1 or not isinstance(described[found[0]], str):
        raise BadSample("bad_parts")
    (modality,), content = found, described[found[0]]
    if modality != TEXT:
        if content.lower() not in members:
            raise BadSample("missing_member")
        return ExamplePart(members[content.lower()], modality, is_encoded=True)
    flags = [described.get(name, False) for name in (_ENCODED, _TRAINED, _END)]
    if not all(isinstance(flag, bool) for flag in flags) or sum(flags) > 1:
        raise BadSample("bad_parts")
    if flags[2] and content != BLANK_LINE:
        raise BadSample("bad_parts")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise BadSample("not_unicode") from None
    return ExamplePart(content, is_encoded=flags[0], is_trained=flags[1], is_end=flags[2])
