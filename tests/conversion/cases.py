"""Models and prompts of the conversion tests; a prompt is given both as training and as a user has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metalm.config import RunConfig
from metalm.data.row import Row, RowSpans
from metalm.data.tokenizer import Tokenizer
from metalm.modalities import MEDIA
from metalm.modalities.image import encode_png
from reference.rows import loss_weights

VOCABULARY = 330
"""Not a multiple of 128, so the embedding has padding rows; more ids than the tokenizer has."""
NEW_TOKENS = 64
DECODERS: dict[str, dict[str, Any]] = {
    "deepnorm": {},
    "pre_ln": {
        "normalization": "pre_ln",
        "positions": "learned",
        "max_positions": 150,
        "activation": "gelu_tanh",
        "scale_embedding": False,
    },
    "llama": {
        "normalization": "pre_ln",
        "norm": "rms_norm",
        "norm_eps": 1e-6,
        "positions": "rope",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "biases": False,
        "qkv_biases": True,
        "tied_output": False,
        "scale_embedding": False,
    },
    "mixed": {
        "norm": "rms_norm",
        "positions": "rope",
        "rope_base": 500.0,
        "rope_scaling": {"factor": 4.0, "high_frequency_factor": 3.0, "original_positions": 24},
        "activation": "swiglu",
        "num_kv_heads": 2,
        "spans": "bidirectional",
    },
}
KINDS = tuple(DECODERS)
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "llama",
        {"decoder": {"rank": 3, "alpha": 12}, "vision": {"rank": 2, "targets": ["feed_forward_in"]}},
    ),
    "ia3": ("deepnorm", {"decoder": {"kind": "ia3"}, "text": {"kind": "ia3"}}),
}
"""Further kinds: one of the decoders, and adapters by component."""

_TODAY = {"norm": "rms_norm", "norm_eps": 1e-6, "activation": "swiglu", "num_kv_heads": 1, "biases": False}
TEXT_OPTIONS: dict[str, dict[str, Any]] = {
    "deepnorm": {"relative_bias": {"num_buckets": 8, "max_distance": 6}},
    "llama": {**_TODAY, "positions": "rope"},
}
VISION_OPTIONS: dict[str, dict[str, Any]] = {
    "deepnorm": {"joint_layers": 1},
    "llama": _TODAY,
    "mixed": {"activation": "gelu_tanh", "joint_layers": 2},
}

_SMALL = {"num_layers": 2, "hidden_size": 24, "num_heads": 2, "max_text_positions": 12}
_VISION = {
    **_SMALL,
    "hidden_size": 32,
    "image": {"image_size": 16, "patch_size": 8},
    "connector": "feed_forward",
}


def run_config(kind: str, tokenizer: Path) -> RunConfig:
    """A run with one of the decoders, whose encoders are normalised in both ways and have all options."""
    kind, adapters = ADAPTED.get(kind, (kind, {}))
    normalizations = ["deepnorm", "pre_ln"]
    if "normalization" in DECODERS[kind]:
        normalizations.reverse()
    own, other = normalizations
    return RunConfig.model_validate(
        {
            "run": {"name": "small", "seed": 11},
            "model": {
                "vocab_size": VOCABULARY,
                "decoder": {
                    "num_layers": 3,
                    "hidden_size": 32,
                    "num_heads": 4,
                    "start": "plain",  # untrained answers then follow what was said last
                    **DECODERS[kind],
                    "adapter": adapters.get("decoder"),
                },
                "encoders": {
                    "vision": {
                        **_VISION,
                        "normalization": other,
                        **VISION_OPTIONS.get(kind, {}),
                        "adapter": adapters.get("vision"),
                    },
                    "text": {
                        **_SMALL,
                        "normalization": own,
                        **TEXT_OPTIONS.get(kind, {}),
                        "adapter": adapters.get("text"),
                    },
                },
            },
            "data": {
                "tokenizer": str(tokenizer),
                "sequence_length": 128,
                "sources": {
                    "books": {"path": "unused", "readers": {"text": "text"}},
                    "scenes": {"path": "unused", "readers": {"image": "vision", "text": "vision"}},
                },
            },
            "training": {"steps": 5000, "global_batch_size": 64, "micro_batch_size": 1},
        }
    )


@dataclass(frozen=True)
class Part:
    """Some text of a prompt: read by the decoder, or by an encoder, then perhaps behind an image."""

    text: str
    encoder: str | None = None
    image: int | None = None


PROMPTS: dict[str, tuple[Part, ...]] = {
    "text": (Part("the quick brown fox\n\njumps over"),),
    "span": (Part("the quick"), Part(" brown fox", "text"), Part(" jumps")),
    "two adjacent spans": (Part("the", "text"), Part(" lazy dog", "text")),
    "image": (Part("", "vision", 0),),
    "image and prefix": (Part("the fox", "vision", 1), Part(" jumps over the dog")),
    "images and spans": (
        Part("brown"),
        Part("", "vision", 2),
        Part(" fox over"),
        Part("the lazy", "vision", 0),
        Part(" the dog", "text"),
        Part(" jumps"),
    ),
    "text in the image encoder": (Part("over", "vision"), Part(" the fox")),
}


def pictures() -> list[np.ndarray]:
    """Three random pictures of different sizes, [height, width, 3] uint8."""
    draw = np.random.default_rng(5)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((16, 16), (40, 25), (17, 60))]


def prompt_text(parts: tuple[Part, ...]) -> str:
    """The prompt as the processor takes it."""
    written = []
    for part in parts:
        if part.encoder is None:
            written.append(part.text)
        else:
            marker = "" if part.image is None else "<image>"
            written.append(f"<span:{part.encoder}>{marker}{part.text}</span>")
    return "".join(written)


def prompt_images(parts: tuple[Part, ...]) -> list[np.ndarray]:
    """The prompt's images, in order."""
    return [pictures()[part.image] for part in parts if part.image is not None]


def prompt_row(parts: tuple[Part, ...], tokenizer: Tokenizer, config: RunConfig) -> Row:
    """The prompt as a row of the training data."""
    tokens = [tokenizer.start_id]
    found: dict[str, list[tuple[int, int, np.ndarray | None]]] = {}
    for part in parts:
        start, patches = len(tokens), None
        if part.image is not None:
            reader = MEDIA["image"].reader(config.model.encoders[part.encoder])
            patches = reader.read(encode_png(pictures()[part.image]))
            tokens += [tokenizer.paragraph_id] * len(patches)
        tokens += tokenizer.encode([part.text])[0].tolist()
        if part.encoder is not None:
            found.setdefault(part.encoder, []).append((start, len(tokens), patches))
    spans = {}
    for encoder, members in found.items():
        images = [patches for *_, patches in members if patches is not None]
        spans[encoder] = RowSpans(
            bounds=np.array([[start, end] for start, end, _ in members]),
            num_patches=np.array([0 if patches is None else len(patches) for *_, patches in members]),
            media=np.concatenate(images) if images else None,
        )
    bounds = [(start, end) for members in found.values() for start, end, _ in members]
    weights = loss_weights(len(tokens), [len(tokens)], bounds)
    return Row(np.array(tokens, np.int32), weights, [len(tokens)], spans=spans)
