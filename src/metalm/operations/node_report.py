"""What a node says of itself before a run: GPUs, versions, the disk at the run folder. Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import metalm
from metalm.parallel.launch import raise_open_files

PACKAGES = (
    *("torch", "deepspeed", "megatron-core", "transformers", "webdataset", "numpy", "triton"),
    *("soundfile", "soxr", "torchaudio"),  # the features of clips depend on them
)
_WRITTEN_MIB = 64
_QUERY = "--query-gpu=name,memory.total,memory.used,temperature.gpu,driver_version"


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells of it."""

    total_gib: float | None
    used_gib: float | None
    celsius: float | None
    """None, all of them, where the driver does not tell: of memory that is the host's, for one."""


@dataclass(frozen=True)
class NodeReport:
    """One node. What is measured together with others is None until then, and where it cannot be measured."""

    node: str
    gpus: tuple[Gpu, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    """What must be equal on all nodes: packages, Python, driver, GPU model, metalm's own code."""
    faults: tuple[str, ...] = ()
    """What could not be done at all."""
    free_gib: float | None = None
    write_mib_s: float | None = None
    clock_s: float | None = None
    """Ahead of the first node's clock."""
    within_gib_s: float | None = None
    across_gib_s: float | None = None
    open_files: int | None = None
    """That a process may have."""

    def to_json(self) -> str:
        """For `from_json` on another node."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeReport:
        """The report that `to_json` wrote."""
        entries = json.loads(text)
        gpus = tuple(Gpu(**gpu) for gpu in entries.pop("gpus"))
        return cls(**entries | {"gpus": gpus, "faults": tuple(entries["faults"])})


def node_name() -> str:
    """The name by which Slurm knows this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def report_node(run_folder: Path) -> NodeReport:
    """Look at this node."""
    faults: list[str] = []
    gpus, gpu_versions = _gpus(faults)
    free_gib, write_mib_s = _disk(run_folder, faults)
    versions = {"python": sys.version.split()[0], "metalm's code": _code_digest(), **gpu_versions}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return NodeReport(
        node_name(), gpus, versions, tuple(faults), free_gib, write_mib_s, open_files=raise_open_files()
    )


def _gpus(faults: list[str]) -> tuple[tuple[Gpu, ...], dict[str, str]]:
    """GPUs and their driver and model, from nvidia-smi where there is one."""
    if not shutil.which("nvidia-smi"):
        return (), {}
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        faults.append(f"nvidia-smi fails: {error}")
        return (), {}
    gpus, models, drivers = [], set(), set()
    for line in found.stdout.splitlines():
        name, total, used, celsius, driver = (part.strip() for part in line.split(","))
        gpus.append(Gpu(_number(total, 1024), _number(used, 1024), _number(celsius)))
        models.add(name)
        drivers.add(driver)
    return tuple(gpus), {"GPU": " and ".join(sorted(models)), "driver": " and ".join(sorted(drivers))}


def _number(word: str, unit: float = 1.0) -> float | None:
    try:
        return float(word) / unit
    except ValueError:  # [N/A]
        return None


def _disk(run_folder: Path, faults: list[str]) -> tuple[float | None, float | None]:
    """Free GiB at a folder, and MiB/s of writing a file there down to the disk."""
    trial = run_folder / f".preflight.{node_name()}.{os.getpid()}"
    block = os.urandom(1 << 20)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        free_gib = shutil.disk_usage(run_folder).free / 2**30
        began = time.perf_counter()
        with trial.open("wb") as handle:
            for _ in range(_WRITTEN_MIB):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        return free_gib, _WRITTEN_MIB / (time.perf_counter() - began)
    except OSError as error:
        faults.append(f"cannot write {_WRITTEN_MIB} MiB to {run_folder}: {error.strerror}")
        return None, None
    finally:
        trial.unlink(missing_ok=True)


def _code_digest() -> str:
    """Of metalm's own files, so that a node with an older copy shows."""
    digest = hashlib.sha256()
    for package in metalm.__path__:
        for path in sorted(Path(package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
