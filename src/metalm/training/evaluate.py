"""Held-out losses, and captions and continuations to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from metalm.config import RunConfig, SourceConfig
from metalm.config.schema import MEDIA_OF_KIND
from metalm.data.audio import Clip, ClipReader
from metalm.data.evaluation import evaluation_batches
from metalm.data.failures import BadSample
from metalm.data.images import fit_patches
from metalm.data.media import clip_reader
from metalm.data.rows import Row, media_prompt, text_prompt
from metalm.data.sources import read_samples
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import CheckpointError, ConfigError
from metalm.parallel.topology import Topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import Engines, build_engines
from metalm.training.generate import evaluating, generate_greedily
from metalm.training.objective import build_objective
from metalm.training.session import open_session
from metalm.training.start import decide_start, load_start

GENERATION_BATCH = 32
TEXT_PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """What the model made of one held-out sample."""

    source: str
    media: np.ndarray | Clip | None
    """Pixels [height, width, 3] uint8 of an image, or a clip; None: text."""
    reference: str
    """The caption, or the text that the prompt begins."""
    generated: str


def held_out_losses(engines: Engines, topology: Topology, config: RunConfig) -> dict[str, float]:
    """Nats per trained token of each held-out source; of pairs also with the images or clips exchanged.

    Keys: `SOURCE` and, for pairs, `SOURCE/wrong_image` or `SOURCE/wrong_audio`; with replaced-token
    detection, whose loss is of both models, also `SOURCE/PART`. The rows are the same on every topology.

    Collective: all ranks.
    """
    losses: dict[str, float] = {}
    for name, source in config.data.evaluation.items():
        losses |= _measure(engines, topology, config, name, name, wrong_media=False)
        if source.kind != "text":
            key = f"{name}/wrong_{MEDIA_OF_KIND[source.kind]}"
            losses |= _measure(engines, topology, config, name, key, wrong_media=True)
    return losses


def generate_samples(
    engines: Engines, topology: Topology, config: RunConfig, name: str, num_samples: int, max_new_tokens: int
) -> list[Sample]:
    """Captions of the first images or clips of a held-out source, or continuations of its first texts.

    None with an objective that does not learn to generate.

    Collective: all ranks.
    """
    if config.training.replaced_tokens is not None:
        return []
    source = config.data.evaluation[name]
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompts: list[Row] = []
    media: list[np.ndarray | Clip | None] = []
    references: list[str] = []
    encoder = config.model.encoders.get(source.encoder or "")
    reader = clip_reader(encoder) if encoder is not None and encoder.audio is not None else None
    for sample in read_samples(source, num_samples, tokenizer):
        if sample.media is not None:
            try:
                prompts.append(_caption_prompt(config, source, sample.media, tokenizer, reader))
            except BadSample:  # a clip that is too short for the encoder
                continue
            references.append(sample.captions[0])
        else:
            ids = tokenizer.encode([sample.text or ""])[0]
            prompts.append(text_prompt(ids[:TEXT_PROMPT_TOKENS], start_id=tokenizer.start_id))
            references.append(tokenizer.decode(ids[: TEXT_PROMPT_TOKENS + max_new_tokens]))
        media.append(sample.media)
    generated: list[str] = []
    for first in range(0, len(prompts), GENERATION_BATCH):
        part = prompts[first : first + GENERATION_BATCH]
        tokens = generate_greedily(engines, topology, config, tokenizer, part, max_new_tokens)
        generated += [tokenizer.decode(ids) for ids in tokens]
    return [
        Sample(name, seen, reference, text)
        for seen, reference, text in zip(media, references, generated, strict=True)
    ]


def evaluate(config: RunConfig, num_samples: int) -> int:
    """Evaluate a run's newest whole checkpoint; writes `evaluation.json` and `samples_SOURCE.jsonl`.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        ConfigError: the run has no held-out source.

    Collective: all ranks.
    """
    if not config.data.evaluation:
        raise ConfigError("data.evaluation has no source to evaluate on")
    with open_session(config) as session:
        store = CheckpointStore(session.run_folder, config, session.topology)
        start = decide_start(config, store)
        if start.checkpoint is None:
            raise CheckpointError(f"{session.run_folder} has no checkpoint to evaluate")
        engines = build_engines(config, session.topology, start.given)
        load_start(start, config, session.topology, engines)
        session.log.open()
        losses = held_out_losses(engines, session.topology, config)
        for name in config.data.evaluation:
            samples = generate_samples(
                engines, session.topology, config, name, num_samples, config.monitor.sample_new_tokens
            )
            if session.is_first and samples:
                lines = (json.dumps({"reference": s.reference, "generated": s.generated}) for s in samples)
                _replace(session.run_folder / f"samples_{name}.jsonl", "\n".join(lines) + "\n")
        if session.is_first:
            result = {"step": start.checkpoint.step, "losses": losses}
            _replace(session.run_folder / "evaluation.json", json.dumps(result, indent=1) + "\n")
            unit = "nats per token" if config.training.replaced_tokens is None else ""
            for name, loss in losses.items():
                print(f"{name:<40} {loss:8.4f} {unit}".rstrip())
    return 0


def _measure(
    engines: Engines, topology: Topology, config: RunConfig, name: str, key: str, *, wrong_media: bool
) -> dict[str, float]:
    """Means over a held-out source: the loss as `key`, and its parts as `key/PART`."""
    objective = build_objective(config.training.replaced_tokens)
    totals = {key: torch.zeros(2, dtype=torch.float64, device=topology.device)}
    with evaluating(engines):
        for batch in evaluation_batches(
            config,
            name,
            num_rows=config.monitor.evaluation_rows,
            dp_rank=topology.data_rank,
            dp_size=topology.data_size,
            tp_size=topology.tensor_size,
            wrong_media=wrong_media,
        ):
            batch = batch.to(topology.device)
            losses = objective(engines, batch, topology)
            totals[key] += torch.stack([losses.weighted.double().sum(), batch.loss_mask.double().sum()])
            for part, measured in losses.parts.items():
                totals[f"{key}/{part}"] = totals.get(f"{key}/{part}", 0.0) + measured
    for total in totals.values():
        dist.all_reduce(total, group=topology.data_group)
    return {name: float(total[0] / total[1].clamp(min=1)) for name, total in totals.items()}


def _caption_prompt(
    config: RunConfig,
    source: SourceConfig,
    media: np.ndarray | Clip,
    tokenizer: Tokenizer,
    reader: ClipReader | None,
) -> Row:
    assert source.encoder is not None
    if isinstance(media, Clip):
        assert reader is not None
        content, num_patches = reader.features(media)
    else:
        image = config.model.encoders[source.encoder].image
        assert image is not None
        content, num_patches = fit_patches(media, image), image.num_patches
    return media_prompt(
        content,
        num_patches,
        encoder=source.encoder,
        start_id=tokenizer.start_id,
        paragraph_id=tokenizer.paragraph_id,
    )


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    partial.replace(path)
