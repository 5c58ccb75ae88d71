"""What a run is: schema, loading and the rules that hold across sections."""

from metalm.config.load import load_config, write_config
from metalm.config.schema import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    GuardConfig,
    ImageConfig,
    InitializeConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScalingConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    SpanConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "GuardConfig",
    "ImageConfig",
    "InitializeConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "SpanConfig",
    "TrainingConfig",
    "load_config",
    "write_config",
]
