"""transformers' own tests of models and processors, unmodified, pass on an exported folder.

They are no part of its wheel. TRANSFORMERS_SOURCE may name its source at the installed version (a checkout
has the tests of generation, too); without it, pip fetches the source distribution once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

from conversion.conftest import Workshop
from distributed.ranks import run_command

PROGRAM = Path(__file__).parent / "programs" / "transformers_own_tests.py"
OPTIONAL = ("parameterized", "accelerate")


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> Path:
    for package in OPTIONAL:
        pytest.importorskip(package)
    if given := os.environ.get("TRANSFORMERS_SOURCE"):
        return Path(given)
    name = f"transformers-{transformers.__version__}"
    folder = Path(request.config.cache.mkdir("transformers_source"))
    if not (folder / name).is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--retries",
            "0",
        ]
        command += ["--no-build-isolation", f"transformers=={transformers.__version__}", "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"pip cannot fetch the source of {name}: {done.stderr.strip().splitlines()[-1]}")
        unpack = ["tar", "--extract", "--file", folder / f"{name}.tar.gz", "--directory", folder]
        subprocess.run(unpack, check=True)
    return folder / name


@pytest.mark.parametrize("kind", ["deepnorm", "mixed"])
def test_they_pass(workshop: Workshop, source: Path, tmp_path: Path, kind: str) -> None:
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", str(PROGRAM), "--rootdir", str(PROGRAM.parent)]
    command += ["-c", "/dev/null", "-p", "no:cacheprovider", "-q", "-rf", f"--junitxml={report}"]
    code, output = run_command(
        command,
        timeout_s=280,
        EXPORTED=str(workshop.exported(kind)),
        TRANSFORMERS_SOURCE=str(source),
        HF_HUB_OFFLINE="1",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert code == 0, output[-6000:]
    cases = ElementTree.parse(report).findall(".//testcase")
    passed = [case.get("name") for case in cases if not list(case)]
    assert len(passed) > 80
    generation = (
        "test_greedy_generate",
        "test_generate_continue_from_past_key_values",
        "test_generate_compile_model_forward_fullgraph",
    )
    is_checkout = (source / "tests" / "generation" / "test_utils.py").is_file()
    for name in (
        *(generation if is_checkout else ()),
        "test_save_load",
        "test_resize_tokens_embeddings",
        "test_tied_weights_keys",
        "test_inputs_embeds",
        "test_training_gradient_checkpointing",
        "test_processor_from_and_save_pretrained",
    ):
        assert name in passed, output[-6000:]
