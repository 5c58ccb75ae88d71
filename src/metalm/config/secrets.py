"""What may be shown of a config: the addresses of remote shards can hold passwords and signatures."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from metalm.config.schema import RunConfig


def without_secrets(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, of each `url` only what names a place."""
    content = config.model_dump(mode="json")
    for sources in (content["data"]["sources"], content["data"]["evaluation"]):
        for source in sources.values():
            if source["url"] is not None:
                source["url"] = shown_url(source["url"])
    return content


def shown_url(template: str) -> str:
    """The `url` of a source without the user and the query of an address, or the words of a command."""
    if template.startswith("pipe:"):
        return "pipe:... {shard}"
    parts = urlsplit(template)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
