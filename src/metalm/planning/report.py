"""Plans as text for operators."""

from __future__ import annotations

from collections.abc import Iterator

from metalm.config import RunConfig
from metalm.config.model_schema import TEXT
from metalm.model.encoder_parameters import (
    count_connector,
    count_encoder,
    count_frozen,
    count_frozen_connector,
)
from metalm.planning.memory import KINDS
from metalm.planning.plan import CONTEXT_BYTES, USABLE_SHARE, Plan
from metalm.planning.search import Found, overrides

GIB, MIB = 2**30, 2**20
SHOWN_LAYOUTS = 10
SHOWN_CAUSES = 8


def describe_batch(plan: Plan) -> str:
    """Ranks and batch arithmetic."""
    config, training = plan.config, plan.config.training
    parallel = config.parallel
    data = plan.world_size // parallel.rows_size
    context = f"context {parallel.context} x " if parallel.context > 1 else ""
    positions = training.global_batch_size * config.data.sequence_length
    return "\n".join(
        [
            f"ranks           {plan.world_size}: tensor {parallel.tensor} x {context}data {data}",
            f"global batch    {training.global_batch_size} rows = {data} data-parallel ranks x "
            f"{plan.accumulation} micro-batch(es) x {training.micro_batch_size} row(s)",
            f"positions       {positions:,} per step, {positions * training.steps:,} in "
            f"{training.steps:,} steps",
            f"lanes           {config.data.lanes}, {config.data.lanes // data} per data-parallel rank",
        ]
    )


def describe_memory(plan: Plan) -> str:
    """Parameters, and bytes per rank by engine and kind."""
    kinds = "".join(f"{kind:>13}" for kind in KINDS)
    lines = [
        f"{'component':<12}{'parameters':>16}{'trained':>16}{'ZeRO':>6}{kinds}{'all':>13}   MiB per rank"
    ]
    for name, engine in plan.engines.items():
        sizes = [getattr(engine.held, kind) for kind in KINDS]
        cells = "".join(f"{size / MIB:>13,.1f}" for size in [*sizes, sum(sizes)])
        count, stage = engine.count, engine.zero.stage
        lines.append(f"{name:<12}{count.total:>16,}{count.total_trained:>16,}{stage:>6}{cells}")
    model = plan.config.model
    for name, encoder in model.encoders.items():
        own, connector = count_encoder(encoder, model), count_connector(encoder, model)
        trained = own - count_frozen(encoder, model)
        lines.append(f"  {name:<10}{own:>16,}{trained:>16,}")
        on_top = "head" if encoder.connector == "detection" else "connector"
        trained = connector - count_frozen_connector(encoder, model)
        lines.append(f"  {on_top:<10}{connector:>16,}{trained:>16,}")
    sizes = [*plan.bytes_by_kind.values(), plan.total_bytes]
    lines.append(f"{'all':<50}" + "".join(f"{size / MIB:>13,.1f}" for size in sizes))
    return "\n".join(lines)


def describe_cost(plan: Plan) -> str:
    """Whether the device holds it, communication, operations, time with its range, and the assumptions."""
    device, step_s = plan.device, plan.step_s
    least, most, causes = plan.range_s
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"device          {device.name}, {plan.world_size} of them, {device.per_node} a node",
        f"memory          {plan.total_bytes / GIB:.1f} GiB of {plan.limit_bytes / GIB:.1f} usable a rank: "
        f"{verdict}",
        *_host_memory(plan),
        f"FLOPs           {plan.model_flops:.3e} a step, {plan.executed_flops:.3e} executed by a rank",
        "sent per step   by one rank",
    ]
    for part in plan.traffic:
        where = "between nodes" if part.spans_nodes else "inside a node"
        hidden = ", beside the computation" if part.hidden else ""
        lines.append(
            f"  {part.kind:<26}{part.num_bytes / GIB:>10.3f} GiB {part.calls:>8,.0f} times   "
            f"{part.group_size} ranks {where}{hidden}"
        )
    lines.append(f"step            {least:.3f} to {most:.3f} s, expected {step_s:.3f} s")
    for name, seconds in plan.parts_s.items():
        if seconds:
            lines.append(f"  {name:<40}{seconds:>8.3f} s {seconds / step_s:>6.0%}")
    lines.append("hangs on        the step if this alone were at its better, and at its worse limit")
    for cause in causes[:SHOWN_CAUSES]:
        if cause.slow_s > cause.fast_s:
            figure = plan.calibration.figures[cause.figure]
            limits = f"{figure.low:.3g} to {figure.high:.3g}"
            step = f"{cause.fast_s:>9.3f} to {cause.slow_s:.3f} s"
            lines.append(f"  {cause.figure:<22}{limits:>20}{step}   {figure.source}")
    lines += [
        f"utilisation     {plan.utilisation * step_s / most:.1%} to {plan.utilisation * step_s / least:.1%} "
        f"of {plan.peak_tflops:g} TFLOP/s, a device's dense {plan.config.training.precision} peak",
        f"duration        {plan.days * least / step_s:.2f} to {plan.days * most / step_s:.2f} days for "
        f"{plan.config.training.steps:,} steps",
        *_assumptions(plan),
    ]
    return "\n".join(lines)


def _host_memory(plan: Plan) -> Iterator[str]:
    """What checkpoints are taken into, and what is offloaded, if anything is."""
    ranks = min(plan.world_size, plan.device.per_node)
    snapshot, offloaded = (
        sum(getattr(engine, name) for engine in plan.engines.values()) / GIB
        for name in ("snapshot_bytes", "host_bytes")
    )
    for held, what in ((offloaded, "for offloaded optimizers"), (snapshot, "to take checkpoints into")):
        if held:
            of_node = f"{ranks * held:.1f} for {ranks} of a node"
            yield f"host memory     {held:.1f} GiB a rank {what}, {of_node}"


def describe_search(found: Found, base: RunConfig) -> str:
    """The best layouts, with what to type for each."""
    lines = [
        f"{found.tried} layouts, {len(found.plans)} fit, {found.too_large} need too much memory; best first",
        "",
        f"{'step':>9}{'from':>8}{'to':>7}{'used':>7}{'GiB':>7}{'TP':>4}{'DP':>6}{'micro':>6}{'ZeRO':>6}"
        "   type behind the pipeline",
    ]
    for plan in found.plans[:SHOWN_LAYOUTS]:
        config = plan.config
        stages = ",".join(str(engine.zero.stage) for engine in plan.engines.values())
        tensor, data = config.parallel.tensor, plan.world_size // config.parallel.rows_size
        typed = " ".join(overrides(plan, base)) or "(as it is)"
        least, most, _ = plan.range_s
        lines.append(
            f"{plan.step_s:>7.2f} s{least:>8.2f}{most:>7.2f}{plan.utilisation:>7.1%}"
            f"{plan.total_bytes / GIB:>7.1f}{tensor:>4}"
            f"{data:>6}{config.training.micro_batch_size:>6}{stages:>6}   {typed}"
        )
    if not found.plans and found.smallest is not None:
        need, limit = found.smallest.total_bytes / GIB, found.smallest.limit_bytes / GIB
        typed = " ".join(overrides(found.smallest, base)) or "the pipeline as it is"
        lines.append(f"the smallest needs {need:.1f} GiB of {limit:.1f} usable: {typed}")
    return "\n".join(lines)


def _assumptions(plan: Plan) -> list[str]:
    calibration = plan.calibration
    means = plan.assumed
    captions = f"; captions of {means.caption_tokens} tokens" if _has_pairs(plan.config) else ""
    if examples := [one for one in plan.config.data.sources.values() if one.overflow is not None]:
        readers = {modality for one in examples for modality in one.readers}
        captions += f"; examples of {means.example_tokens} tokens of text"
        captions += ", half of it encoded" if TEXT in readers else ""
        captions += f", and {means.example_media} image(s) or clip(s)" if readers - {TEXT} else ""
    assumed = [
        *(f"{name}: {calibration.sources[name]}" for name in ("products", "attention", "links")),
        "limits deviate independently of each other; data in time",
        f"text documents fill a row{captions}",
        f"usable memory: {USABLE_SHARE:.0%} less {CONTEXT_BYTES / GIB:.0f} GiB for context and communication",
        f"figures of the device: {plan.device.source}",
    ]
    return [f"{'' if number else 'assumed':<16}{line}" for number, line in enumerate(assumed)]


def _has_pairs(config: RunConfig) -> bool:
    sources = config.data.sources.values()
    return any(set(source.readers) - {TEXT} for source in sources if source.overflow is None)
