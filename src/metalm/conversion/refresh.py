"""Today's model code into a folder that was exported before, proved again without the checkpoint.

The folder's own code is the other side of the proof: its logits were proved when it was exported, and without
a cache it generates as it did then. The folder is replaced as a whole, or it stays as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from metalm.config.foreign_folder import read_foreign_config
from metalm.conversion.export import PARTIAL_SUFFIX, Report, record_proof, write_model_code
from metalm.conversion.hf_config import (
    AUTO_MAP,
    FORMAT_NAME,
    FORMAT_VERSION,
    exported_encoder,
    write_image_processor,
)
from metalm.conversion.proof import (
    TOLERANCE,
    ExportedAnswer,
    ProofPrompt,
    check_generated,
    exported_answers,
)
from metalm.conversion.shipped.configuration_metalm import ENCODER_DEFAULTS
from metalm.errors import CheckpointError, ConfigError
from metalm.modalities import Media, modality_of_encoder
from metalm.progress import Phase

BEFORE_SUFFIX = ".before"
MARKER_NAME = ".metalm_refresh"
"""In folders that a refresh is at work on: what it left behind when it was killed, it may remove."""
_TEXT = "A language model reads what stands before."


def refresh_export(folder: Path, report: Report = print) -> None:
    """Put today's model code into an exported folder, in place.

    Args:
        folder: written by `convert_to_hf`, of any age.
        report: is told of progress.

    Raises:
        ConfigError: it is no exported folder, or others lie where it would be written.
        CheckpointError: the folder's own code does not run here, the new code says something else, or a write
            failed. The folder is as it was.
    """
    folder = folder.resolve()  # `.` has no name, and of a link the folder is meant
    before = folder.parent / (folder.name + BEFORE_SUFFIX)
    partial = folder.parent / (folder.name + PARTIAL_SUFFIX)
    for left in (before, partial):
        if os.path.lexists(left) and not (left / MARKER_NAME).is_file():
            raise ConfigError(f"{left} is in the way, and nothing that this tool left behind: move it")
    if before.exists() and not folder.exists():  # cut off between the two renames below
        before.replace(folder)
    config = _read_config(folder)
    try:
        for left in (before, partial):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        for marked in (partial, folder):
            (marked / MARKER_NAME).touch()
        _copy(folder, partial)
        write_model_code(partial)
        _write_configs(partial, config)
        with Phase("comparing the new code with the old"):
            lines = _prove(folder, partial)
        for line in lines:
            report(f"proof: {line}")
        record_proof(partial)
        folder.replace(before)
        partial.replace(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be refreshed: {error}") from error
    finally:
        if before.exists() and not folder.exists():
            before.replace(folder)
        with contextlib.suppress(OSError):  # where nothing may be written, nothing is left
            (folder / MARKER_NAME).unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = read_foreign_config(folder)
    except ConfigError as error:
        raise ConfigError(f"{folder} is not an exported model: {error}") from None
    if config.get("model_type") != "metalm" or config.get(FORMAT_NAME, FORMAT_VERSION) != FORMAT_VERSION:
        raise ConfigError(
            f"{path} is of a model {config.get('model_type')!r}, {FORMAT_NAME} {config.get(FORMAT_NAME)}; "
            f"expected 'metalm', {FORMAT_VERSION}"
        )
    return config


def _copy(folder: Path, partial: Path) -> None:
    """Weights are linked, for they do not change; the code of before stays behind."""

    def link_or_copy(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            try:
                os.link(source, target)
                return
            except OSError:  # a file system without links
                pass
        shutil.copy2(source, target)

    left_out = shutil.ignore_patterns("*_metalm.py", "__pycache__", MARKER_NAME)
    shutil.copytree(folder, partial, copy_function=link_or_copy, ignore=left_out, dirs_exist_ok=True)


def _write_configs(folder: Path, config: dict[str, Any]) -> None:
    """What today's code looks for beyond what was there."""
    config = config | {"auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_image_processor(folder, json.loads((folder / "processor_config.json").read_text())["image_size"])


def _prompts(folder: Path) -> dict[str, ProofPrompt]:
    """Plain text, and for each encoder a span of what it reads, by name."""
    prompts = {"text": ProofPrompt(_TEXT)}
    config = json.loads((folder / "config.json").read_text())
    for name, sizes in config["encoders"].items():
        encoder = exported_encoder(ENCODER_DEFAULTS | sizes)
        modality, text = modality_of_encoder(encoder), f"<span:{name}>{{}}</span>{_TEXT}"
        if isinstance(modality, Media):
            prompt = ProofPrompt(
                text.format(f"<{modality.name}>"), modality.name, modality.proof_file(encoder)
            )
        else:
            prompt = ProofPrompt(text.format("a"))
        prompts[f"a span of {name}"] = prompt
    return prompts


def _prove(folder: Path, refreshed: Path) -> list[str]:
    """Hold the refreshed folder against the folder; a line for each prompt.

    Raises:
        CheckpointError: they differ, or the folder's own code does not run.
    """
    prompts = _prompts(folder)
    asked = list(prompts.values())
    own = exported_answers(folder, asked, ways=("uncached",))
    new = exported_answers(refreshed, asked)
    lines = []
    for name, old, fresh in zip(prompts, own, new, strict=True):
        difference = float((old.logits - fresh.logits).abs().max())
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{name}: logits of the new code differ by {difference:.3g} (at most {TOLERANCE:g})"
            )
        for way in fresh.generated:
            _check_same(f"{name}, {way}", old, fresh.generated[way])
        lines.append(f"{name}: largest difference {difference:.2e}, {len(fresh.generated['cached'])} tokens")
    return lines


def _check_same(name: str, old: ExportedAnswer, tokens: torch.Tensor) -> None:
    """The tokens are the old ones, up to where two were tied."""
    expected = old.generated["uncached"]
    shared = int((tokens == expected).long().cumprod(dim=0).sum())
    judged = slice(0, shared + 1)
    check_generated(name, old.step_logits["uncached"][judged], tokens[judged])
