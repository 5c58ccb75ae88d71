"""Encoders of the multi-rank tests: the paper's and today's kinds, in small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distributed.tiny import global_batch, tiny_config
from metalm.config import RunConfig
from reference.rows import Document, PlainRow

_TEXT = {"num_layers": 3, "hidden_size": 24, "num_heads": 2, "max_text_positions": 16}
_IMAGE = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_heads": 2,
    "normalization": "pre_ln",
    "max_text_positions": 8,
    "image": {"image_size": 8, "patch_size": 4},
    "connector": "feed_forward",
}
_BIAS = {"relative_bias": {"num_buckets": 8, "max_distance": 4}}

_TODAY = {
    "normalization": "pre_ln",
    "norm": "rms_norm",
    "norm_eps": 1e-4,
    "activation": "swiglu",
    "ffn_hidden_size": 40,
    "num_kv_heads": 1,
    "biases": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {
        "text": {**_TEXT, **_BIAS, "trained_layers": 2},
        "image": {**_IMAGE, "joint_layers": 1},
    },
    "connectors": {
        "text": {**_TEXT, **_BIAS, "trained_layers": "none"},
        "image": {**_IMAGE, "joint_layers": 2, "trained_layers": 1},
    },
    "all_trained": {
        "text": {**_TEXT, **_BIAS},
        "image": {**_IMAGE, "joint_layers": 2},
    },
    "today": {
        "text": {**_TEXT, **_TODAY, "positions": "rope", "rope_base": 500.0},
        "image": {**_IMAGE, **_TODAY, "joint_layers": 1},
    },
    "mixed": {
        "text": {**_TEXT, **_BIAS, **_TODAY, "normalization": "deepnorm", "trained_layers": 1},
        "image": {**_IMAGE, "activation": "gelu_tanh"},
    },
    "dropout": {
        "text": {**_TEXT, **_BIAS, "dropout": 0.1, "trained_layers": 2},
        "image": {**_IMAGE, "joint_layers": 1, "dropout": 0.2},
    },
    "dropout_recomputed": {
        "text": {**_TEXT, **_BIAS, "dropout": 0.1, "trained_layers": 2, "recompute": True},
        "image": {**_IMAGE, "joint_layers": 1, "dropout": 0.2, "recompute": True},
    },
}
"""`connectors` and `all_trained` have the same parameters; `paper` freezes some of its own."""


def variant_config(variant: str, folder: str, **options: Any) -> RunConfig:
    """The tiny run with the encoders of a variant."""
    content = tiny_config(folder, **options).model_dump()
    content["model"]["encoders"] = VARIANTS[variant]
    content["model"]["decoder"]["dropout"] = 0.1 if variant.startswith("dropout") else 0.0
    content["model"]["decoder"]["recompute"] = variant.endswith("recomputed")
    return RunConfig.model_validate(content)


def variant_batch(step: int) -> list[PlainRow]:
    """The tiny run's rows, but the last row's text goes through the encoder of images."""
    *rows, last = global_batch(step)
    documents = [
        Document(d.tokens, [replace(span, encoder="image") for span in d.spans]) for d in last.documents
    ]
    rows.append(replace(last, documents=documents))
    return [replace(row, dropout_seed=1000 * step + number) for number, row in enumerate(rows)]
