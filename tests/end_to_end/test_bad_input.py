"""What a user sees who gets something wrong: one message, the right exit code, no trace, nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.ranks import run_command
from held_port import hold_port, port_of
from metalm.shown_url import shown_override

REPOSITORY = Path(__file__).parents[2]


def metalm(*arguments: str) -> tuple[int, str]:
    return run_command([sys.executable, "-m", "metalm", *arguments], timeout_s=120)


@pytest.fixture
def pipeline(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run that would work, into an empty folder."""
    monkeypatch.chdir(REPOSITORY)
    return [str(tiny_data / "tiny.yaml"), f"run.folder={tmp_path / 'runs'}"]


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["training.step=3"], 64, "training.step: unknown key; did you mean 'steps'?"),
        (["parallel.tensor=2"], 64, "1 rank(s) cannot be split into tensor-parallel groups of 2"),
        (["model.decoder.num_heads=3"], 64, "is not divisible by num_heads = 3"),
        (["model.vocab_size=256"], 64, "model.vocab_size is 256, but the tokenizer"),
        (["data.tokenizer=absent"], 65, "absent"),
        (["data.sources.text.path=absent"], 65, "absent"),
        (["data.sources.text.readers.image=image"], 64, "has a reader of image, but"),
        (["data.sources.scenes.readers=null"], 64, "must name an encoder of images, such as {image: image}"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_message_and_a_code(
    pipeline: list[str], tmp_path: Path, overrides: list[str], code: int, message: str
) -> None:
    found, output = metalm("train", *pipeline, *overrides)
    assert (found, message in output) == (code, True), output
    assert "Traceback" not in output
    assert output.count("error:") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.tokenizer=absent", 65, "absent"),
        ("data.evaluation.text.path=absent", 65, "absent"),
        ("model.vocab_size=256", 64, "model.vocab_size is 256, but the tokenizer"),
        (
            "initialize.decoder=absent",
            65,
            "initialize.decoder: absent is neither a checkpoint nor a run folder",
        ),
    ],
)
def test_the_dry_run_refuses_what_the_start_would(
    pipeline: list[str], tmp_path: Path, override: str, code: int, message: str
) -> None:
    found, output = metalm("train", *pipeline, override, "--dry-run")
    assert (found, message in output) == (code, True), output
    assert f"run folder: {tmp_path}/runs/" in output  # the batch script notes the refusal there
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_says_what_it_does_not_check(pipeline: list[str]) -> None:
    absent = ("data.tokenizer=absent", "data.sources.text.path=absent", "initialize.decoder=absent")
    code, output = metalm("train", *pipeline, *absent, "--dry-run", "--without-data")
    assert (code, "what is read: not checked" in output) == (0, True), output


@pytest.mark.parametrize(
    ("words", "code"), [(["data.tokenizer=absent"], 65), (["parallel.tensor=2"], 64), (["--dry-run"], 0)]
)
def test_an_answer_without_training_imports_no_torch(
    pipeline: list[str], words: list[str], code: int
) -> None:
    program = (
        "import sys; sys.argv = ['metalm', 'train', *sys.argv[1:]]\n"
        "from metalm.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'deepspeed', 'megatron', 'transformers'} & sys.modules.keys()"
    )
    assert run_command([sys.executable, "-c", program, *pipeline, *words], timeout_s=120)[0] == code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dry-run", "--ranks", "0"), "'0' is no number above 0"),
        (("--dry-run", "--ranks", "-2"), "'-2' is no number above 0"),
        (("--ranks", "2"), "--ranks is for --dry-run"),
        (("--without-data",), "--without-data is for --dry-run"),
    ],
)
def test_options_of_the_dry_run_that_mean_nothing_are_refused(words: tuple[str, ...], message: str) -> None:
    code, output = metalm("train", "demo.yaml", *words)
    assert (code, message in output) == (64, True), output


def test_a_missing_pipeline() -> None:
    code, output = metalm("train", "absent.yaml")
    assert code == 64  # and nothing behind what it says while it starts
    assert output.splitlines()[-1] == "metalm: error: config absent.yaml does not exist"


@pytest.mark.parametrize("words", [("train",), ("evaluate", "run.name=x")])
def test_no_pipeline(words: tuple[str, ...]) -> None:
    code, output = metalm(*words)
    assert code == 64
    assert f"metalm {words[0]} needs a pipeline file" in output and "demo.yaml" in output


def test_an_unknown_command() -> None:
    code, output = metalm("trian")
    assert code == 64
    assert "invalid choice: 'trian'" in output


def test_shards_of_another_tokenizer(pipeline: list[str], tiny_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    shutil.copytree(tiny_data / "tokenizer", other)
    with (other / "tokenizer.json").open("a") as handle:
        handle.write("\n")
    code, output = metalm("train", *pipeline, f"data.tokenizer={other}")
    assert code == 65, output
    assert "were written with the tokenizer" in output
    assert not (tmp_path / "runs").exists()


def test_an_empty_source(pipeline: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, output = metalm("train", *pipeline, f"data.sources.text.path={tmp_path / 'empty'}")
    assert code == 65, output
    assert "Traceback" not in output


def test_a_layout_that_does_not_fit_is_said_once_by_many_ranks(pipeline: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "3",
        "-m",
        "metalm",
        "train",
    ]
    code, output = run_command([*command, *pipeline, "parallel.tensor=2"], timeout_s=120)
    assert code != 0
    assert output.count("3 rank(s) cannot be split into tensor-parallel groups of 2") == 1
    assert "exitcode  : 64" in output
    assert not (tmp_path / "runs").exists()


def test_what_the_second_node_lacks_ends_both_with_its_message(pipeline: list[str], tmp_path: Path) -> None:
    """Each node's first rank reads for it; here the tokenizer is not on the second one."""
    command = [sys.executable, "-m", "metalm", "train", *pipeline]
    processes = []
    with hold_port() as held:
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_of(held))}
        for rank in range(2):
            environment = {**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            lacks = ["data.tokenizer=absent"] if rank else []
            processes.append(
                subprocess.Popen([*command, *lacks], env=environment, stderr=subprocess.PIPE, text=True)
            )
        first, second = (process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [65, 65], (first, second)
    assert "metalm: error: no tokenizer at absent" in first
    assert "rank 1: metalm: error: no tokenizer at absent" in second
    assert not (tmp_path / "runs").exists()


def test_no_secret_of_an_override_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    secret = "data.sources.text.url=https://user:hunter2@host/{shard}?signature=hunter2"
    mapping = "data.sources.more={path: a, url: 'pipe:KEY=hunter2 cat {shard}'}"
    words = ("train", "pipelines/demo.yaml", "--dry-run", "--without-data", "--ranks", "2")
    code, output = metalm(*words, secret, mapping)
    assert code == 0, output
    assert "hunter2" not in output
    assert "data.sources.text.url=https://host/{shard}" in output


def test_an_override_that_is_no_address_is_shown_as_none() -> None:
    assert shown_override("data.sources.text.url=http://[hunter2/{shard}") == "data.sources.text.url=..."
