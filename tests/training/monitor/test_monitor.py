from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metalm.config import load_config
from metalm.run_metrics import read_metrics
from metalm.training.monitor.monitor import Monitor
from metalm.training.timing import PartTimer

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_shows(
    rank: int, topology: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml")
    (tmp_path / "logs").mkdir()
    timer = PartTimer(torch.device("cpu"))
    monitor = Monitor(config, replace(topology, rank=rank), tmp_path, 0, timer)
    monitor.say("hello")
    monitor.write_text("config", "a text")
    monitor.write_evaluation(3, {"text": 2.5})
    with monitor.apart("save", 4):
        pass
    monitor.close()
    shown = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    if rank:
        assert (shown, capsys.readouterr().out) == (set(), "")
        return
    assert shown == {"logs", "tensorboard"}
    assert capsys.readouterr().out.splitlines() == ["hello", "held out at step 3: text 2.5000"]
    assert [sorted(entry.keys() - {"step", "time"}) for entry in read_metrics(tmp_path)] == [
        ["run/restarts"],
        ["held_out/text"],
        ["time/apart/save"],
    ]
