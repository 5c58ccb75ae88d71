"""Text: token ids, in the tokenizer that decoder and shards share, or an encoder's own."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from metalm.config.model_schema import TEXT
from metalm.modalities.modality import Modality

TOKEN_DTYPES: dict[str, np.dtype] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
"""Formats of members that hold token ids; `txt` is raw text."""


class Text(Modality):
    """Text in shards of its own, or beside an image or a clip."""

    name = TEXT
    kind = "text"
    formats: ClassVar = {name: name for name in (*TOKEN_DTYPES, "txt")}
