"""Which nodes `metalm preflight` refuses, on real ranks that stand for two nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from held_port import hold_port, port_of
from metalm.errors import EXIT_DONE, EXIT_NODE
from metalm.operations.node_report import Gpu, NodeReport
from metalm.operations.preflight_limits import Limits, find_problems
from metalm.planning.calibration import overlay
from metalm.planning.devices import find_device
from metalm.planning.shipped_calibration import shipped_calibration

RANK = [sys.executable, "-m", "metalm", "preflight"]
QUICK = ("--mebibytes", "4", "--deadline-s", "120", "--write-mib-s", "0")


def environment_of(rank: int, nodes: Sequence[str], port: int) -> dict[str, str]:
    """One rank per node."""
    return {
        **os.environ,
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(len(nodes)),
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": nodes[rank],
        "METALM_NODES": " ".join(nodes),
        "OMP_NUM_THREADS": "1",
    }


def run_nodes(
    run_folder: Path, *options: str, nodes: dict[str, dict[str, str]], absent: str = ""
) -> tuple[set[int], str]:
    """One rank per node, each with its own environment: the ranks' exit codes, and rank 0's output."""
    command = [*RANK, str(run_folder), *QUICK, "--bad-nodes", str(run_folder.parent / "bad"), *options]
    processes = []
    with hold_port() as held:
        for rank, (node, own) in enumerate(nodes.items()):
            if node == absent:
                continue
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**environment_of(rank, list(nodes), port_of(held)), **own},
                )
            )
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    return {process.returncode for process in processes}, outputs[0]


def bad_nodes(run_folder: Path) -> dict[str, str]:
    lines = (run_folder.parent / "bad").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def test_fit_nodes_pass_with_all_figures(tmp_path: Path) -> None:
    links = tmp_path / "links.json"
    codes, output = run_nodes(tmp_path / "run", "--calibration", str(links), nodes={"a": {}, "b": {}})
    assert codes == {EXIT_DONE}, output
    found = overlay(shipped_calibration(find_device("h100")), links).link(2, spans_nodes=True)
    assert (found.ranks, found.spans_nodes) == (2, True)
    assert 1e-6 < found.latency_s < 1
    across_nodes = []
    for node in ("a", "b"):
        (line,) = [line.split() for line in output.splitlines() if line.split()[:1] == [node]]
        name, gpus, _, _, free_gib, write_mib_s, clock_s, within, across, verdict = line
        assert (name, gpus, within, verdict) == (node, "0", "-", "ok")
        assert min(float(free_gib), float(write_mib_s), float(across)) > 0
        assert abs(float(clock_s)) < 0.5
        across_nodes.append(float(across))
    assert found.bytes_per_s / 2**30 == pytest.approx(min(across_nodes), abs=0.01)
    assert "torch 2." in output
    assert not (tmp_path / "bad").exists()
    assert not list((tmp_path / "run").iterdir())


def test_a_job_of_one_rank_passes(tmp_path: Path) -> None:
    codes, output = run_nodes(tmp_path / "run", nodes={"a": {}})
    assert codes == {EXIT_DONE}, output
    assert not (tmp_path / "bad").exists()


def test_a_node_with_another_torch_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "other/torch-9.9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    codes, output = run_nodes(tmp_path / "run", nodes={"a": {}, "b": {"PYTHONPATH": str(package.parent)}})
    assert codes == {EXIT_NODE}, output
    assert bad_nodes(tmp_path / "run").keys() == {"b"}
    assert bad_nodes(tmp_path / "run")["b"].startswith("torch is 9.9.9, elsewhere 2.")
    assert "torch is 9.9.9" in output


def test_a_node_with_a_gpu_short_is_refused(tmp_path: Path) -> None:
    nodes = {}
    for node, count, memory in (("a", 2, "[N/A], [N/A]"), ("b", 1, "81559, 4")):
        smi = tmp_path / node / "nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(f"#!/bin/sh\nyes 'NVIDIA X, {memory}, 41, 580.1' | head -n {count}\n")
        smi.chmod(0o755)
        nodes[node] = {"PATH": f"{smi.parent}:{os.environ['PATH']}"}
    codes, output = run_nodes(tmp_path / "run", "--gpus", "2", nodes=nodes)
    assert codes == {EXIT_NODE}, output
    assert bad_nodes(tmp_path / "run") == {"b": "1 GPUs, expected 2"}


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    codes, output = run_nodes(tmp_path / "run", "--deadline-s", "12", nodes={"a": {}, "b": {}}, absent="b")
    assert codes == {EXIT_NODE}, output
    assert bad_nodes(tmp_path / "run") == {"b": "1 of its ranks do not report"}


def test_a_rank_whose_first_node_goes_away_ends(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first_node:
        _, port = first_node.getsockname()
        rank = subprocess.Popen(
            [*RANK, str(tmp_path / "run"), *QUICK, "--deadline-s", "5"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment_of(1, ["a", "b"], port),
        )
        first_node.accept()[0].close()
    _, output = rank.communicate(timeout=60)
    assert rank.returncode == EXIT_NODE
    assert "preflight: b does not meet the other nodes" in output


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount).returncode != 0:
        pytest.skip("cannot mount a small disk: needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_refused(full_disk: Path) -> None:
    codes, output = run_nodes(full_disk / "run", nodes={"a": {}})
    assert codes == {EXIT_NODE}, output
    assert f"cannot write 64 MiB to {full_disk}/run: No space left on device" in output
    assert not list((full_disk / "run").iterdir())


def test_limits_name_the_node_and_the_figure() -> None:
    gpu = Gpu(total_gib=80.0, used_gib=0.1, celsius=40.0)
    fit = NodeReport("fit", (gpu,), {"driver": "580"}, (), 100.0, 900.0, 0.0, 200.0, 40.0)
    hot = NodeReport("hot", (Gpu(80.0, 30.0, 97.0),), {"driver": "570"}, (), 0.5, 2.0, 7.0, 100.0, 1.0)
    limits = Limits(gpus=1, gpu_gib=79, within_gib_s=150, across_gib_s=20)
    problems = find_problems([fit, hot, fit], limits)
    assert problems.keys() == {"hot"}
    assert problems["hot"] == [
        "30.0 GiB of GPU 0 are in use before the run",
        "GPU 0 has 97 degrees, at most 90",
        "0.50 GiB are free at the run folder, expected 1",
        "2.00 MiB/s are written at the run folder, expected 5",
        "100.00 GiB/s all-reduce within the node, expected 150",
        "1.00 GiB/s all-reduce with its neighbours, expected 20",
        "its clock is +7.00 s off, at most 1",
        "driver is 570, elsewhere 580",
    ]


def test_a_process_that_may_open_few_files_is_refused() -> None:
    few, enough = NodeReport("few", open_files=1024), NodeReport("enough", open_files=4096)
    problems = find_problems([few, enough], Limits())
    assert problems == {"few": ["a process may have 1024 files open (ulimit -Hn), expected 4096"]}


@pytest.mark.parametrize(
    ("clocks", "wrong"),
    [
        ((0.0, 5.0, 5.1, 5.0), ["n0"]),
        ((0.0, 0.2, -4.0, 0.1), ["n2"]),
        ((0.0, -5.0), ["n1"]),  # of two, nobody knows: the job's batch script has run on the first
        ((0.0, 5.0, None, 5.0), ["n0"]),
    ],
)
def test_clocks_are_held_against_those_of_most_nodes(
    clocks: tuple[float | None, ...], wrong: list[str]
) -> None:
    reports = [NodeReport(f"n{number}", clock_s=clock) for number, clock in enumerate(clocks)]
    assert list(find_problems(reports, Limits())) == wrong
