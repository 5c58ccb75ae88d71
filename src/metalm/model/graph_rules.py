"""Which layers run from CUDA graphs in training: rules that the engines and the planner share."""

from __future__ import annotations

from metalm.config import EncoderConfig, RunConfig


def why_not_graphs(config: RunConfig, device_type: str, zero_stage: int) -> str | None:
    """Why the decoder's layers cannot run from graphs on devices of a type, such as `cuda`, or None."""
    if reason := _why_no_graphs(config, device_type, zero_stage):
        return reason
    if config.model.decoder.recompute:
        return "model.decoder.recompute computes layers again in the backward"
    if config.parallel.rows_size > 1:
        return "layers of tensor-parallel and context-parallel ranks exchange what graphs do not hold here"
    return None


def why_no_encoder_graphs(
    config: RunConfig, encoder: EncoderConfig, device_type: str, zero_stage: int
) -> str | None:
    """The same of an encoder's layers."""
    if reason := _why_no_graphs(config, device_type, zero_stage):
        return reason
    if encoder.pretrained is not None:
        return "its layers are transformers' own"
    if encoder.recompute:
        return "recompute computes layers again in the backward"
    if encoder.relative_bias and encoder.trained_layers == "all":
        return "all layers add to the gradient of its relative bias"
    return None


def _why_no_graphs(config: RunConfig, device_type: str, zero_stage: int) -> str | None:
    if not config.training.cuda_graphs:
        return "training.cuda_graphs is false"
    if device_type != "cuda":
        return f"there are none on {device_type}"
    if zero_stage == 3:
        return "ZeRO 3 gathers each layer's weights anew"
    return None
