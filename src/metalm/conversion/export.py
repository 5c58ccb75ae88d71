"""A checkpoint to a Hugging Face folder, written aside and proved before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from metalm.conversion import shipped
from metalm.conversion.adapters import ADAPTER_FOLDER
from metalm.conversion.checkpoint_source import CheckpointSource, open_checkpoint
from metalm.conversion.hf_config import write_configs
from metalm.conversion.model_card import write_model_card
from metalm.conversion.proof import ProofResult, prove
from metalm.conversion.tokenizer_files import write_tokenizer
from metalm.conversion.weight_files import write_shards
from metalm.errors import ConfigError
from metalm.outputs import require_folder_place, writing
from metalm.progress import Phase

PARTIAL_SUFFIX = ".partial"
PROOF_NAME = "proof.json"
"""The proof's figures, for programs; the model card has them for people."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHARD_BYTES = 4 * 2**30

Report = Callable[[str], None]
"""Is told of progress, a line at a time."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote."""

    folder: Path
    num_parameters: int
    proof: list[ProofResult]

    @property
    def largest_difference(self) -> float | None:
        """Between the logits of the folder and of the checkpoint; None without a proof."""
        return max((result.largest_difference for result in self.proof), default=None)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: Path | None = None,
    with_proof: bool = True,
    adapter_apart: bool = False,
    average: bool = False,
    license_name: str = "unknown",
    report: Report = print,
) -> ExportResult:
    """Convert a checkpoint of any layout; peak memory is near that of its largest parameter.

    Args:
        checkpoint: a run folder (its newest checkpoint) or a step folder.
        out: must not exist.
        dtype: of the exported weights.
        max_shard_bytes: largest weight file.
        tokenizer: where the run's tokenizer is, if not where its config says.
        with_proof: compare logits before the folder gets its name.
        adapter_apart: write the weights without their adapter, and that beside them for peft.
        average: the moving average of the weights, which the run must have kept.
        license_name: for the model card, as the Hugging Face hub knows it.
        report: is told of progress.

    Raises:
        ConfigError: `out` exists or cannot be written, or the model cannot be exported. No folder is left.
        CheckpointError: the checkpoint is damaged, or the proof failed. No folder is left.
        DataError: the tokenizer is missing or wrong.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give another folder, or remove it first")
    advice = "name another folder"
    require_folder_place(out, advice)
    partial = out.with_name(f"{out.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    if os.path.lexists(partial):
        raise ConfigError(f"{partial} is in the way: move it")
    source = open_checkpoint(checkpoint, tokenizer, merges_adapters=not adapter_apart, average=average)
    report(f"checkpoint {source.folder}, step {source.reader.step}: every file is as its manifest says")
    try:
        with writing(out, advice):
            partial.mkdir(parents=True)
            result = _write(source, partial, out, dtype, max_shard_bytes, with_proof, license_name, report)
            partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        source.reader.close()
    return result


def _write(
    source: CheckpointSource,
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    with_proof: bool,
    license_name: str,
    report: Report,
) -> ExportResult:
    write_configs(source.config, source.tokenizer, dtype, folder)
    write_tokenizer(source.tokenizer, folder, source.config.data.sequence_length)
    write_model_code(folder)
    shapes = {name: shape for rule in source.rules for name, shape in rule.targets.items()}
    started = time.perf_counter()
    paths = write_shards(folder, source.tensors(), shapes, dtype, max_shard_bytes)
    seconds = time.perf_counter() - started
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    size = sum(path.stat().st_size for path in paths) / 2**20
    report(f"{count:,} parameters in {len(paths)} file(s), {size:,.1f} MiB, {seconds:.1f} s")
    if not source.merges_adapters:
        source.adapters.write(source.rules, out, folder / ADAPTER_FOLDER)
        report(
            f"the adapter lies in {out / ADAPTER_FOLDER}, for peft; the proof is of the weights without it"
        )
    with Phase("proving that the export is the checkpoint's model"):
        proof = prove(source, folder, dtype) if with_proof else []
    for result in proof:
        report(
            f"proof: {result.name}: {result.num_tokens} tokens, largest difference "
            f"{result.largest_difference:.2e} of logits up to {result.largest_logit:.1f}; "
            f"{result.num_generated} tokens generated alike with and without cache"
        )
    if proof:
        record_proof(folder)
        (folder / PROOF_NAME).write_text(json.dumps([asdict(result) for result in proof], indent=1) + "\n")
    write_model_card(
        source,
        folder,
        name=out.name,
        dtype=dtype,
        num_parameters=count,
        proof=proof,
        license_name=license_name,
    )
    return ExportResult(out, count, proof)


def record_proof(folder: Path) -> None:
    """Note in config.json which version of transformers the folder was proved on."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"proved_on_transformers": transformers.__version__}
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_model_code(folder: Path) -> None:
    """Copy the self-contained model code into an exported folder."""
    for path in sorted(Path(shipped.__file__).parent.glob("*_metalm.py")):
        shutil.copyfile(path, folder / path.name)
