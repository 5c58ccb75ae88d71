"""The README.md of an exported folder: figures of the run, the proof, and snippets that run as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from metalm.checkpoint.reader import AverageReader
from metalm.config.model_schema import TEXT
from metalm.config.schema import SourceConfig
from metalm.conversion.checkpoint_source import CheckpointSource
from metalm.conversion.proof import TOLERANCE, ProofResult
from metalm.data.usual_readers import usual_readers
from metalm.evaluation.losses import AVERAGE_SUFFIX
from metalm.modalities import modality_of_encoder
from metalm.objectives import build_objective

CARD_NAME = "README.md"
_FOR_CLIPS = "soundfile (for files) and soxr (for other sampling rates) for clips"


def write_model_card(
    source: CheckpointSource,
    folder: Path,
    *,
    name: str,
    dtype: torch.dtype,
    num_parameters: int,
    proof: list[ProofResult],
    license_name: str,
) -> None:
    """Write README.md.

    Args:
        source: the checkpoint.
        folder: where to.
        name: of the model, the exported folder's.
        dtype: of the exported weights.
        num_parameters: without the padding of the vocabulary.
        proof: empty if there was none.
        license_name: identifier as the Hugging Face hub knows it.
    """
    readers = usual_readers(source.config)
    images, clips = "image" in readers, "audio" in readers
    needed = [name for name, is_needed in (("Pillow for images", images), (_FOR_CLIPS, clips)) if is_needed]
    parts = [
        _front_matter(images, clips, license_name),
        f"# {name}\n\n"
        "A MetaLM (arXiv 2206.06336): a causal decoder into whose input the vectors of bidirectional "
        "encoders are docked.\n",
        "## Use\n\nThe model code is in this folder and needs torch and transformers 5.17 or newer"
        + "".join(f", and {one}" for one in needed)
        + ".\n",
        _snippet(source, name, images, clips),
        "In a prompt, `<span>...</span>` marks text that an encoder reads, `<image>` an image, `<audio>` a "
        "clip, and `<span><image>...</span>` an image read together with text; `<span:NAME>` chooses an "
        "encoder. A backslash before a marker makes it text, as `processor.escape` does for a whole text. "
        "A blank line is the end-of-paragraph token. Images are resized to a square, without cropping; "
        "clips are resampled, their channels averaged, and cut where they are longer than their encoder "
        "reads.\n"
        if source.config.model.encoders
        else "",
        "## Training\n\n" + _table(_figures(source, dtype, num_parameters)),
        "## Encoders\n\n" + _encoder_table(source) if source.config.model.encoders else "",
        "## Conversion\n\n" + _proof_table(proof),
    ]
    (folder / CARD_NAME).write_text("\n".join(part for part in parts if part))


def _front_matter(images: bool, clips: bool, license_name: str) -> str:
    task = "image-text-to-text" if images else "audio-text-to-text" if clips else "text-generation"
    fields = (
        "library_name: transformers",
        f"pipeline_tag: {task}",
        f"license: {license_name}",
        "tags: [metalm]",
    )
    return "\n".join(["---", *fields, "---", ""])


def _snippet(source: CheckpointSource, name: str, images: bool, clips: bool) -> str:
    auto = "AutoModelForCausalLM"
    if images or clips:
        auto = "AutoModelForMultimodalLM" if clips else "AutoModelForImageTextToText"
    lines = [
        f"from transformers import {auto}, AutoProcessor",
        "",
        f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)',
        f'processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)',
        "",
        'inputs = processor(text="Once upon a time")',
        "tokens = model.generate(**inputs, max_new_tokens=20)",
        "print(processor.decode(tokens[0], skip_special_tokens=True))",
    ]
    if TEXT in usual_readers(source.config):
        lines += [
            "",
            'inputs = processor(text="Once<span> upon a time</span> there")',
            "tokens = model.generate(**inputs, max_new_tokens=20)",
        ]
    if images:
        lines += [
            "",
            "from PIL import Image",
            "",
            'image = Image.new("RGB", (64, 64), "red")',
            'inputs = processor(text="<image>", images=image)',
            "tokens = model.generate(**inputs, max_new_tokens=20)",
            "print(processor.decode(tokens[0], skip_special_tokens=True))",
        ]
    if clips:
        lines += [
            "",
            "import numpy as np",
            "",
            "clip = np.sin(np.arange(16000) / 5)  # or the path of a WAV, FLAC, Ogg or MP3 file",
            'inputs = processor(text="<audio>", audio=clip, sampling_rate=16000)',
            "tokens = model.generate(**inputs, max_new_tokens=20)",
            "print(processor.decode(tokens[0], skip_special_tokens=True))",
        ]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _figures(source: CheckpointSource, dtype: torch.dtype, num_parameters: int) -> Iterator[tuple[str, str]]:
    config, state = source.config, source.reader.state
    decoder, training = config.model.decoder, config.training
    yield "Parameters", f"{num_parameters:,}, {str(dtype).removeprefix('torch.')}"
    yield (
        "Decoder",
        f"{decoder.num_layers} layers, {decoder.hidden_size} wide, {decoder.num_heads} heads, "
        f"{decoder.normalization}",
    )
    yield "Vocabulary", f"{config.model.vocab_size:,}"
    yield "Row length", f"{config.data.sequence_length:,} tokens"
    yield "Steps", f"{source.reader.step:,} of {training.steps:,}"
    yield "Rows per step", f"{training.global_batch_size:,}"
    yield "Trained positions", f"{state.progress.trained_tokens:,.0f}"
    sources = config.data.sources.items()
    yield "Data", ", ".join(f"{name} ({_readers(one)}weight {one.weight:g})" for name, one in sources)
    yield "Precision", training.precision
    yield "Learning rate", f"{training.optimizer.learning_rate:g}, {training.schedule.decay} decay"
    if isinstance(source.reader, AverageReader):
        yield "Weights", "moving average over the steps"
    topology = state.topology
    context = f"context {topology.context} x " if topology.context > 1 else ""
    yield "Layout", f"tensor {topology.tensor} x {context}data {topology.data}"
    yield "ZeRO stages", ", ".join(f"{name} {stage}" for name, stage in state.zero_stages.items())
    yield "Seed", str(config.run.seed)
    yield "Code", str(source.provenance.get("commit"))
    versions = source.provenance.get("versions", {})
    yield "Versions", ", ".join(f"{package} {version}" for package, version in versions.items())
    yield from _held_out_losses(source)


def _readers(source: SourceConfig) -> str:
    return "".join(f"{modality} read by {reader}, " for modality, reader in source.readers.items())


def _held_out_losses(source: CheckpointSource) -> Iterator[tuple[str, str]]:
    """What `metalm evaluate` wrote beside the checkpoints, if it was of this one."""
    path = source.folder.parent.parent / "evaluation.json"
    if not path.is_file():
        return
    evaluation = json.loads(path.read_text())
    if evaluation["step"] == source.reader.step:
        of_average = isinstance(source.reader, AverageReader)
        unit = build_objective(source.config).loss_unit
        for name, loss in evaluation["losses"].items():
            if name.endswith(AVERAGE_SUFFIX) != of_average:
                continue
            yield f"Held-out loss, {name.removesuffix(AVERAGE_SUFFIX)}", f"{loss:.4f} {unit}".rstrip()


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def _encoder_table(source: CheckpointSource) -> str:
    lines = ["| encoder | layers | wide | heads | connector | reads |", "|---|---|---|---|---|---|"]
    for name, encoder in source.config.model.encoders.items():
        reads = [f"up to {encoder.max_text_positions} tokens"] if encoder.max_text_positions else []
        if (media := modality_of_encoder(encoder).describe_input(encoder)) is not None:
            reads = [media, *reads]
        if encoder.pretrained:
            reads.append(f"as {encoder.pretrained.model_type} of transformers does")
        lines.append(
            f"| {name} | {encoder.num_layers} | {encoder.hidden_size} | {encoder.num_heads} "
            f"| {encoder.connector} | {', '.join(reads)} |"
        )
    return "\n".join(lines) + "\n"


def _proof_table(proof: list[ProofResult]) -> str:
    if not proof:
        return "Converted without proof: nobody has compared this model with its checkpoint.\n"
    lines = [
        f"Before this folder got its name, its logits were compared with the checkpoint's own model, in "
        f"float32 (at most {TOLERANCE:g} apart).\n",
        "| prompt | tokens | largest difference | largest logit | same most likely token |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.num_tokens} | {r.largest_difference:.2e} | {r.largest_logit:.2f} "
        f"| {r.same_argmax} of {r.num_tokens} |"
        for r in proof
    ]
    return "\n".join(lines) + "\n"
