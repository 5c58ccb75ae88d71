"""Exports of models that read clips: prepared as in training, and heard as the checkpoint hears them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from conversion.conftest import Workshop
from conversion.test_pretrained_encoders import workshop_content, write_docked_run
from metalm import cli
from metalm.checkpoint.reader import CheckpointReader
from metalm.config import EncoderConfig, RunConfig
from metalm.config.load import load_resolved_config
from metalm.conversion.chat import Conversation, Shown, chat_with_folder
from metalm.conversion.chat_page import ChatServer
from metalm.conversion.export import export_checkpoint
from metalm.conversion.export_answerer import ExportAnswerer, evaluate_export
from metalm.conversion.generate import FolderModel, generate_from_folder, load_processor
from metalm.conversion.harness_prompts import HarnessPrompts, clip_files
from metalm.conversion.restore import restore_checkpoint
from metalm.conversion.shipped import audio_processing_metalm
from metalm.data.documents.chats import Medium, Turn, chat_example
from metalm.data.row import lay_out
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities import MEDIA
from metalm.parallel.launch import find_launch
from metalm.tasks.task_file import load_task
from metalm.tasks.ways import TaskSettings

ENCODERS = {"ear": "wav2vec2-masked", "mel": "ast"}
RATE = 16_000


def tone(seconds: float, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def file_of(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.fixture(scope="module")
def heard(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with an encoder of samples and one of mel frames, and its export."""
    folder = tmp_path_factory.mktemp("heard")
    run = write_docked_run(workshop, folder, ENCODERS)
    result = export_checkpoint(run, folder / "out", max_shard_bytes=50_000)
    assert {proof.name for proof in result.proof} >= {"audio and text of ear", "audio and text of mel"}
    assert result.largest_difference is not None and result.largest_difference < 3e-5
    return run, folder / "out"


@pytest.fixture(scope="module")
def encoders(heard: tuple[Path, Path]) -> dict[str, EncoderConfig]:
    run, _ = heard
    return load_resolved_config(run / "checkpoints" / "step_00000200" / "config.yaml").model.encoders


@pytest.fixture(scope="module")
def processor(heard: tuple[Path, Path]) -> Any:
    return load_processor(heard[1])


STEREO = np.stack([tone(0.03, rate=11_025), 0.3 * tone(0.03, 900, 11_025)], axis=1)
FILES: dict[str, bytes] = {
    "wav": file_of(tone(0.03)),
    "floats": file_of(tone(0.03), subtype="FLOAT"),
    "longer than is read": file_of(tone(0.9, 300), kind="FLAC"),
    "stereo of another rate": file_of(STEREO, 11_025),
    "flac": file_of(tone(0.04, rate=44_100), 44_100, "FLAC"),
    "ogg": file_of(tone(0.04, rate=48_000), 48_000, "OGG"),
}
FILES |= {
    f"a tenth of a second of {kind}": file_of(tone(0.1, rate=48_000), 48_000, kind.upper())
    for kind in sorted(set(MEDIA["audio"].formats.values()))
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_features_of_training(
    processor, encoders: dict[str, EncoderConfig], tmp_path: Path, name: str
) -> None:
    data, path = FILES[name], tmp_path / "clip"
    path.write_bytes(data)
    for encoder in ENCODERS:
        reader = MEDIA["audio"].reader(encoders[encoder])
        expected = reader.read(data).reshape(1, -1)
        for given in (data, path, str(path), {"bytes": data, "path": None}):
            inputs = processor(text=f"<span:{encoder}><audio></span>", audio=given)
            np.testing.assert_array_equal(inputs["audio_values"].numpy(), expected)
            assert (inputs["span_numbers"] == 1).sum() == reader.count_vectors(data)


def test_samples_are_heard_as_their_file_is(processor) -> None:
    integers = (tone(0.03, rate=8_000) * 32767).astype(np.int16)
    expected = processor(text="<audio>", audio=file_of(integers, 8_000))["audio_values"]
    floats = integers / 32768
    forms = [{"array": one, "sampling_rate": 8_000} for one in (integers, floats, floats.tolist())]
    forms.append({"array": floats, "sampling_rate": None})
    for given in (*forms, integers, [floats]):
        tells = isinstance(given, dict) and given["sampling_rate"] is not None
        options = {} if tells else {"sampling_rate": 8_000}
        found = processor(text="<audio>", audio=given, **options)["audio_values"]
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_neither_soundfile_nor_soxr_is_needed_for_samples_at_the_rate_of_the_encoder(
    processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_processing_metalm, "soundfile", None)
    monkeypatch.setattr(audio_processing_metalm, "soxr", None)
    assert processor(text="<audio>", audio=tone(0.02), sampling_rate=RATE)["audio_values"].shape[0] == 1
    with pytest.raises(ImportError, match="pip install soxr"):
        processor(text="<audio>", audio=tone(0.02), sampling_rate=8_000)
    with pytest.raises(ImportError, match="pip install soundfile"):
        processor(text="<audio>", audio=FILES["wav"])


CUT = file_of(tone(0.2), kind="FLAC")
CUT = CUT[: len(CUT) // 2]


def nonsense(samples: np.ndarray) -> dict[str, Any]:
    return {"array": samples, "sampling_rate": RATE}


@pytest.mark.parametrize(
    ("text", "audio", "message"),
    [
        ("<audio>", None, r"1 audio marker\(s\), 0 clip"),
        ("fox", FILES["wav"], r"0 audio marker\(s\), 1 clip"),
        ("<span>fox<audio></span>", FILES["wav"], "one clip comes first"),
        ("<span:ear><audio>fox</span>", FILES["wav"], "'ear' reads at most 0 tokens"),
        ("<span:text><audio></span>", FILES["wav"], "'text' reads no clips"),
        ("<span:ear><image></span>", None, "'ear' reads no images"),
        ("<audio>", tone(0.02), "sampling rate of a clip is not known"),
        ("<audio>", file_of(tone(0.001)), "a clip of 0.001 s is too short: its encoder reads 0.001875 s"),
        ("<audio>", b"RIFFnothing", "cannot be decoded"),
        ("<audio>", b"nothing", "no WAV, FLAC, Ogg or MP3 file"),
        ("<audio>", CUT, "cannot be decoded|ends after"),
        ("<audio>", nonsense(np.zeros((2, 900))), r"shape \[2, 900\], expected one channel"),
        ("<audio>", nonsense(np.full(900, np.nan)), "no numbers, or far beyond"),
        ("<audio>", nonsense(np.zeros(900, np.uint8)), "uint8, expected floats in -1..1 or int8 to int32"),
        ("<audio>", nonsense(np.zeros(900, np.int64)), "int64, expected floats in -1..1 or int8 to int32"),
        ("<audio>", {"array": np.zeros(900), "sampling_rate": 3}, "is 3, expected hertz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(processor, text: str, audio: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text, audio=audio)


def test_what_training_cannot_read_the_processor_refuses(
    processor, encoders: dict[str, EncoderConfig]
) -> None:
    random, reader = np.random.default_rng(4), MEDIA["audio"].reader(encoders["ear"])
    for whole in FILES.values():
        for _ in range(10):
            data = bytearray(whole[: random.integers(4, len(whole) + 1)])
            data[random.integers(len(data))] = random.integers(256)
            try:
                expected = reader.read(bytes(data)).reshape(1, -1)
            except BadSample:
                with pytest.raises(ValueError):
                    processor(text="<span:ear><audio></span>", audio=bytes(data))
            else:
                found = processor(text="<span:ear><audio></span>", audio=bytes(data))["audio_values"]
                np.testing.assert_array_equal(found.numpy(), expected)


PROMPTS = {
    "short": ("the <audio> fox", [FILES["wav"]]),
    "two": ("<span:mel><audio></span>the<span:ear><audio></span> dog", [FILES["flac"], FILES["ogg"]]),
    "none": ("the <span>lazy dog</span>", []),
}


def test_batched_prompts_give_the_tokens_of_each_alone(heard: tuple[Path, Path], tmp_path: Path) -> None:
    """Through a processor that was saved again; with beams, too."""
    _, out = heard
    model = AutoModelForMultimodalLM.from_pretrained(out, trust_remote_code=True).eval()
    AutoProcessor.from_pretrained(out, trust_remote_code=True).save_pretrained(tmp_path / "again")
    processor = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    pad = processor.tokenizer.pad_token_id
    for options in ({}, {"num_beams": 2}):

        def tokens_of(inputs: Any, options: dict[str, int] = options) -> list[list[int]]:
            found = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
            return [[t for t in row if t != pad] for row in found[:, inputs["input_ids"].shape[1] :].tolist()]

        alone = [tokens_of(processor(text=text, audio=clips or None))[0] for text, clips in PROMPTS.values()]
        texts, clips = zip(*PROMPTS.values(), strict=True)
        assert tokens_of(processor(text=list(texts), audio=list(clips))) == alone


def test_what_is_heard_changes_the_answer_and_needs_its_spans(heard: tuple[Path, Path], processor) -> None:
    model = FolderModel(heard[1]).model
    for encoder in ENCODERS:
        text = f"a <span:{encoder}><audio></span> b"
        inputs = [
            processor(text=text, audio=file_of(tone(0.03, hertz), subtype="FLOAT")) for hertz in (300, 2_000)
        ]
        with torch.no_grad():
            one, other = (model(**one).logits[0, -1] for one in inputs)
        assert (one - other).abs().max() > 1e-3
    lonely = {name: inputs[0][name] for name in ("input_ids", "audio_values")}
    with pytest.raises(ValueError, match="audio_values need span_input_ids"):
        model(**lonely)
    with pytest.raises(ValueError, match=r"1 clip\(s\), audio_values has 2"):
        model(**{**inputs[0], "audio_values": inputs[0]["audio_values"].repeat(2, 1)})


def test_compiled_encoders_hear_the_same(heard: tuple[Path, Path], processor) -> None:
    model = FolderModel(heard[1]).model.model
    text, clips = PROMPTS["two"]
    inputs = processor(text=text, audio=clips)
    spans = model.spans(**{name: value for name, value in inputs.items() if name.startswith("span")})
    hidden, values = model.embed_tokens(inputs["input_ids"]), inputs["audio_values"]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model.encoders.dock(hidden, spans, None, values)
        compiled = torch.compile(model.encoders.dock, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden, spans, None, values), expected, atol=1e-5, rtol=1e-5)
    assert (expected != hidden).any()
    torch._dynamo.reset()


def test_the_snippet_of_the_card_runs(
    heard: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (heard[1] / "README.md").read_text()
    assert "pipeline_tag: audio-text-to-text" in card
    assert "soundfile (for files) and soxr (for other sampling rates) for clips" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(heard[1].parent)
    exec(snippet, {})
    assert 'processor(text="<audio>", audio=clip, sampling_rate=16000)' in snippet
    assert capsys.readouterr().out.count("\n") >= 2


def test_there_and_back_is_the_same_checkpoint(heard: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = heard
    before = CheckpointReader(run / "checkpoints" / "step_00000200", verify=True)
    content = workshop_content(run) | {"run": {"name": "back", "folder": str(tmp_path)}}
    after = CheckpointReader(restore_checkpoint(out, RunConfig.model_validate(content)), verify=True)
    assert before.parameters("encoders") == after.parameters("encoders")
    for name in before.parameters("encoders"):
        if "token_embedding" not in name:  # rows that pad the vocabulary stay behind
            own, back = before.read("encoders", name), after.read("encoders", name)
            torch.testing.assert_close(own, back, atol=0, rtol=0)
    content["model"]["encoders"]["mel"]["pretrained"]["processor"]["mean"] = -1.0
    content["run"]["name"] = "other"
    with pytest.raises(ConfigError, match="encoders: "):
        restore_checkpoint(out, RunConfig.model_validate(content))


def test_messages_with_clips_are_prompts_with_clips(processor, tmp_path: Path) -> None:
    (tmp_path / "clip.flac").write_bytes(FILES["flac"])
    for clip in (
        {"audio": str(tmp_path / "clip.flac")},
        {"path": str(tmp_path / "clip.flac")},
        {"audio": {"bytes": FILES["flac"]}},
    ):
        content = [{"type": "text", "text": "fox"}, {"type": "audio", **clip}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "dog"}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == "<audio><span>fox</span>dog"
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        same = processor(text=prompt, audio=FILES["flac"])
        for key in same:
            assert torch.equal(torch.as_tensor(inputs[key]), same[key])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    (tmp_path / "clip.flac").write_bytes(FILES["flac"])
    return tmp_path / "clip.flac"


def test_a_conversation_has_clips(heard: tuple[Path, Path], clip: Path) -> None:
    """Each stands where it was when there are several."""
    folder, said = heard[1], []
    turns = [f"/clip {clip}", "the fox", f"/clip {clip}", f"/clip {clip}", "dog", "/clip nowhere.wav", "over"]
    chat_with_folder(folder, iter(turns), said.append, max_new_tokens=4)
    first, second, mistake = said
    prompt = "<audio><span>the fox</span>"
    assert first == generate_from_folder(folder, prompt, clips=[clip], max_new_tokens=4)
    prompt = f"{prompt}{first}\n\n<audio><audio><span>dog</span>"
    assert second == generate_from_folder(folder, prompt, clips=[clip] * 3, max_new_tokens=4)
    assert mistake == "error: clip nowhere.wav does not exist"


def test_a_clip_that_is_dropped_on_the_page_is_heard(heard: tuple[Path, Path], clip: Path) -> None:
    model, pieces = FolderModel(heard[1]), []
    expected = Conversation(model).ask("the fox", [Shown("audio", clip)], max_new_tokens=4)
    with ChatServer(Conversation(model), 0, max_new_tokens=4) as server:
        server.ask("the fox", [("audio", clip.read_bytes())], pieces.append)
    assert "".join(pieces) == expected


def test_a_prompt_without_markers_stands_behind_its_clips(
    heard: tuple[Path, Path], workshop: Workshop, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = heard[1]
    expected = generate_from_folder(folder, "<audio>the fox", clips=[clip], max_new_tokens=4)
    assert generate_from_folder(folder, "the fox", clips=[clip], max_new_tokens=4) == expected
    asked = ["generate", str(folder), "--prompt", "the fox", "--audio", str(clip), "--max-new-tokens", "4"]
    cli._run_command(asked)
    assert capsys.readouterr().out == expected + "\n"
    clip.write_bytes(b"RIFF but no sound")
    with pytest.raises(DataError, match=r"clip .*/clip.flac cannot be read: a clip cannot be decoded"):
        generate_from_folder(folder, "the fox", clips=[clip])
    with pytest.raises(ConfigError, match="was given, but the model reads no clips"):
        generate_from_folder(workshop.exported("llama"), "the fox", clips=[clip])


def test_the_harness_and_training_lay_a_chat_with_clips_out_alike(heard: tuple[Path, Path]) -> None:
    answerer = ExportAnswerer(heard[1], batch_size=2, device="cpu")
    prompts = HarnessPrompts(answerer, encoded=True)
    samples = tone(0.03, rate=8_000).astype(np.float64)
    given = [{"array": samples, "sampling_rate": 8_000}, FILES["ogg"]]
    messages = [
        {"role": "user", "content": "<audio>the fox"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "over <audio>"},
    ]
    document = prompts.prompt(prompts.chat(messages), {"audio": clip_files(given)}).decoded(prompts.read)
    asked = (("the fox", file_of(samples, 8_000, subtype="FLOAT")), ("over", FILES["ogg"]))
    turns = [Turn("user", (Medium("audio", data), text)) for text, data in asked]
    example = chat_example([turns[0], Turn("assistant", ("yes",)), turns[1], Turn("assistant", ("no",))])
    maker = answerer.maker(None, "split")
    expected = maker.make(example.prompt(), is_open=True).document.decoded(maker.read)
    one, other = (lay_out([found], answerer.tokenizer) for found in (document, expected))
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_array_equal(one.spans["ear"].media, other.spans["ear"].media)
    (likelihood,) = answerer.scored(
        [prompts.pair("<audio>", " fox", {"audio": clip_files(given[:1])})], prompts.read
    )
    assert likelihood is not None and likelihood.likelihood.total < 0
    with pytest.raises(DataError, match="sampling rate of a clip is not known"):
        clip_files([samples])


TASK = """
task: tones
cluster: sounds
data:
  folder: tones
  reader: jsonl
  files: {train: train.jsonl, validation: tones.jsonl}
  fields: {file: file, height: height}
  media: {sound: "{file}"}
options: {low: low, high: high}
answer: height
templates:
  - id: heard
    span: [{audio: sound}, "low or high?"]
    plain: ["TARGET:"]
    target: " {answer}"
icl:
  span: [{audio: sound}]
  plain: ["It is"]
  target: " {answer}"
  normalise: none
metrics: [exact_match]
"""


def test_a_task_of_clips_is_evaluated_through_the_export(heard: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "data" / "tones"
    data.mkdir(parents=True)
    lines = []
    for number, height in enumerate(("low", "high", "low")):
        (data / f"{number}.wav").write_bytes(file_of(tone(0.03, {"low": 250, "high": 3_000}[height])))
        lines.append(json.dumps({"file": f"{number}.wav", "height": height}))
    (data / "train.jsonl").write_text("\n".join(lines))
    (data / "tones.jsonl").write_text("\n".join([*lines, '{"file": "no.wav", "height": "low"}']))
    (tmp_path / "tones.yaml").write_text(TASK)
    evaluate_export(
        heard[1],
        [load_task(str(tmp_path / "tones.yaml"))],
        TaskSettings(data=tmp_path / "data", shots=(1,), overflow="split"),
        tmp_path / "out",
        batch_size=2,
        device="cpu",
        launch=find_launch({}),
    )
    (file,) = (tmp_path / "out" / "answers").iterdir()
    answers = dict(json.loads(line) for line in file.read_text().splitlines()[1:])
    low, high, same, missing = (answers[f"validation:{number}"] for number in range(4))
    assert missing["skipped"] == "missing_media"
    assert low["references"] == ["low"] and high["references"] == ["high"]
    assert abs(low["scores"][0] - high["scores"][0]) > 1e-4
    assert len(same["scores"]) == 2
