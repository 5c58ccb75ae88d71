"""Text from an exported folder: one prompt, or a conversation.

The folder's weights and JSON are used, not its Python: the model code is this package's own, so that a
folder from elsewhere can run nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, set_seed
from transformers.utils import logging as transformers_logging

from metalm.config.foreign_folder import read_foreign_config
from metalm.conversion.shipped.modeling_metalm import MetaLMForConditionalGeneration
from metalm.conversion.shipped.processing_metalm import IMAGE_MARKER, MetaLMProcessor
from metalm.data.tokenizer import panics_as_errors
from metalm.errors import ConfigError, DataError, MetaLMError
from metalm.regular_files import path_exists

IMAGE_COMMAND = "/image "
FORGET_COMMAND = "/forget"


class FolderModel:
    """An exported model, ready to generate."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load a folder that `convert_to_hf` wrote.

        Raises:
            ConfigError: there is none, or it is not one.
        """
        if not path_exists(folder / "config.json"):
            raise ConfigError(f"{folder} is not an exported model: it has no config.json")
        read_foreign_config(folder)
        transformers_logging.disable_progress_bar()
        try:
            self._model: Any = _load_model(folder)
            with panics_as_errors():
                self._processor = _load_processor(folder)
        except MetaLMError:
            raise
        except Exception as error:  # of files that are not what their loaders expect: anything
            raise ConfigError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
        self._model.eval().to(device)

    def generate(
        self,
        prompt: str,
        images: Sequence[Path] = (),
        *,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        temperature: float = 0.0,
    ) -> str:
        """Continue a prompt; see the processor for its markers.

        Args:
            prompt: where it marks no image, all stand before it and the last is encoded with it, as
                `<span><image>prompt</span>`, if the encoder of images reads text, too.
            images: image files, in the order of their markers.
            max_new_tokens: at most so many; the end of the document ends it.
            num_beams: 1 for the most likely token each time.
            temperature: above 0, sample.

        Raises:
            ConfigError: prompt and images do not fit the model or each other.
            DataError: an image file is missing or is no image.
        """
        for path in images:
            if not path.is_file():
                raise DataError(f"image {path} does not exist")
        if images and not self._processor.num_images(prompt):
            prompt = IMAGE_MARKER * (len(images) - 1) + self._behind_image(prompt)
        try:
            inputs = self._processor(text=prompt, images=list(images) or None)
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
            **inputs.to(self._model.device), max_new_tokens=max_new_tokens, num_beams=num_beams, **sampling
        )
        return self._processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

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


def generate_from_folder(
    folder: Path,
    prompt: str,
    images: Sequence[Path] = (),
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
    return model.generate(
        prompt, images, max_new_tokens=max_new_tokens, num_beams=num_beams, temperature=temperature
    )


def chat_with_folder(
    folder: Path,
    lines: Iterator[str],
    say: Callable[[str], None],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device: str = "cpu",
) -> None:
    """A conversation of several turns, until `lines` ends.

    Args:
        folder: the exported model.
        lines: a turn each; `/image PATH` adds an image to the next turn, `/forget` starts anew.
        say: is told each answer, and each mistake in a turn.
        max_new_tokens: per answer.
        temperature: above 0, sample.
        device: that the model runs on.

    Raises:
        ConfigError: the folder is no exported model.
    """
    model = FolderModel(folder, device)
    messages: list[dict[str, Any]] = []
    images: list[Path] = []
    waiting: list[Path] = []
    for line in lines:
        turn = line.strip()
        if turn == FORGET_COMMAND:
            messages, images, waiting = [], [], []
            continue
        if turn.startswith(IMAGE_COMMAND):
            waiting.append(Path(turn.removeprefix(IMAGE_COMMAND).strip()))
            continue
        if not turn and not waiting:
            continue
        content = [{"type": "image"} for _ in waiting] + [{"type": "text", "text": model.escape(turn)}]
        asked = [*messages, {"role": "user", "content": content}]
        try:
            answer = model.generate(
                model.chat_prompt(asked),
                [*images, *waiting],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
        except (ConfigError, DataError) as error:
            say(f"error: {error}")
            waiting = []
            continue
        say(answer)
        messages = [*asked, {"role": "assistant", "content": model.escape(answer)}]
        images, waiting = [*images, *waiting], []


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


def _load_processor(folder: Path) -> Any:
    """AutoTokenizer would ask to run the folder's code, whatever class the tokenizer is of."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    content, _ = MetaLMProcessor.get_processor_dict(folder, local_files_only=True)
    processor = MetaLMProcessor.from_args_and_dict([tokenizer], content)
    processor.load_own_tokenizers(lambda file: folder / file)
    return processor
