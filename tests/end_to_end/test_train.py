"""Runs as operators start, stop and resume them, on real ranks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed.ranks import Ranks, run_command, run_program, wait_until
from metalm.checkpoint.names import list_checkpoints
from metalm.run_metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def train(data: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    """The words of `python` that train the tiny run in `runs/name`."""
    arguments = ["train", str(data / "tiny.yaml"), f"run.folder={runs}", f"run.name={name}"]
    return ["-m", "metalm", *arguments, *overrides]


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(run) if "loss/all" in entry}


def measured(run: Path) -> dict[tuple[int, str], float]:
    """Losses and fingerprints by step and name."""
    names = ("loss/", "held_out/", "data/fingerprint")
    lines = read_metrics(run)
    return {(line["step"], name): line[name] for line in lines for name in line if name.startswith(names)}


def shown_texts(run: Path) -> dict[str, bytes]:
    """Samples in TensorBoard."""
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = [tag for tag in board.Tags()["tensors"] if tag.startswith(("text/", "captions/"))]
    return {tag: board.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in tags}


@pytest.fixture(scope="module")
def whole_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Eight steps on two tensor-parallel ranks, not interrupted."""
    runs = tmp_path_factory.mktemp("whole")
    words = train(tiny_data, runs, "whole", "parallel.tensor=2")
    code, output = run_command([*TORCHRUN, *words], timeout_s=200)
    assert code == 0, output
    return runs / "whole", output


def test_the_run_folder_holds_what_the_design_says(whole_run: tuple[Path, str]) -> None:
    run, output = whole_run
    assert [folder.name for folder in list_checkpoints(run / "checkpoints")] == [
        "step_00000004",
        "step_00000008",
    ]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert (run / "config.yaml").is_file()
    assert {path.name for path in (run / "logs").glob("rank_*.log")} == {"rank_00000.log", "rank_00001.log"}
    assert "step 8/8  loss" in output
    assert "interval attention runs on the tiled backend" in (run / "logs" / "rank_00000.log").read_text()


def test_tensorboard_shows_what_operators_watch(whole_run: tuple[Path, str]) -> None:
    board = EventAccumulator(str(whole_run[0] / "tensorboard"))
    board.Reload()
    scalars = set(board.Tags()["scalars"])
    assert scalars >= {
        *("loss/all", "loss/text", "loss/scenes", "optimizer/learning_rate", "optimizer/gradient_norm"),
        *("optimizer/gradient_norm_decoder", "optimizer/gradient_norm_encoders", "speed/tokens_per_second"),
        *("speed/rows_per_second", "speed/data_wait_share", "speed/model_tflops_per_rank"),
        *("memory/resident_gib", "held_out/text", "held_out/scenes", "held_out/scenes/wrong_image"),
        *(f"data/encoder_imbalance/{name}" for name in ("text", "image")),
        *(f"data/encoder_imbalance_over_ranks/{name}" for name in ("text", "image", "text_in_lane_order")),
    }
    assert [event.step for event in board.Scalars("loss/all")] == list(range(1, 9))
    masks = {"mask/decoder", "mask/text", "mask/image"}
    assert set(board.Tags()["images"]) == {"scenes/0", "scenes/1"} | masks
    assert {tag.removesuffix("/text_summary") for tag in board.Tags()["tensors"]} >= {
        "config",
        "text/0",
        "text/1",
    }


def test_a_resumed_run_repeats_the_losses_bit_for_bit(
    tiny_data: Path, whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    words = train(tiny_data, tmp_path, "resumed", "parallel.tensor=2", "checkpoint.every_steps=3")
    process = subprocess.Popen(
        [*TORCHRUN, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run, deadline = tmp_path / "resumed", time.monotonic() + 200
    while not (run / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (run / "stop").touch()
    output, _ = process.communicate(timeout=100)
    stopped_at = max(losses(run))
    assert "stopped as asked after step" in output, output
    assert "exitcode  : 75" in output
    assert not (run / "stop").exists()
    assert 3 <= stopped_at < 8
    code, output = run_program(words, 2, timeout_s=200)
    assert code == 0, output
    assert f"step {stopped_at} of 8, resumed" in output
    assert losses(run) == losses(whole_run[0])


def test_another_topology_gives_the_same_losses(
    tiny_data: Path, whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    arguments = ("training.micro_batch_size=2", "deepspeed.decoder=deepspeed_configs/decoder_zero2.json")
    code, output = run_program(train(tiny_data, tmp_path, "dp2", *arguments), 2, timeout_s=200)
    assert code == 0, output
    assert losses(tmp_path / "dp2") == pytest.approx(losses(whole_run[0]), abs=1e-5)


def test_a_checkpoint_goes_on_under_another_topology(
    tiny_data: Path, whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    moved = train(tiny_data, tmp_path, "moved", "data.workers=0")
    (tmp_path / "moved" / "checkpoints").mkdir(parents=True)
    source = whole_run[0] / "checkpoints" / "step_00000004"
    (tmp_path / "moved" / "checkpoints" / source.name).symlink_to(source)
    code, output = run_program([*moved, "monitor.evaluate_every_steps=4"], timeout_s=200)
    assert code == 0, output
    found = losses(tmp_path / "moved")
    assert sorted(found) == [5, 6, 7, 8]
    evaluated = [entry["step"] for entry in read_metrics(tmp_path / "moved") if "held_out/text" in entry]
    assert evaluated == [4, 8]  # as if it had been killed before it could evaluate what it had saved
    assert found == pytest.approx({step: losses(whole_run[0])[step] for step in found}, abs=1e-5)


def test_a_run_goes_on_with_its_rows_cut_over_context_ranks(
    tiny_data: Path, whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    """Lanes, evaluation and samples, too: what is held out is the same, and so is what is generated."""
    words = train(tiny_data, tmp_path, "cut", "parallel={tensor: 1, context: 2}")
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    source = whole_run[0] / "checkpoints" / "step_00000004"
    (tmp_path / "cut" / "checkpoints" / source.name).symlink_to(source)
    code, output = run_program(words, 2, timeout_s=200)
    assert code == 0, output
    assert "2 rank(s): decoder tensor 1 x context 2 x data 1" in output
    found, expected = measured(tmp_path / "cut"), measured(whole_run[0])
    expected = {key: value for key, value in expected.items() if key[0] > 4}
    assert {name for _, name in expected} >= {
        "loss/scenes",
        "held_out/scenes/wrong_image",
        "data/fingerprint",
    }
    assert found == pytest.approx(expected, abs=1e-5)
    assert shown_texts(tmp_path / "cut") == shown_texts(whole_run[0])


def test_a_damaged_checkpoint_is_named_and_passed_over(
    tiny_data: Path, whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(whole_run[0] / "checkpoints", tmp_path / "hurt" / "checkpoints")
    victim = tmp_path / "hurt" / "checkpoints" / "step_00000008" / "decoder" / "rank_00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    code, output = run_program(train(tiny_data, tmp_path, "hurt", "training.steps=5"), timeout_s=200)
    assert code == 0, output
    assert "step_00000008 is passed over: decoder/rank_00000.safetensors has" in output
    assert "step 4 of 5, resumed" in output


def test_a_signal_stops_a_run_after_saving(tiny_data: Path, tmp_path: Path) -> None:
    ranks = Ranks(train(tiny_data, tmp_path, "signalled", "training.steps=2000"))
    run = tmp_path / "signalled"
    wait_until(lambda: losses(run), ranks, timeout_s=120)
    ranks.processes[0].send_signal(signal.SIGTERM)
    assert ranks.wait(timeout_s=60) == [75], ranks.output()
    (folder,) = list_checkpoints(run / "checkpoints")
    assert json.loads((folder / "state.json").read_text())["step"] == max(losses(run))


def test_what_was_trained_before_the_data_failed_is_saved(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data / "text", tmp_path / "text")
    words = (f"data.sources.text.path={tmp_path / 'text'}", "checkpoint.every_steps=2000", "data.workers=0")
    ranks = Ranks(train(tiny_data, tmp_path, "hurt", "training.steps=2000", *words))
    run = tmp_path / "hurt"
    wait_until(lambda: len(losses(run)) > 1, ranks, timeout_s=120)
    for shard in (tmp_path / "text").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert ranks.wait(timeout_s=60) == [65], ranks.output()
    (folder,) = list_checkpoints(run / "checkpoints")
    assert json.loads((folder / "state.json").read_text())["step"] == max(losses(run))


def test_a_run_leaves_as_a_hugging_face_model_and_speaks(
    tiny_data: Path, whole_run: tuple[Path, str], tmp_path: Path
) -> None:
    tool = str(REPOSITORY / "tools" / "convert_to_hf.py")
    code, output = run_program([tool, str(whole_run[0]), str(tmp_path / "hf")], timeout_s=200)
    assert code == 0, output
    proof = json.loads((tmp_path / "hf" / "proof.json").read_text())
    assert len(proof) == 3
    assert all(case["largest_difference"] < 1e-4 for case in proof)
    further = [str(tiny_data / "tiny.yaml"), f"run.folder={tmp_path}", "run.name=further", "training.steps=3"]
    tool = str(REPOSITORY / "tools" / "convert_from_hf.py")
    code, output = run_program([tool, str(tmp_path / "hf"), *further], timeout_s=200)
    assert code == 0, output
    code, output = run_program(["-m", "metalm", "train", *further], timeout_s=200)
    assert code == 0, output
    assert sorted(losses(tmp_path / "further")) == [1, 2, 3]
    assert losses(tmp_path / "further")[1] < losses(whole_run[0])[1]  # it goes on from what was learnt
    image = next((tiny_data / "raw" / "scenes" / "images").rglob("*.png"))
    speak = [sys.executable, "-m", "metalm", "generate", str(tmp_path / "hf"), "--image", str(image)]
    code, output = run_command([*speak, "--prompt", "a", "--max-new-tokens", "4"], timeout_s=200)
    assert code == 0, output
    code, output = run_program([*speak[1:-1], str(tmp_path / "absent.png")], timeout_s=200)
    assert (code, "absent.png does not exist" in output) == (65, True), output
    assert "Traceback" not in output


def test_evaluation_writes_its_figures(tiny_data: Path, whole_run: tuple[Path, str]) -> None:
    run = whole_run[0]
    words = ["-m", "metalm", "evaluate", str(tiny_data / "tiny.yaml"), "--samples", "3"]
    code, output = run_program([*words, f"run.folder={run.parent}", "run.name=whole"], timeout_s=120)
    assert code == 0, output
    found = json.loads((run / "evaluation.json").read_text())
    assert found["step"] == 8
    assert found["losses"].keys() == {"text", "scenes", "scenes/wrong_image"}
    last = [entry for entry in read_metrics(run) if "held_out/text" in entry][-1]
    assert found["losses"]["scenes"] == pytest.approx(last["held_out/scenes"], abs=1e-5)
    assert len((run / "samples_scenes.jsonl").read_text().splitlines()) == 3


def test_the_dry_run_prints_the_plan_and_starts_nothing(tiny_data: Path, tmp_path: Path) -> None:
    words = train(tiny_data, tmp_path, "dry")
    code, output = run_command([sys.executable, *words, "--dry-run", "--ranks", "4"], timeout_s=60)
    assert code == 0, output
    assert "4: tensor 1 x data 4" in output
    assert "4 rows = 4 data-parallel ranks x 1 micro-batch(es) x 1 row(s)" in output
    assert not (tmp_path / "dry").exists()
