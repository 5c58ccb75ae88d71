"""Text from an exported folder.

The folder's weights and JSON are used, not its Python: the model code is this package's own, so that a
folder from elsewhere can run nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from metalm.config.foreign_folder import read_foreign_config
from metalm.conversion.peers import device_of
from metalm.conversion.shipped.modeling_metalm import MetaLMForConditionalGeneration
from metalm.conversion.shipped.processing_metalm import (
    AUDIO_MARKER,
    IMAGE_MARKER,
    MetaLMProcessor,
)
from metalm.data.storage.shard_scan import MAX_MEMBER_BYTES
from metalm.data.tokenizer import panics_as_errors
from metalm.errors import BadSample, ConfigError, DataError, MetaLMError
from metalm.kernels.cpu_matmul import multiply_by_onednn
from metalm.modalities.image import decode_image
from metalm.parallel.launch import find_launch
from metalm.progress import Phase
from metalm.regular_files import path_exists

Hear = Callable[[str], None]
"""Is told the pieces of an answer as they are made."""


class FolderModel:
    """An exported model, ready to generate."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load a folder that `convert_to_hf` wrote.

        Raises:
            ConfigError: there is none, it is not one, or there is no such device.
        """
        if not path_exists(folder / "config.json"):
            raise ConfigError(f"{folder} is not an exported model: it has no config.json")
        read_foreign_config(folder)
        device = device_of(device, find_launch({}))
        transformers_logging.disable_progress_bar()
        multiply_by_onednn()
        try:
            with Phase(f"loading the model of {folder}"):
                self._model: Any = _load_model(folder)
                with panics_as_errors():
                    self._processor = load_processor(folder)
        except MetaLMError:
            raise
        except Exception as error:  # of files that are not what their loaders expect: anything
            raise ConfigError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
        self._model.eval().to(device)

    @property
    def model(self) -> Any:
        """`MetaLMForConditionalGeneration`."""
        return self._model

    @property
    def processor(self) -> Any:
        """`MetaLMProcessor`."""
        return self._processor

    def generate(
        self,
        prompt: str,
        images: Sequence[Path] = (),
        clips: Sequence[Path] = (),
        *,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        temperature: float = 0.0,
        hear: Hear | None = None,
    ) -> str:
        """Continue a prompt; see the processor for its markers.

        Args:
            prompt: where it marks no image, all stand before it and the last is encoded with it, as
                `<span><image>prompt</span>`, if the encoder of images reads text, too. Where it marks no
                clip, all stand before that.
            images: image files, in the order of their markers.
            clips: audio files, as above.
            max_new_tokens: at most so many; the end of the document ends it.
            num_beams: 1 for the most likely token each time.
            temperature: above 0, sample.
            hear: is told the answer in pieces, too; with one beam alone.

        Raises:
            ConfigError: prompt, images and clips do not fit the model or each other.
            DataError: a file is missing, or is no image or clip.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ConfigError("the prompt is no Unicode text: give it in UTF-8")
        contents = [read_image(path) for path in images]
        sounds = [self._read_clip(path) for path in clips]
        is_marked = self._processor.num_clips(prompt) > 0
        if images and not self._processor.num_images(prompt):
            prompt = IMAGE_MARKER * (len(images) - 1) + self._behind_image(prompt)
        if not is_marked:
            prompt = AUDIO_MARKER * len(clips) + prompt
        try:
            inputs = self._processor(text=prompt, images=contents or None, audio=sounds or None)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except Exception as error:  # Pillow's plug-ins raise what their parsers do
            if not images:
                raise
            raise DataError(f"an image cannot be read: {error}") from error
        sampling = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        tokens = self._model.generate(
            **inputs.to(self._model.device),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            streamer=None if hear is None else _Streamer(self._processor.tokenizer, hear),
            **sampling,
        )
        return self._processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _read_clip(self, path: Path) -> bytes:
        """The bytes of an audio file that the model can hear.

        Raises:
            ConfigError: it hears none.
            DataError: there is no such file.
        """
        if self._processor.audio_encoder is None:
            raise ConfigError(f"clip {path} was given, but the model reads no clips")
        content = _read_file(path, "clip")
        try:
            self._processor.prepare_clip(content)
        except ValueError as error:
            raise DataError(f"clip {path} cannot be read: {error}") from None
        except ImportError as error:
            raise ConfigError(str(error)) from None
        return content

    def _behind_image(self, prompt: str) -> str:
        encoder = self._processor.encoders.get(self._processor.image_encoder, {})
        if encoder.get("max_text_positions") == 0:
            return IMAGE_MARKER + prompt
        return f"<span>{IMAGE_MARKER}{prompt}</span>"

    def escape(self, text: str) -> str:
        """The text as a prompt in which nothing of it is a marker."""
        return self._processor.escape(text)

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str:
        """The prompt of a conversation: each turn of the user is encoded, answers are plain text."""
        return self._processor.apply_chat_template(messages, add_generation_prompt=True)


class _Streamer(TextStreamer):
    """Tells the pieces of an answer to someone; half a word or half a character waits."""

    def __init__(self, tokenizer: Any, hear: Hear) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hear = hear

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._hear(text)


def _read_file(path: Path, noun: str) -> bytes:
    """The bytes of an image or a clip.

    Raises:
        DataError: there is no such file.
    """
    try:
        if not path.is_file():
            raise DataError(f"{noun} {path} does not exist")
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise DataError(f"{noun} {path} is larger than {MAX_MEMBER_BYTES >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a path that no file can have is a ValueError
        raise DataError(f"{noun} {path} cannot be read: {error}") from None


def read_image(path: Path) -> bytes:
    """The bytes of an image file that can be decoded.

    Raises:
        DataError: there is none.
    """
    content = _read_file(path, "image")
    try:
        decode_image(content)
    except BadSample as bad:
        raise DataError(f"image {path} cannot be read: {bad.cause} (JPEG, PNG and WebP can)") from None
    return content


def generate_from_folder(
    folder: Path,
    prompt: str,
    images: Sequence[Path] = (),
    clips: Sequence[Path] = (),
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """What an exported model says to one prompt; arguments and errors as `FolderModel.generate`."""
    model = FolderModel(folder, device)
    set_seed(seed)
    with Phase("generating"):
        return model.generate(
            prompt, images, clips, max_new_tokens=max_new_tokens, num_beams=num_beams, temperature=temperature
        )


def load_processor(folder: Path) -> Any:
    """The processor of an exported folder.

    AutoTokenizer would ask to run the folder's code, whatever class the tokenizer is of.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    content, _ = MetaLMProcessor.get_processor_dict(folder, local_files_only=True)
    processor = MetaLMProcessor.from_args_and_dict([tokenizer], content)
    processor.load_own_tokenizers(lambda file: folder / file)
    return processor


def _load_model(folder: Path) -> Any:
    """With every weight: transformers would draw those that are not there."""
    loaded: Any = MetaLMForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, report[kind])):
            raise ConfigError(
                f"{folder} has {len(names)} weight(s) that are {kind.split('_')[0]}: {names[0]}"
            )
    return model
