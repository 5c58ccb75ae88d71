"""Text from an exported folder for the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conversion.cases import pictures
from conversion.conftest import Workshop
from metalm import cli
from metalm.conversion.chat import chat_with_folder
from metalm.conversion.generate import FolderModel, generate_from_folder
from metalm.errors import ConfigError, DataError

KIND = "deepnorm"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(np.asarray(pictures()[1])).save(path)
    return path


def test_it_says_what_the_training_model_says(workshop: Workshop, image: Path, tokenizer) -> None:
    """The prompt is encoded with the image, as `<span><image>prompt</span>`."""
    model = workshop.training_model(KIND)
    expected = tokenizer.decode(model.greedy["image and prefix"])
    prompt = "<span><image>the fox</span> jumps over the dog"
    assert generate_from_folder(workshop.exported(KIND), prompt, [image]) == expected


def test_images_without_markers_are_encoded_with_the_prompt(workshop: Workshop, image: Path) -> None:
    folder = workshop.exported(KIND)
    for prompt, images, marked in (
        ("the fox", [image], "<span><image>the fox</span>"),
        ("the fox", [image, image], "<image><span><image>the fox</span>"),
        (r"\<image> the fox", [image], r"<span><image>\<image> the fox</span>"),
    ):
        expected = generate_from_folder(folder, marked, images, max_new_tokens=4)
        assert generate_from_folder(folder, prompt, images, max_new_tokens=4) == expected
    with pytest.raises(ConfigError, match=r"1 image marker\(s\), 2 image"):
        generate_from_folder(folder, "<image> the fox", [image, image])


def test_a_conversation_keeps_its_turns(workshop: Workshop, image: Path) -> None:
    folder, said = workshop.exported(KIND), []
    turns = [f"/image {image}", "the fox", "over", "/image nowhere.png", "dog", "/forget", "over"]
    chat_with_folder(folder, iter(turns), said.append, max_new_tokens=4)
    first, second, mistake, alone = said
    prompt = "<span><image>the fox</span>"
    assert first == generate_from_folder(folder, prompt, [image], max_new_tokens=4)
    prompt = f"{prompt}{first}\n\n<span>over</span>"
    assert second == generate_from_folder(folder, prompt, [image], max_new_tokens=4)
    assert mistake == "error: image nowhere.png does not exist"
    assert alone == generate_from_folder(folder, "<span>over</span>", max_new_tokens=4)


def test_pictures_of_what_answers_point_at_are_written(
    workshop: Workshop, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["a <box> 0 0 8 8 </box>", "none", "<box> 1", "<box> 4 4 9 9 </box>"])
    monkeypatch.setattr(FolderModel, "generate", lambda *_, **__: next(answers))
    turns = [f"/image {image}", "the fox", "over", "over", "over"]
    said: list[str] = []
    folder = tmp_path / "new" / "pictures"
    chat_with_folder(workshop.exported(KIND), iter(turns), said.append, pictures=folder)
    paths = [folder / "1.png", folder / "2.png"]
    assert [line for line in said if line.startswith("picture")] == [f"picture: {path}" for path in paths]
    first, second = (np.asarray(Image.open(path)) for path in paths)
    assert first.shape == second.shape
    assert (first != second).any()
    (tmp_path / "file").touch()
    answers, said = iter(["<box> 0 0 8 8 </box>"]), []
    chat_with_folder(workshop.exported(KIND), iter(turns[:2]), said.append, pictures=tmp_path / "file")
    assert said[-1] == f"error: {tmp_path / 'file' / '1.png'} cannot be written: File exists"


def test_markers_that_a_user_types_are_text(workshop: Workshop) -> None:
    folder, said = workshop.exported(KIND), []
    chat_with_folder(folder, iter(["<image>fox"]), said.append, max_new_tokens=4)
    prompt = r"<span>\<image>fox</span>"
    assert said == [generate_from_folder(folder, prompt, max_new_tokens=4)]


def test_answers_are_heard_as_they_are_made(workshop: Workshop) -> None:
    folder = workshop.exported(KIND)
    said: list[str] = []
    heard: list[str] = []
    chat_with_folder(folder, iter(["the fox", "over"]), said.append, hear=heard.append, max_new_tokens=8)
    whole: list[str] = []
    chat_with_folder(folder, iter(["the fox", "over"]), whole.append, max_new_tokens=8)
    assert said == ["", ""]
    assert "".join(heard) == "".join(whole)
    assert len(heard) > 2


def test_a_mistake_in_a_turn_leaves_the_conversation_as_it_was(
    workshop: Workshop, tmp_path: Path, image: Path
) -> None:
    folder = workshop.exported(KIND)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:60])
    Image.fromarray(np.asarray(pictures()[1])).save(tmp_path / "image.gif")
    mistakes = [f"/image {tmp_path / name}" for name in ("text.png", "half.png", "image.gif", "gone.png", "")]
    mistakes.append("/image \0")
    turns = ["the fox"]
    for mistake in mistakes:
        turns += [mistake, "dog"]
    turns += ["fox " * 40, "over"]
    said: list[str] = []
    chat_with_folder(folder, iter(turns), said.append, max_new_tokens=4)
    answers = [one for one in said if not one.startswith("error: ")]
    assert len(said) == 2 + len(mistakes) + 1
    assert "encoder 'text' reads at most 12 tokens" in said[-2]
    expected: list[str] = []
    chat_with_folder(folder, iter(["the fox", "over"]), expected.append, max_new_tokens=4)
    assert answers == expected


def test_paths_are_taken_as_terminals_paste_them_and_texts_only_as_unicode(
    workshop: Workshop, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = workshop.exported(KIND), list[str]()
    named = tmp_path / "a picture.png"
    named.write_bytes(image.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    pasted = str(named).replace(" ", "\\ ")
    for path in (named, f'"{named}"', f"'{named}'", "~/a picture.png", pasted):
        chat_with_folder(folder, iter([f"/image {path}", "fox"]), said.append, max_new_tokens=4)
    assert len(said) == 5 and len(set(said)) == 1 and not said[0].startswith("error")
    turns = ["/image", "fox", "caf\udce9", "/image ~nosuchuser/x.png", "fox", "fox"]
    said.clear()
    chat_with_folder(folder, iter(turns), said.append, max_new_tokens=4)
    assert said[0] == "error: /image needs the path of a file behind it"
    assert said[2] == "error: the prompt is no Unicode text: give it in UTF-8"
    assert said[3] == "error: image ~nosuchuser/x.png does not exist"
    assert not said[4].startswith("error")


def test_no_code_of_the_folder_runs(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.exported(KIND), tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*.py"):
        path.write_text("raise SystemExit('the code of the folder ran')\n")
    generate_from_folder(tmp_path / "copy", "the fox", max_new_tokens=2)


def test_mistakes_are_one_message(workshop: Workshop, tmp_path: Path, image: Path) -> None:
    folder = workshop.exported(KIND)
    with pytest.raises(ConfigError, match="is not an exported model"):
        generate_from_folder(tmp_path, "the fox")
    with pytest.raises(DataError, match="does not exist"):
        generate_from_folder(folder, "the fox", [tmp_path / "none.png"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="cannot be read"):
        generate_from_folder(folder, "the fox", [tmp_path / "text.png"])
    with Image.open(image) as opened:
        opened.convert("P").save(tmp_path / "palette.png")
    content = (tmp_path / "palette.png").read_bytes()
    (tmp_path / "palette.png").write_bytes(content.replace(b"PLTE", b"PLTX"))
    with pytest.raises(DataError, match="cannot be read"):
        generate_from_folder(folder, "the fox", [tmp_path / "palette.png"])
    with pytest.raises(ConfigError, match="no encoder 'nobody'"):
        generate_from_folder(folder, "<span:nobody>x</span>")


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "mps", "xpu"])
def test_a_device_that_is_not_there_is_refused(workshop: Workshop, device: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {device}"):
        generate_from_folder(workshop.exported(KIND), "the fox", device=device)


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("generate", "--max-new-tokens", "0", "'0' is no number above 0"),
        ("generate", "--num-beams", "0", "'0' is no number above 0"),
        ("generate", "--seed", "-1", "'-1' is no number from 0 on"),
        ("generate", "--seed", str(2**32), "4294967296 is above 4,294,967,295"),
        (
            "generate",
            "--temperature",
            "1e-300",
            "'1e-300': give 0 for the likeliest tokens, or 0.001 or more",
        ),
        ("chat", "--temperature", "nan", "'nan': give 0 for the likeliest tokens, or 0.001 or more"),
        ("chat", "--port", "70000", "70000 is above 65,535"),
    ],
)
def test_numbers_of_no_use_are_refused(
    command: str,
    option: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["metalm", command, "exported", option, value])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 64
    assert f"argument {option}: {message}" in capsys.readouterr().err
