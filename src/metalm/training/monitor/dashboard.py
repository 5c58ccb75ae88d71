"""What TensorBoard shows beside plain curves: a page to open on, the run's key values, mask pictures.

The page is the Custom Scalars tab. Its charts name tags by patterns, so that all runs of a folder have the
same page and TensorBoard draws it once, with a curve per run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from metalm.kernels import IntervalMask
from metalm.kernels.mask_picture import mask_image

PAGE = {
    "Learning": {
        "loss by source": ["loss/.*"],
        "held-out loss by source": ["held_out/.*"],
        "gradient norm, both engines and each": ["optimizer/gradient_norm.*"],
        "learning rate": ["optimizer/learning_rate"],
    },
    "Speed": {
        "throughput: tokens per second": ["speed/tokens_per_second"],
        "utilisation: share of the peak": ["speed/model_flops_utilisation"],
        "TFLOP/s per rank": ["speed/model_tflops_per_rank"],
        "data wait: share of the time": ["speed/data_wait_share"],
        "step time by part, seconds": ["time/step/.*", "speed/step_seconds"],
    },
    "Health": {
        "skipped samples by source and cause": ["data/skipped_samples", "data/.*/skipped/.*"],
        "skipped steps, rewinds, failed saves": ["optimizer/skipped_steps", "guards/.*"],
        "restarts": ["run/restarts"],
        "saving and evaluation, seconds": ["time/apart/.*"],
        "memory, GiB": ["memory/.*"],
    },
}
"""Charts by section: the patterns of the tags that each one shows."""

KEY_METRICS = ("loss/all", "speed/tokens_per_second")
_MOST_PIXELS = 1024


def write_page(writer: SummaryWriter) -> None:
    """Lay out the Custom Scalars tab."""
    writer.add_custom_scalars(
        {
            section: {title: ["Multiline", patterns] for title, patterns in charts.items()}
            for section, charts in PAGE.items()
        }
    )


def write_key_values(writer: SummaryWriter, config: RunConfig) -> None:
    """Record the run in the HParams tab.

    The record has no step and stands in the run's own folder: written again after a restart it stays one.
    torch's `add_hparams` would open another folder, and so another curve, at each start.
    """
    metrics = dict.fromkeys((*KEY_METRICS, *(f"held_out/{name}" for name in config.data.evaluation)), 0.0)
    file_writer = writer._get_file_writer()
    for summary in hparams(key_values(config), metrics)[:2]:  # the third says that the run has ended
        file_writer.add_summary(summary)


def key_values(config: RunConfig) -> dict[str, float | str]:
    """What sets runs apart, by dotted key; names and places are left out."""
    sections = config.model_dump(mode="json", include={"parallel", "model", "data", "training"})
    sections["data"] = {"spans": config.data.spans.model_dump()} | {
        f"weight.{name}": source.weight for name, source in config.data.sources.items()
    }
    return dict(_flatten(sections))


def mask_pictures(batch: SemiCausalBatch) -> dict[str, np.ndarray]:
    """The masks of a batch's first row and of its first tensor rank's encoders: [height, width, 3] uint8."""
    masks = {"decoder": (batch.attention_start[:1], batch.attention_end[:1])}
    for name, spans in batch.encoders.items():
        share = spans.shares[0]
        masks[name] = (share.attention_start[None], share.attention_end[None])
    return {name: _picture(start, end) for name, (start, end) in masks.items()}


def _picture(start: torch.Tensor, end: torch.Tensor) -> np.ndarray:
    length = start.shape[1]
    block = min(128, max(4, length // 16))
    stride = -(-length // _MOST_PIXELS)
    return mask_image(IntervalMask(start, end, length), 0, block, block)[::stride, ::stride].numpy()


def _flatten(value: Any, name: str = "") -> list[tuple[str, float | str]]:
    if isinstance(value, dict):
        parts = [_flatten(item, f"{name}.{key}" if name else key) for key, item in value.items()]
        return [entry for part in parts for entry in part]
    if value is None:
        return []
    return [(name, value if isinstance(value, (int, float, str)) else str(value))]
