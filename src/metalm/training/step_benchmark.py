"""Optimizer steps of a pipeline on made-up rows, timed and looked into: what `tools/check_gpu.py` reports.

The step is the trainer's own, from batches in pinned host memory to the update; reading data is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from metalm.batch import SemiCausalBatch, in_one_piece
from metalm.config import RunConfig
from metalm.config.model_schema import TEXT, EncoderConfig
from metalm.config.schema import SourceConfig
from metalm.data.collate import collate
from metalm.data.documents.spans import text_document
from metalm.data.row import lay_out
from metalm.document import Document, Part
from metalm.kernels import backend_counts
from metalm.modalities import modality_of_encoder
from metalm.model.flops import count_training_flops
from metalm.objectives import build_objective
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.engines import build_engines, gradient_accumulation_steps
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep
from metalm.training.timing import PartTimer
from metalm.training.verdicts import Verdicts

WARM_UP_STEPS, NUM_PROFILED = 3, 3
NUM_KERNELS, NUM_GAPS = 25, 10
"""The most expensive kernels and the longest times without one that are told."""
_MEAN_DOCUMENT = 1000
_PREFIX, _CAPTION = 8, 24
"""Text tokens that an image's encoder reads with it, and that the decoder generates of it."""


def measure_steps(
    config: RunConfig, *, num_steps: int, matmul_tflops: float, one_document: bool
) -> dict[str, Any]:
    """Time and profile steps of one process alone.

    Args:
        config: of a run with one rank.
        num_steps: timed ones, after `WARM_UP_STEPS`.
        matmul_tflops: what the utilisation is a share of.
        one_document: each row is one document; else they are packed, with the spans of the config.

    Collective: a process group is opened and closed.
    """
    device = open_process_group(find_launch(os.environ), config.parallel.timeout_minutes)
    topology = build_topology(config.parallel.tensor, device)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engines = build_engines(config, topology)
        guard = StepGuard(config.guards, config.data.sources, device)
        objective = build_objective(config)
        step = TrainStep(engines, topology, len(config.data.sources), guard, objective)
        batches = made_up_batches(config, one_document=one_document)
        positions = sum(batch.tokens.numel() for batch in batches)
        flops = sum(count_training_flops(batch, config.model) for batch in batches)
        if device.type == "cuda":
            batches = [in_one_piece(batch, pinned=True) for batch in batches]
        rate = config.training.optimizer.learning_rate / 100
        verdicts, number = Verdicts(), itertools.count(1)

        def run() -> None:
            """As the training loop does it: the host is at most two steps ahead."""
            result = step.run(batches, rate)
            verdicts.add(next(number), result.verdict, guard.judged)
            step.begin(batches)
            for _ in verdicts.read():
                pass

        first_step_s = _timed(run, device)
        for _ in range(WARM_UP_STEPS - 1):
            run()
        seconds = _timed_in_flow(run, num_steps, device)
        median = statistics.median(seconds)
        banks = [] if engines.encoders is None else engines.encoders.module.encoders.values()
        graphs = [getattr(part, "graphs", None) for part in (engines.decoder.module, *banks)]
        figures = {
            "positions_per_step": positions,
            "first_step_s": first_step_s,
            "step_s": median,
            "steps_s": seconds,
            "tokens_per_s": positions / median,
            "tflops": flops / median / 1e12,
            "utilisation_of_matmul": flops / median / 1e12 / matmul_tflops,
            "attention_backends": backend_counts(),
            "forms_from_graphs": sum(stacks.num_forms for stacks in graphs if stacks is not None),
        }
        if device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            figures["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
            figures |= _look_into(run, device)
        return figures
    finally:
        close_topology()


def made_up_batches(
    config: RunConfig, *, one_document: bool, data_size: int = 1, tensor_size: int = 1
) -> list[SemiCausalBatch]:
    """The micro-batches of one step of a data-parallel rank: random tokens, in rows like the sources'."""
    generator = np.random.default_rng(config.run.seed)
    length, rows_each = config.data.sequence_length, config.training.micro_batch_size
    sources = list(config.data.sources.values())
    weights = np.array([source.weight for source in sources])
    batches = []
    for _ in range(gradient_accumulation_steps(config, data_size)):
        rows = []
        for _ in range(rows_each):
            number = int(generator.choice(len(sources), p=weights / weights.sum()))
            documents = _documents(config, sources[number], generator, one_document=one_document)
            row = lay_out(documents, _FRAME, number)
            rows.append(dataclasses.replace(row, dropout_seed=int(generator.integers(2**40))))
        batches.append(
            collate(
                rows,
                model_config=config.model,
                sequence_length=length,
                tp_size=tensor_size,
                pad_id=0,
            )
        )
    return batches


class _Frame(NamedTuple):
    """What stands around documents."""

    start_id: int
    document_id: int


_FRAME = _Frame(1, 2)


def _documents(
    config: RunConfig, source: SourceConfig, generator: np.random.Generator, *, one_document: bool
) -> list[Document]:
    """Of one full row."""
    encoders, length = config.model.encoders, config.data.sequence_length
    readers = {modality: name for modality, name in source.readers.items() if name in encoders}
    for modality, name in readers.items():
        if modality != TEXT:
            num_vectors = modality_of_encoder(encoders[name]).max_vectors(encoders[name])
            pair_size = num_vectors + _PREFIX + _CAPTION + 2
            return [_pair(config, name, encoders[name], generator) for _ in range(length // pair_size)]
    documents: list[Document] = []
    left = length
    while left > 0:
        size = length if one_document else 3 + int(generator.exponential(_MEAN_DOCUMENT))
        size = min(size, left) if left - size > 2 else left
        body = _tokens(config, size - 2, generator)
        spans = _spans(config, len(body), generator) if TEXT in readers else []
        documents.append(text_document(body, spans, readers.get(TEXT)))
        left -= size
    return documents


def _spans(config: RunConfig, length: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    settings = config.data.spans
    found: list[tuple[int, int]] = []
    place = 0
    while True:
        size = int(generator.integers(settings.min_length, settings.max_length + 1))
        place += int(size * (1 / settings.fraction - 1))
        if place + size > length:
            return found
        found.append((place, place + size))
        place += size


def _pair(config: RunConfig, name: str, encoder: EncoderConfig, generator: np.random.Generator) -> Document:
    modality = modality_of_encoder(encoder)
    none, num_vectors = modality.no_media(encoder), modality.max_vectors(encoder)
    (rows,) = modality.rows_of_media(np.array([num_vectors]))
    content = generator.integers(0, 256, (rows, *none.shape[1:])).astype(none.dtype)
    placeholders = np.zeros(num_vectors, np.int32)
    prefix, caption = _tokens(config, _PREFIX, generator), _tokens(config, _CAPTION, generator)
    media = Part(modality.name, placeholders, name, content=content)
    return Document((media, Part(TEXT, prefix, name), Part(TEXT, caption)))


def _tokens(config: RunConfig, length: int, generator: np.random.Generator) -> np.ndarray:
    return generator.integers(1, config.model.vocab_size, length).astype(np.int32)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _timed_in_flow(run: Callable[[], None], num_steps: int, device: torch.device) -> list[float]:
    """Seconds of each of some steps that follow each other, with no wait between them."""
    timer = PartTimer(device)
    for number in range(num_steps):
        with timer.part(str(number)):
            run()
    return list(timer.read().values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _look_into(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Share of the time in which no kernel ran, over steps that follow each other, and of one of them the
    kernels that took most."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(NUM_PROFILED):
            run()
        torch.cuda.synchronize(device)
    events = [event for event in profiled.events() or () if event.device_type.name == "CUDA"]
    busy = 0.0
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    if not events:
        return {}
    events.sort(key=lambda event: event.time_range.start)
    first = reached = events[0].time_range.start
    last = ""
    gaps = []
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        if start > reached:
            gaps.append({"ms": (start - reached) / 1000, "after": last, "before": event.name[:80]})
        busy += max(end - max(start, reached), 0.0)
        if end > reached:
            reached, last = end, event.name[:80]
    for event in events:
        spent[event.name][0] += event.time_range.elapsed_us() / 1000 / NUM_PROFILED
        spent[event.name][1] += 1 / NUM_PROFILED
    most = sorted(spent.items(), key=lambda item: -item[1][0])[:NUM_KERNELS]
    return {
        "idle_share": 1.0 - busy / (reached - first),
        "num_kernels": len(events) / NUM_PROFILED,
        "busy_ms": busy / 1000 / NUM_PROFILED,
        "gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:NUM_GAPS],
        "kernels": [{"name": name[:120], "ms": ms, "calls": calls} for name, (ms, calls) in most],
    }
