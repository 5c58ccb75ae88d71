"""Which layouts hold a run, best first: every combination that the config's rules and the memory allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from metalm.config import RunConfig
from metalm.config.load import load_deepspeed_json
from metalm.config.rules import check_config
from metalm.errors import ConfigError, TopologyError
from metalm.planning.calibration import Calibration
from metalm.planning.devices import Device
from metalm.planning.plan import Plan, plan_run
from metalm.planning.workload import USUAL, Assumed
from metalm.progress import Phase


@dataclass(frozen=True)
class Found:
    """A layout that fits, and how many were looked at."""

    plans: list[Plan]
    """Best first."""
    tried: int
    too_large: int
    smallest: Plan | None
    """The least memory of those that do not fit."""


def search_layouts(
    config: RunConfig,
    world_size: int,
    device: Device,
    calibration: Calibration | None = None,
    *,
    assumed: Assumed = USUAL,
) -> Found:
    """All layouts of a run on so many devices: TP, micro-batch, DeepSpeed JSONs, recomputation.

    Sizes are powers of two, and the config's own. The global batch and all that decides the losses stay as
    they are. Sequence parallelism is on wherever it was, and with TP 1 off. The JSONs are those beside the
    ones that the config names, of the same engine.

    Raises:
        TopologyError: no layout divides the run over so many devices.
        ConfigError: a JSON that the config names cannot be read.
    """
    plans: list[Plan] = []
    tried, too_large, smallest = 0, 0, None
    for candidate in Phase.over("planning layouts", list(_candidates(config, world_size)), "layouts"):
        try:
            plan = plan_run(candidate, world_size, device, calibration, assumed=assumed)
        except TopologyError:
            continue
        tried += 1
        if plan.fits:
            plans.append(plan)
            continue
        too_large += 1
        if smallest is None or plan.total_bytes < smallest.total_bytes:
            smallest = plan
    if not tried:
        plan_run(config, world_size, device, calibration, assumed=assumed)  # says why
    return Found(sorted(plans, key=_badness), tried, too_large, smallest)


def overrides(plan: Plan, base: RunConfig) -> list[str]:
    """What to type behind the pipeline for the layout of a plan."""
    config = plan.config
    values = {
        "parallel.tensor": (base.parallel.tensor, config.parallel.tensor),
        "parallel.sequence_parallel": (base.parallel.sequence_parallel, config.parallel.sequence_parallel),
        "training.micro_batch_size": (base.training.micro_batch_size, config.training.micro_batch_size),
        "deepspeed.decoder": (base.deepspeed.decoder, config.deepspeed.decoder),
        "deepspeed.encoders": (base.deepspeed.encoders, config.deepspeed.encoders),
        "model.decoder.recompute": (base.model.decoder.recompute, config.model.decoder.recompute),
    }
    for name, encoder in config.model.encoders.items():
        values[f"model.encoders.{name}.recompute"] = (base.model.encoders[name].recompute, encoder.recompute)
    return [f"{key}={_word(new)}" for key, (old, new) in values.items() if old != new]


def _badness(plan: Plan) -> tuple[float, float]:
    """Slowest last; of layouts whose three leading digits agree, the one that holds less first."""
    return (float(f"{plan.step_s:.3g}"), plan.total_bytes)


def _candidates(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    tensors = {t for t in _powers_of_two(world_size) if world_size % t == 0} | {config.parallel.tensor}
    micro_batches = {*_powers_of_two(config.training.global_batch_size), config.training.micro_batch_size}
    decoder_files = _files_beside(config, config.deepspeed.decoder)
    encoder_files = _files_beside(config, config.deepspeed.encoders) if config.model.encoders else [None]
    recompute = (False, "selective", True)
    encoder_recompute = (False, True) if config.model.encoders else (False,)
    for tensor, size, decoder_file, encoder_file, keep, keep_encoders in product(
        sorted(tensors), sorted(micro_batches), decoder_files, encoder_files, recompute, encoder_recompute
    ):
        deepspeed = {"decoder": decoder_file} | ({"encoders": encoder_file} if encoder_file else {})
        encoders = {
            name: encoder.model_copy(update={"recompute": keep_encoders})
            for name, encoder in config.model.encoders.items()
        }
        decoder = config.model.decoder.model_copy(update={"recompute": keep})
        parallel = {
            "tensor": tensor,
            "sequence_parallel": config.parallel.sequence_parallel and tensor > 1,
        }
        yield config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=parallel),
                "training": config.training.model_copy(update={"micro_batch_size": size}),
                "deepspeed": config.deepspeed.model_copy(update=deepspeed),
                "model": config.model.model_copy(update={"decoder": decoder, "encoders": encoders}),
            }
        )


def _files_beside(config: RunConfig, path: Path) -> list[Path]:
    """The engine's JSONs in the folder, by the first word of the file's name, that the rules allow."""
    engine = path.stem.split("_")[0]
    found = []
    for file in sorted({path, *path.parent.glob(f"{engine}_*.json")}):
        try:
            content = load_deepspeed_json(file)
            check_config(config, content, content)
        except ConfigError:
            if file == path:
                raise
            continue
        found.append(file)
    return found


def _powers_of_two(limit: int) -> Iterator[int]:
    value = 1
    while value <= limit:
        yield value
        value *= 2


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
