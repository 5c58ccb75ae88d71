"""What jobs run in by default, by what the CPU says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalm.reproduction import this_machine
from metalm.reproduction.this_machine import machine, usual_precision

CPU_INFO = """\
processor	: 0
cpu family	: 25
model		: 17
model name	: Some CPU
flags		: fpu avx512f {flag} sha_ni

processor	: 1
cpu family	: 25
model		: 17
model name	: Some CPU
flags		: fpu avx512f {flag} sha_ni
"""


@pytest.fixture
def cpu_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(this_machine, "_CPU_INFO", path)
    return path


@pytest.mark.parametrize(
    ("flag", "precision"), [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512_vnni", "fp32")]
)
def test_a_cpu_gets_bf16_where_it_multiplies_it(flag: str, precision: str, cpu_info: Path) -> None:
    cpu_info.write_text(CPU_INFO.format(flag=flag))
    assert usual_precision("cpu") == precision
    assert usual_precision("gpu") == "bf16"


def test_a_machine_that_says_nothing_gets_fp32(cpu_info: Path) -> None:
    assert usual_precision("cpu") == "fp32"


def test_a_machine_is_told_by_its_processors(cpu_info: Path) -> None:
    cpu_info.write_text(CPU_INFO.format(flag="avx"))
    assert "2 x Some CPU (cpu family 25, model 17)" in machine()
