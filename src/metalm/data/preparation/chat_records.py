"""Records of chats in the forms that data sets come in, to turns.

    messages         [{"role": ..., "content": text, or parts of "type" text, image, image_url, audio, ...}]
    conversations    [{"from": ..., "value": text}], as ShareGPT and LLaVA have it
    instruction      with "input" and "output", as alpaca has it, and "history": [[question, answer], ...]

Images and clips that a record lists beside its turns (`image`, `images`, `audio`, `audios`) stand where its
texts say `<image>` or `<audio>`, or a part of that type names none; if nothing does, in front of what is
asked first. A user's text that begins with a placeholder, or has it as its last line, needs an image or a
clip; elsewhere a text may merely mention `<image>`. `system` is a turn of its own. An answer whose message
has `"weight": 0`, as OpenAI has it, is not trained on.

A box in the image is a part `{"type": "box", "box": [left, top, right, bottom]}`, shares from 0 to 1; or
texts say `<box>`, and a record lists `boxes` beside its turns. It becomes text: see `modalities.boxes`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from metalm.data.documents.chats import ANSWERING_ROLES, ASKING_ROLES, Content, Medium, Turn
from metalm.data.preparation.media_files import MediaFiles
from metalm.data.tokenizer import BLANK_LINE
from metalm.errors import BadSample
from metalm.modalities import MEDIA
from metalm.modalities.boxes import OPEN, box_text

_MODALITY_OF_TYPE = {kind: name for name in MEDIA for kind in (name, f"{name}_url", f"input_{name}")}
BOX = "box"
"""The type of a part."""
_FILE_KEYS = ("url", "path", "data", "bytes")
_USER_ROLES = ("user", "human")
_VIDEO_KEYS = ("video", "videos")
"""Beside the turns of a record that is about what no encoder reads."""


def turns_of(record: Any, files: MediaFiles) -> list[Turn]:
    """The turns of a record.

    Raises:
        BadSample: `no_turns`, for it has none of the forms; `bad_turns`, for a turn is not as its form says;
            `unknown_role`; `bad_weight`, neither 0 nor 1; `video`, it is about one; `empty_question`, a user
            says nothing and is answered; `bad_placeholders`, more or fewer than images, clips or boxes;
            `bad_box`; as `MediaFiles.read`.
    """
    if not isinstance(record, dict):
        raise BadSample("no_turns")
    if any(record.get(key) for key in _VIDEO_KEYS):
        raise BadSample("video")
    beside = {name: found for name in MEDIA if (found := _beside(record, name))}
    read = functools.partial(_turn, files=files, beside=beside)
    system = record.get("system")
    turns = [Turn("system", (system,))] if isinstance(system, str) and system.strip() else []
    if isinstance(listed := record.get("messages"), list):
        turns += [read(message, "role", "content") for message in listed]
    elif isinstance(listed := record.get("conversations"), list):
        turns += [read(message, "from", "value") for message in listed]
    elif isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        turns += _instruction(record)
    else:
        raise BadSample("no_turns")
    if (boxes := record.get("boxes")) is not None:
        turns = _with_boxes(turns, boxes)
    for name, listed in beside.items():
        turns = _placed(turns, [medium_of(one, name, files) for one in listed], _placeholder(name))
    if any(_asks_for(turns, name) for name in MEDIA.keys() - beside.keys()):
        raise BadSample("bad_placeholders")
    if _has_empty_question(turns):
        raise BadSample("empty_question")
    return turns


def _placeholder(modality: str) -> str:
    return f"<{modality}>"


def _turn(
    message: Any, role_key: str, content_key: str, *, files: MediaFiles, beside: Collection[str]
) -> Turn:
    if not isinstance(message, dict):
        raise BadSample("bad_turns")
    # Data sets of either form have messages with the keys of the other.
    role = _first(message, role_key, "role", "from")
    content = _first(message, content_key, "content", "value")
    if not isinstance(role, str) or role.lower() not in (*ASKING_ROLES, *ANSWERING_ROLES):
        raise BadSample("unknown_role")
    role = role.lower()
    is_trained = role not in ANSWERING_ROLES or _weight(message) != 0
    if isinstance(content, str):
        return Turn(role, (content,), is_trained)
    if not isinstance(content, list):
        raise BadSample("bad_turns")
    return Turn(role, tuple(_content(part, files, beside) for part in content), is_trained)


def _weight(message: Mapping[str, Any]) -> int:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadSample("bad_weight")
    return 1 if weight is None else int(weight)


def _content(part: Any, files: MediaFiles, beside: Collection[str]) -> Content:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == BOX:
        return _box(part.get(BOX))
    if kind not in _MODALITY_OF_TYPE:
        raise BadSample("bad_turns")
    modality = _MODALITY_OF_TYPE[kind]
    named = [part[key] for key in (kind, modality, *_FILE_KEYS) if part.get(key) is not None]
    if not named and modality in beside:
        return _placeholder(modality)
    if not named:
        raise BadSample("bad_turns")
    return medium_of(named[0], modality, files)


def medium_of(named: Any, modality: str, files: MediaFiles) -> Medium:
    """An image or a clip by its name, by a mapping that has its name or its bytes, or by the bytes.

    Raises:
        BadSample: `bad_turns`, it is none of these; or as `MediaFiles.read`.
    """
    if isinstance(named, Mapping):
        found = {key: named[key] for key in _FILE_KEYS if named.get(key) is not None}
        if isinstance(found.get("bytes"), bytes):
            return Medium(modality, found["bytes"])
        if isinstance(found.get("data"), str):  # base64, as chat services take clips
            try:
                return Medium(modality, base64.b64decode(found["data"], validate=True))
            except (binascii.Error, ValueError):
                raise BadSample(f"bad_data_uri_{modality}") from None
        named = found.get("url", found.get("path"))
    if isinstance(named, bytes):
        return Medium(modality, named)
    if not isinstance(named, str):
        raise BadSample("bad_turns")
    return Medium(modality, files.read(named, modality))


def _instruction(record: Mapping[str, Any]) -> list[Turn]:
    asked, given = record["instruction"], record.get("input")
    if isinstance(given, str) and given.strip():
        asked = asked.rstrip() + BLANK_LINE + given.lstrip()
    turns = []
    for question, answer in [*_history(record.get("history")), (asked, record["output"])]:
        turns += [Turn("user", (question,)), Turn("assistant", (answer,))]
    return turns


def _history(listed: Any) -> list[tuple[str, str]]:
    """Earlier questions with their answers."""
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise BadSample("bad_turns")
    pairs = []
    for pair in listed:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadSample("bad_turns")
        pairs.append((pair[0], pair[1]))
    return pairs


def _beside(record: Mapping[str, Any], modality: str) -> list[Any]:
    for key in (f"{modality}s", modality):
        found = record.get(key)
        listed = list(found) if isinstance(found, (list, tuple)) else [] if found is None else [found]
        if listed:
            return listed
    return []


def _first(message: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that has one: tables fill those of other rows with null."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _box(corners: Any) -> str:
    try:
        return box_text(corners)
    except (ValueError, TypeError):
        raise BadSample("bad_box") from None


def _with_boxes(turns: Sequence[Turn], boxes: Any) -> list[Turn]:
    """The turns with boxes where their placeholders are."""
    waiting = [_box(one) for one in boxes] if isinstance(boxes, (list, tuple)) else []
    texts = [content for turn in turns for content in turn.contents if isinstance(content, str)]
    if sum(text.count(OPEN) for text in texts) != len(waiting):
        raise BadSample("bad_placeholders")
    following = iter(waiting)
    return [
        replace(
            turn,
            contents=tuple(
                re.sub(OPEN, lambda _: next(following), content) if isinstance(content, str) else content
                for content in turn.contents
            ),
        )
        for turn in turns
    ]


def _asks_for(turns: Sequence[Turn], modality: str) -> bool:
    """Whether a user's text has the placeholder where data sets have it, of a chat without any of these."""
    contents = [content for turn in turns for content in turn.contents]
    if any(isinstance(content, Medium) and content.modality == modality for content in contents):
        return False
    texts = [
        content.strip()
        for turn in turns
        if turn.role in _USER_ROLES
        for content in turn.contents
        if isinstance(content, str)
    ]
    placeholder = _placeholder(modality)
    return any(text.startswith(placeholder) or text.endswith(f"\n{placeholder}") for text in texts)


def _has_empty_question(turns: Sequence[Turn]) -> bool:
    """Whether an answer follows a user who says nothing, with nothing from others beside; tools may."""
    sides = [list(side) for _, side in itertools.groupby(turns, lambda turn: turn.role in ANSWERING_ROLES)]
    return any(
        any(turn.role in _USER_ROLES for turn in side)
        and not any(
            isinstance(content, Medium) or content.strip() for turn in side for content in turn.contents
        )
        for side in sides[:-1]
    )


def _placed(turns: Sequence[Turn], media: list[Medium], placeholder: str) -> list[Turn]:
    """The turns with images or clips where their placeholders are, or in front of the first that asks."""
    texts = [content for turn in turns for content in turn.contents if isinstance(content, str)]
    count = sum(text.count(placeholder) for text in texts)
    if not count:
        first = next((n for n, turn in enumerate(turns) if turn.role in _USER_ROLES), None)
        if first is None:
            raise BadSample("bad_placeholders")
        moved = replace(turns[first], contents=(*media, *turns[first].contents))
        return [*turns[:first], moved, *turns[first + 1 :]]
    if count != len(media):
        raise BadSample("bad_placeholders")
    waiting = iter(media)
    placed = []
    for turn in turns:
        contents: list[Content] = []
        for content in turn.contents:
            if isinstance(content, Medium):
                contents.append(content)
                continue
            for piece in re.split(f"({re.escape(placeholder)})", content):
                contents.append(next(waiting) if piece == placeholder else piece)
        placed.append(replace(turn, contents=tuple(one for one in contents if one != "")))
    return placed
