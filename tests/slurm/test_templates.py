"""The templates around training, each submitted as its first lines say."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.ranks import run_program
from slurm.virtual_cluster import VirtualCluster, wait_until

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SETTINGS = {"METALM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.xdist_group("templates")  # they look for files that a job leaves in the repository


@pytest.fixture(autouse=True)
def _in_repository(cluster: VirtualCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(REPOSITORY)
    yield
    cluster.clear()


def contents(folder: Path) -> dict[str, bytes]:
    """The shards and the index of a folder."""
    return {path.name: path.read_bytes() for path in [*folder.glob("*.tar"), *folder.glob("index*")]}


def test_an_array_prepares_what_one_process_does(
    cluster: VirtualCluster, pipeline: Path, tmp_path: Path
) -> None:
    lines = (pipeline.parent / "raw/text/train.jsonl").read_text().splitlines(keepends=True)
    inputs = []
    for number in range(4):
        inputs.append(tmp_path / f"{number}.jsonl")
        inputs[-1].write_text("".join(lines[number::4]))
    tokenizer = ("--tokenizer", str(pipeline.parent / "tokenizer"))
    words = ("tools/prepare_text.py", str(tmp_path / "many"), *tokenizer, "--", *map(str, inputs))
    log = f"--output={tmp_path}/%a.log"
    cluster.submit("--array=0-2", log, "slurm/prepare.sbatch", *words, environment=SETTINGS)
    alone = ["tools/prepare_text.py", *map(str, inputs), *tokenizer, "--out", str(tmp_path / "one")]
    code, output = run_program(alone, timeout_s=150)
    assert code == 0, output
    wait_until(lambda: not cluster.command("squeue", "--noheader"), "the tasks have ended", timeout_s=150)
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert len(one) >= 4 + 2
    assert many == one
    shutil.rmtree(tmp_path / "many/parts/00001")  # as if its task had failed, which is submitted again alone
    (tmp_path / "many/index.json").unlink()
    job = cluster.submit("--array=1", log, "slurm/prepare.sbatch", *words, environment=SETTINGS)
    assert cluster.wait_for(job, ENDED, timeout_s=150)["JobState"] == "COMPLETED"
    assert "input 0:" not in (tmp_path / "1.log").read_text()
    assert contents(tmp_path / "many") == one


def test_evaluate_says_its_ranks_code(cluster: VirtualCluster, pipeline: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    words = (f"--output={log}", "slurm/evaluate.sbatch", str(pipeline), "training.step=3")
    settings = {**SETTINGS, "METALM_RANKS_PER_NODE": "1", "METALM_ROOT": str(REPOSITORY)}
    job = cluster.submit("--nodes=2", f"--chdir={tmp_path}", *words, environment=settings)
    facts = cluster.wait_for(job, ENDED, timeout_s=150)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "64:0")
    assert "did you mean 'steps'?" in log.read_text()
    assert not list(tmp_path.glob(".exit_codes.*"))


def test_a_run_is_evaluated_on_two_nodes_and_converted_after_it(
    cluster: VirtualCluster, pipeline: Path, tmp_path: Path
) -> None:
    """Both jobs are submitted at once, as the template of the second says."""
    text = f"data.evaluation={{text: {{path: {pipeline.parent}/text, readers: {{text: text}}}}}}"
    overrides = (str(pipeline), "run.name=whole", "training.steps=3", "checkpoint.every_steps=3", text)
    for action, *more in (("train", "parallel.tensor=1"), ("evaluate", "parallel.tensor=1", "--samples=1")):
        code, output = run_program(["-m", "metalm", action, *overrides, *more], timeout_s=120)
        assert code == 0, output
    run = pipeline.parent / "runs/whole"
    alone = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    settings = {**SETTINGS, "METALM_RANKS_PER_NODE": "1", "METALM_LAUNCHER": "srun"}
    log, exported = f"--output={tmp_path}/%j.log", tmp_path / "exported"
    evaluating = cluster.submit(
        "--nodes=2", log, "slurm/evaluate.sbatch", *overrides, "--samples=1", environment=settings
    )
    after = (f"--dependency=afterok:{evaluating}", "--kill-on-invalid-dep=yes", "--cpus-per-task=1")
    converting = cluster.submit(
        *after, log, "slurm/convert.sbatch", str(run), str(exported), environment=SETTINGS
    )
    for job in (evaluating, converting):
        facts = cluster.wait_for(job, ENDED, timeout_s=120)
        assert facts["JobState"] == "COMPLETED", (tmp_path / f"{job}.log").read_text()
    together = json.loads((run / "evaluation.json").read_text())
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert (exported / "model.safetensors").exists()
    assert (exported / "proof.json").exists()


def test_convert_says_what_is_missing(cluster: VirtualCluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    words = (f"--output={log}", "slurm/convert.sbatch", str(tmp_path), str(tmp_path / "out"))
    job = cluster.submit(*words, environment=SETTINGS)
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "65:0")
    assert "neither a checkpoint nor a run folder" in log.read_text()


def test_tensorboard_is_reached_on_its_node_alone(cluster: VirtualCluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    words = (f"--output={log}", "slurm/tensorboard.sbatch", str(tmp_path))
    job = cluster.submit(*words, environment=SETTINGS)
    wait_until(lambda: log.exists() and "Press CTRL+C" in log.read_text(), "it listens", timeout_s=120)
    (port,) = re.findall(r"ssh -N -L 6006:localhost:(\d+)", log.read_text())
    program = (
        "import sys, urllib.request as r; print(r.urlopen(sys.argv[1] + '/data/logdir').read().decode())"
    )
    fetch = (sys.executable, "-c", program)
    address = REPOSITORY / f"tensorboard-{job}.address"
    assert address.stat().st_mode & 0o777 == 0o600
    (secret,) = re.findall(r"^http://localhost:6006/([0-9a-f]{32})/#custom_scalars$", address.read_text())
    node = cluster.facts(job)["NodeList"]
    assert str(tmp_path) in cluster.on_node(node, *fetch, f"http://localhost:{port}/{secret}")
    with pytest.raises(AssertionError, match="404"):
        cluster.on_node(node, *fetch, f"http://localhost:{port}")
    assert not cluster.command(*fetch, f"http://{node}:{port}/{secret}", check=False)
    assert secret not in log.read_text()
    assert secret not in cluster.on_node(node, "ps", "-ef")
    cluster.command("scancel", job)
    wait_until(lambda: not address.exists(), "the address is gone", timeout_s=60)
