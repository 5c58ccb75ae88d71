"""`index.json` as it is read: it may come from anywhere, so nothing in it is believed."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from metalm.checkpoint.state import first_mistake
from metalm.data.storage.shard_scan import KINDS, Shard
from metalm.errors import DataError
from metalm.regular_files import read_regular

INDEX_VERSION = 2

MAX_COUNT = 2**62

Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of shards; known: {', '.join(KINDS)}")
    return kind


def _inside(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
    for shard in shards:
        name = shard.name
        if PurePosixPath(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise ValueError(f"{name!r} is no file beside the index")
        if any(
            not 0 <= count < MAX_COUNT for count in (shard.size, shard.num_samples, *shard.skipped.values())
        ):
            raise ValueError(f"{name}: a count below 0 or beyond reason")
    return shards


class IndexDocument(BaseModel):
    """What `build_index` wrote."""

    version: Literal[2]
    kind: Annotated[str, AfterValidator(_known_kind)]
    records: Annotated[str, Field(pattern=r"^index-[0-9a-f]{16}\.records$")]
    num_samples: Annotated[Count, Field(gt=0)]
    tokenizer_fingerprint: str | None
    token_dtype: Literal["uint16", "uint32"] | None
    num_tokens: Count
    shards: Annotated[tuple[Shard, ...], AfterValidator(_inside)]

    @property
    def fingerprint(self) -> str:
        """Of the records, by which their file is named."""
        return self.records.removeprefix("index-").removesuffix(".records")


def read_document(path: Path) -> IndexDocument:
    """The content of an index.json.

    Raises:
        DataError: it is unreadable, of another version, malformed, or its counts contradict each other.
    """
    try:
        content: Any = json.loads(read_regular(path))
        version = content["version"]
        if version != INDEX_VERSION:
            raise DataError(
                f"{path} has version {str(version)[:40]}, this program reads version {INDEX_VERSION}: index "
                "again"
            )
        document = IndexDocument.model_validate(content, strict=False)
    except ValidationError as error:
        raise _unusable(path, first_mistake(error)) from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise _unusable(path, f"{type(error).__name__}: {error}"[:200]) from None
    total = sum(shard.num_samples for shard in document.shards)
    if total != document.num_samples:
        raise _unusable(path, f"{document.num_samples} samples, {total} in its shards")
    if (document.token_dtype is None) != (document.tokenizer_fingerprint is None):
        raise _unusable(path, "token_dtype and tokenizer_fingerprint go together")
    return document


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(f"{path} cannot be used ({reason}): index the folder again")
