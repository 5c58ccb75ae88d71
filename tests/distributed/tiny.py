"""The tiny model and batches of the multi-rank tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from metalm.data.collate import collate
from metalm.data.row import Row, RowSpans
from reference.rows import PAD, PlainRow, lonely_rows, loss_weights, random_rows

GLOBAL_ROWS, LENGTH, VOCAB = 8, 40, 90
STEPS = 5
RATES = [1e-3, 2e-3, 3e-3, 2e-3, 1e-3]


LLAMA = {
    "normalization": "pre_ln",
    "norm": "rms_norm",
    "norm_eps": 1e-6,
    "positions": "rope",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "biases": False,
    "tied_output": False,
    "scale_embedding": False,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "llama": LLAMA,
    "gpt2": {
        "normalization": "pre_ln",
        "positions": "learned",
        "max_positions": LENGTH + 3,
        "activation": "gelu_tanh",
        "scale_embedding": False,
    },
    "mixed": {
        "norm": "rms_norm",
        "positions": "rope",
        "rope_base": 100.0,
        "rope_scaling": {"factor": 4.0, "high_frequency_factor": 3.0, "original_positions": 24},
        "activation": "swiglu",
        "num_kv_heads": 2,
        "spans": "bidirectional",
        "scale_docked_vectors": True,
        "recompute": True,
    },
    "selective": {**LLAMA, "recompute": "selective"},
    "parallel": {
        **LLAMA,
        "parallel_residual": True,
        "head_dim": 12,
        "rope_share": 0.5,
        "activation": "geglu_tanh",
        "tied_output": True,
        "scale_embedding": "rounded",
    },
    "qkv_biases": {**LLAMA, "qkv_biases": True, "tied_output": True, "num_kv_heads": 1},
}
"""Decoders: the paper's, today's usual ones, and every further option."""


def tiny_config(
    folder: str,
    *,
    tensor: int = 1,
    context: int = 1,
    sequence_parallel: bool = False,
    micro_batch_size: int = 1,
    options: str = "paper",
    dropout: float = 0.0,
    precision: str = "fp32",
    fp32_gradients: bool = False,
    **deepspeed: str,
) -> RunConfig:
    """Two decoder layers, a DeepNorm text encoder, a pre-LN image encoder; vocabulary with padding rows.

    Where the decoder recomputes whole layers, the encoders do so, too; all have the same dropout.
    """
    recompute = OPTIONS[options].get("recompute") is True
    return RunConfig.model_validate(
        {
            "run": {"name": "tiny", "folder": folder, "seed": 5},
            "parallel": {
                "tensor": tensor,
                "context": context,
                "sequence_parallel": sequence_parallel,
                "timeout_minutes": 3,
            },
            "deepspeed": deepspeed,
            "model": {
                "vocab_size": VOCAB,
                "decoder": {
                    "num_layers": 2,
                    "hidden_size": 32,
                    "num_heads": 4,
                    "dropout": dropout,
                    **OPTIONS[options],
                },
                "encoders": {
                    "text": {
                        "num_layers": 2,
                        "hidden_size": 24,
                        "num_heads": 2,
                        "max_text_positions": 16,
                        "recompute": recompute,
                        "dropout": dropout,
                    },
                    "image": {
                        "recompute": recompute,
                        "dropout": dropout,
                        "num_layers": 2,
                        "hidden_size": 16,
                        "num_heads": 2,
                        "normalization": "pre_ln",
                        "max_text_positions": 8,
                        "image": {"image_size": 8, "patch_size": 4},
                        "connector": "feed_forward",
                    },
                },
            },
            "data": {
                "tokenizer": "unused",
                "sequence_length": LENGTH,
                "lanes": 4,
                "sources": {
                    "text": {"path": "unused", "readers": {"text": "text"}},
                    "pairs": {"path": "unused", "readers": {"image": "image", "text": "image"}},
                },
            },
            "training": {
                "steps": 100,
                "global_batch_size": GLOBAL_ROWS,
                "micro_batch_size": micro_batch_size,
                "precision": precision,
                "fp32_gradients": fp32_gradients,
                "optimizer": {"gradient_clipping": 0.5},
                "schedule": {"warmup_steps": 2},
            },
        }
    )


def rate_of(step: int) -> float:
    """Learning rate of a step, counted from 0."""
    return RATES[step % len(RATES)]


def global_batch(step: int, rows: str = "random") -> list[PlainRow]:
    """The rows of a step, `random` or `lonely`."""
    return random_rows(step, GLOBAL_ROWS, VOCAB, LENGTH) if rows == "random" else lonely_rows(step, VOCAB)


def micro_batches(
    rows: list[PlainRow], config: RunConfig, data_rank: int, data_size: int
) -> list[SemiCausalBatch]:
    """A data-parallel rank's share of a global batch, in consecutive rows."""
    share = len(rows) // data_size
    own = [to_row(row) for row in rows[data_rank * share : (data_rank + 1) * share]]
    size = config.training.micro_batch_size
    return [
        collate(
            own[first : first + size],
            model_config=config.model,
            sequence_length=config.data.sequence_length,
            tp_size=config.parallel.tensor,
            pad_id=PAD,
            cp_size=config.parallel.context,
        )
        for first in range(0, share, size)
    ]


def to_row(plain: PlainRow) -> Row:
    """The row as the data engine holds it."""
    tokens: list[int] = []
    ends: list[int] = []
    found: dict[str, list] = {}
    for document in plain.documents:
        for span in document.spans:
            found.setdefault(span.encoder, []).append((len(tokens), span))
        tokens += document.tokens
        ends.append(len(tokens))
    spans = {
        encoder: RowSpans(
            bounds=np.array([[offset + span.start, offset + span.end] for offset, span in members]),
            num_patches=np.array([0 if s.patches is None else len(s.patches) for _, s in members]),
            media=None
            if members[0][1].patches is None
            else np.concatenate([span.patches for _, span in members]),
        )
        for encoder, members in found.items()
    }
    bounds = [pair for members in spans.values() for pair in members.bounds.tolist()]
    return Row(
        np.array(tokens, np.int32),
        loss_weights(len(tokens), ends, bounds),
        ends,
        spans=spans,
        source_id=plain.source,
        dropout_seed=plain.dropout_seed,
    )
