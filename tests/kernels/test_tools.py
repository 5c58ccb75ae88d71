"""The tools over the kernels run, and the picture shows what the mask says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metalm.kernels import IntervalMask, benchmark
from metalm.kernels.mask_picture import FULL, PARTIAL_HIDDEN, PARTIAL_VISIBLE, SKIPPED, mask_image

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_picture_colours_blocks_by_their_state() -> None:
    image = mask_image(IntervalMask.causal(8), 0, 4, 4)
    triangle = torch.ones(4, 4, dtype=torch.bool).tril()[..., None]
    partial = torch.where(triangle, torch.tensor(PARTIAL_VISIBLE), torch.tensor(PARTIAL_HIDDEN))
    for block in (image[:4, :4], image[4:, 4:]):
        assert torch.equal(block.long(), partial)
    assert (image[4:, :4] == torch.tensor(FULL)).all()
    assert (image[:4, 4:] == torch.tensor(SKIPPED)).all()


def test_draw_mask_writes_a_png(tmp_path: Path) -> None:
    png = tmp_path / "mask.png"
    out = run_tool("draw_mask.py", str(png), "--row", "30", "20", "5:12", "--row", "50", "--kind", "encoder")
    assert "2 rows of 50 queries" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_bench_attention_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    peers = ("interval", "sdpa dense", "sdpa per document")
    arguments = ("--lengths", "128", "--repetitions", "1", "--threads", "1", "--out", str(path))
    out = run_tool(
        "bench_attention.py", *arguments, "--device", "cpu", "--dtype", "float32", "--peers", *peers
    )
    results = json.loads(path.read_text())["results"]
    # Five masks, forward and with backward.
    assert len(results) == 5 * 2 * len(peers)
    assert {record["peer"] for record in results} == set(peers)
    assert all(record["ms"] > 0 and record["times_ours"] > 0 for record in results)
    assert "semi-causal packed" in out


def test_a_peer_that_cannot_run_is_told_and_our_own_failure_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    case = benchmark.Case(kind="causal", length=64, batch_size=1, num_heads=1, head_size=32, num_documents=1)

    def measured(*peers: str, max_dense_length: int = 64) -> list[dict[str, Any]]:
        return benchmark.measure(
            case,
            device=torch.device("cpu"),
            dtype=torch.float32,
            backward=False,
            peers=peers,
            repetitions=1,
            max_dense_length=max_dense_length,
        )

    ours, dense = measured("interval", "sdpa dense", max_dense_length=32)
    assert ours["ms"] > 0
    assert dense["not_run"] == "dense masks are measured up to length 32"
    with pytest.raises(ValueError, match="unknown peer 'other'"):
        measured("other")

    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(benchmark, "interval_attention", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        measured("interval", "sdpa dense")
