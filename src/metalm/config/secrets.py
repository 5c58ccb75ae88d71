"""A config as it may be shown: the addresses of remote shards can hold passwords and signatures."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from metalm.config.schema import RunConfig


def without_secrets(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, of each `url` only what names a place.

    The user and the query of an address are left out, and all of a `pipe:` command, which is any program's.
    """
    content = config.model_dump(mode="json")
    for sources in (content["data"]["sources"], content["data"]["evaluation"]):
        for source in sources.values():
            if source["url"] is not None:
                source["url"] = _place(source["url"])
    return content


def _place(url: str) -> str:
    if url.startswith("pipe:"):
        return "pipe:..."
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
