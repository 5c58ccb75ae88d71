"""What documents are made of: text, images, audio. All that is special to one of them stands in its file."""

from __future__ import annotations

from metalm.config.model_schema import EncoderConfig
from metalm.modalities.audio import Audio
from metalm.modalities.image import Image
from metalm.modalities.modality import Convert, Media, MediaReader, Modality
from metalm.modalities.text import Text

__all__ = [
    "MEDIA",
    "MODALITIES",
    "Convert",
    "Media",
    "MediaReader",
    "Modality",
    "modality_of_encoder",
    "modality_of_kind",
]

MODALITIES: dict[str, Modality] = {one.name: one for one in (Text(), Image(), Audio())}
MEDIA: dict[str, Media] = {name: one for name, one in MODALITIES.items() if isinstance(one, Media)}
"""Those that stand in pairs with text."""
_BY_KIND = {modality.kind: modality for modality in MODALITIES.values()}


def modality_of_kind(kind: str) -> Modality:
    """The modality of the main members of shards of a kind, such as `image_text`.

    Raises:
        KeyError: there is no such kind.
    """
    return _BY_KIND[kind]


def modality_of_encoder(encoder: EncoderConfig) -> Modality:
    """What the spans of an encoder begin with: its images or clips, or nothing but text."""
    return next((one for one in MEDIA.values() if encoder.section(one.name) is not None), MODALITIES["text"])
