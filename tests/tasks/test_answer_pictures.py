"""Pictures of what was answered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metalm.errors import ConfigError, DataError
from metalm.tasks.answer_pictures import draw_answers
from metalm.tasks.task_file import load_task

DATA = Path(__file__).parent / "data"
RIGHT = "<box> 12 11 20 19 </box>"


def answers(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(f"{json.dumps(line)}\n" for line in ({"model": "a", "split": "validation"}, *lines))
    )
    return path


def test_each_image_has_its_question_and_both_boxes(tmp_path: Path) -> None:
    def answer(key: str, said: str) -> list[object]:
        return [key, {"references": [RIGHT], "prediction": said}]

    def drawn(name: str, *lines: object) -> np.ndarray:
        return draw_answers(load_task("pointing"), DATA, answers(tmp_path / name, *lines), 4, 2)

    apart = drawn("a", answer("validation:0", "<box> 0 0 8 8 </box>"), answer("validation:1", RIGHT))
    one = drawn("b", answer("validation:0", "no"), ["validation:1", {"skipped": "undecodable"}])
    assert apart.shape[1] == one.shape[1] == 512
    assert (one[:, 256:] == 255).all()
    assert not (apart[:, 256:] == 255).all()
    scene = Image.open(DATA / "scenes/images/heldout/00/000000.png").resize(
        (256, 256), Image.Resampling.NEAREST
    )
    differs = (one[:256, :256] != np.asarray(scene)).any(axis=-1)
    rows, columns = np.nonzero(differs)
    assert (rows.min(), columns.min()) == (
        round(11 / 32 * 255),
        round(12 / 32 * 255),
    )  # the reference's alone
    assert (apart[:256, :256] != one[:256, :256]).any()


def test_what_holds_no_answers_is_refused(tmp_path: Path) -> None:
    task = load_task("pointing")
    (tmp_path / "torn.jsonl").write_text("{}\n[1")
    for path in (tmp_path / "gone.jsonl", tmp_path / "torn.jsonl", answers(tmp_path / "none.jsonl")):
        with pytest.raises(ConfigError, match="holds no answers"):
            draw_answers(task, DATA, path, 1, 1)
    text = answers(tmp_path / "text.jsonl", ["validation:0", {"references": ["a"], "prediction": "a"}])
    with pytest.raises(DataError, match="none of its answers is about an image"):
        draw_answers(load_task("rte"), DATA, text, 1, 1)
