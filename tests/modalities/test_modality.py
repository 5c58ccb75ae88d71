"""What a modality consists of, and what it may leave out."""

from __future__ import annotations

from typing import get_args

from metalm.config.model_schema import MEDIA_SECTIONS, EncoderConfig
from metalm.modalities import MEDIA, Media


def test_modalities_and_sections_of_encoders_are_the_same_and_have_what_the_config_asks() -> None:
    assert tuple(MEDIA) == MEDIA_SECTIONS
    for name in MEDIA_SECTIONS:
        section, _ = get_args(EncoderConfig.model_fields[name].annotation)
        assert isinstance(section.needs_pretrained, bool)
        assert "num_patches" in section.model_fields or hasattr(section, "num_patches")


def test_a_modality_that_is_not_exported_and_has_no_encoders_of_transformers_leaves_out_what_is_theirs() -> (
    None
):
    of_some = {"encode", "try_out", "vectors_of_zeros", "exported_media", "proof_file"}
    assert not Media.__abstractmethods__ & of_some
