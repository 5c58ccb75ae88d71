"""lm-evaluation-harness's model class `metalm`: an exported folder whose contexts go through its encoders.

The harness finds it by the entry point `lm_eval.models`; releases that look for none are started by
`tools/evaluate_harness.py`. What is read by whom stands in `harness_prompts.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from metalm.config.model_schema import TEXT
from metalm.conversion.export_answerer import ExportAnswerer, Sampling
from metalm.conversion.harness_prompts import Files, HarnessPrompts, clip_files, fit, image_files
from metalm.document import Document, Part
from metalm.errors import ConfigError, DataError
from metalm.tasks.task_file import Decode

Answer = TypeVar("Answer")
_log = logging.getLogger("lm_eval.metalm")  # below the harness's, or nothing would be seen

BATCHES_AT_ONCE = 4
"""Of requests: several may have one context, which is then read once."""
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The first that is given counts, as in the harness."""
_USUAL_NEW_TOKENS = 256
"""The harness's."""
_OPTIONS = (*_NEW_TOKENS, "until", "do_sample", "temperature", "top_p", "top_k", "num_beams")


class Generation(NamedTuple):
    """How a request is to be answered."""

    decode: Decode
    until: tuple[str, ...]
    sampling: Sampling | None


@register_model("metalm")
class HarnessModel(LM):
    """`lm_eval --model metalm --model_args pretrained=FOLDER`; one process."""

    MULTIMODAL = True

    def __init__(
        self,
        pretrained: str,
        encoded: bool = True,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        """Load an exported folder.

        Args:
            pretrained: the folder.
            encoded: contexts are read by encoders; false: all text is plain, as with `--model hf`.
            batch_size: requests at once.
            device: default: a GPU, if there is one.
            dtype: float32, bfloat16 or float16; auto: as the weights are stored.
            trust_remote_code: of the harness, for data sets; the folder's own code never runs.
            others: are refused.

        Raises:
            ConfigError: an argument is wrong, or as `ExportAnswerer`.
            DataError: as `ExportAnswerer`.
        """
        super().__init__()
        if others:
            raise ConfigError(
                f"model_args has {', '.join(sorted(others))}: metalm takes pretrained, encoded, batch_size, "
                "device and dtype"
            )
        if not isinstance(encoded, bool):
            raise ConfigError(f"encoded is {encoded!r}: it is true or false")
        if (num_processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ConfigError(
                f"metalm was started in {num_processes} processes and runs in one: leave out the launcher"
            )
        self._folder, self._encoded = Path(pretrained), encoded
        self._batch_size = _positive(batch_size)
        self._answerer = ExportAnswerer(
            self._folder, batch_size=self._batch_size, device=_device(device), dtype=_dtype(dtype)
        )
        self._prompts = HarnessPrompts(self._answerer, encoded=encoded)
        self._num_cut_contexts = 0
        if encoded and not self._answerer.processor.encoders:
            _log.info("%s has no encoders: the decoder reads contexts itself", pretrained)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: the sum of its log-likelihoods, and whether it is greedy.

        A context too long for the model loses its beginning, and is counted.

        Raises:
            ConfigError: as `HarnessPrompts.pair` and `fit`.
            DataError: as `HarnessPrompts.pair`, or an image cannot be decoded.
        """

        def answer(asked: Sequence[Instance]) -> list[tuple[float, bool]]:
            pairs = [self._prompts.pair(one.args[0], one.args[1], self._files(one.args[2:])) for one in asked]
            return self._scored([self._fitted(pair, self._answerer.longest) for pair in pairs])

        answers = self._in_batches("loglikelihood", requests, answer, disable_tqdm)
        self._tell_cuts()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, which are plain and behind one `<s>`; long ones in the harness's windows.

        Raises:
            ConfigError: a request has images.
            DataError: as `HarnessPrompts.text`.
        """

        def answer(asked: Sequence[Instance]) -> list[float]:
            windows = [self._windows(one) for one in asked]
            totals = iter(self._scored([one for of_text in windows for one in of_text]))
            return [sum(next(totals)[0] for _ in of_text) for of_text in windows]

        return self._in_batches("loglikelihood_rolling", requests, answer, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """How the model goes on from each context, up to one of the texts of `until` or `</d>`.

        Raises:
            ConfigError: an option of generation is not known or does not fit the model; as
                `HarnessPrompts.prompt`.
            DataError: as `HarnessPrompts.prompt`, or an image cannot be decoded.
        """
        ways: dict[Generation, list[int]] = {}
        for number, request in enumerate(requests):
            ways.setdefault(self._generation(request.args[1]), []).append(number)
        found: dict[int, str] = {}
        for way, numbers in ways.items():
            answers = self._in_batches(
                "generate_until",
                [requests[number] for number in numbers],
                partial(self._continued, way),
                disable_tqdm,
            )
            found |= dict(zip(numbers, answers, strict=True))
        self._tell_cuts()
        return [found[number] for number in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The context of a chat, with the markers of encoders: see `HarnessPrompts.chat`."""
        return self._prompts.chat(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The export's, which the harness notes in its results."""
        return self._prompts.template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached contexts apart by."""
        return str(self._folder.resolve()).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes in its results, when all is answered."""
        return {
            "model_num_parameters": self._answerer.num_parameters,
            "metalm_encoded": self._encoded,
            "metalm_cut_contexts": self._num_cut_contexts,
        }

    def _continued(self, way: Generation, asked: Sequence[Instance]) -> list[str]:
        room = self._answerer.longest - way.decode.max_new_tokens
        prompts = [self._prompts.prompt(one.args[0], self._files(one.args[2:])) for one in asked]
        return _all_found(
            self._answerer.continuations(
                [self._fitted(prompt, room) for prompt in prompts],
                self._prompts.read,
                way.decode,
                until=way.until,
                sampling=way.sampling,
            )
        )

    def _scored(self, documents: Sequence[Document]) -> list[tuple[float, bool]]:
        scored = _all_found(self._answerer.scored(documents, self._prompts.read))
        return [(one.likelihood.total, one.is_greedy) for one in scored]

    def _files(self, multimodal: Sequence[Mapping[str, Any]]) -> Files:
        """The images and clips of a request, whose further arguments these are."""
        given = multimodal[0] if multimodal else {}
        visual, heard = given.get("visual"), given.get("audio")
        if heard is not None and self._answerer.processor.audio_encoder is None:
            raise ConfigError("a task gives clips, and the model has no encoder of clips")
        return {
            "image": [] if visual is None else image_files(visual),
            "audio": [] if heard is None else clip_files(heard),
        }

    def _windows(self, request: Instance) -> list[Document]:
        """The text of a request in documents, each token weighted in one of them."""
        if len(request.args) > 1:
            raise ConfigError("a task asks for the likelihood of images: that of text behind images is known")
        windows = get_rolling_token_windows(
            self._prompts.text(request.args[0]).tolist(),
            prefix_token=self._answerer.tokenizer.start_id,
            max_seq_len=self._answerer.longest - 1,  # the last token has a position, too
            context_len=1,
        )
        documents = []
        for given, weighted in map(make_disjoint_window, windows):
            ids = [np.array(one, np.int32) for one in (given, weighted)]
            parts = (Part(TEXT, ids[0], weight=0.0), Part(TEXT, ids[1]))
            documents.append(Document(parts, begins=False, ends=False))
        return documents

    def _fitted(self, document: Document, longest: int) -> Document:
        fitted = fit(document, longest)
        self._num_cut_contexts += bool(fitted.num_cut)
        return fitted.document

    def _tell_cuts(self) -> None:
        if self._num_cut_contexts:
            _log.warning(
                "%d context(s) so far were longer than the %d positions of the model, less what is "
                "generated, and have lost their beginning",
                self._num_cut_contexts,
                self._answerer.longest,
            )

    def _generation(self, options: Mapping[str, Any]) -> Generation:
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise ConfigError(
                f"generation_kwargs has {', '.join(unknown)}: metalm knows {', '.join(_OPTIONS)}"
            )
        longest = self._answerer.longest
        given = [options[name] for name in _NEW_TOKENS if options.get(name) is not None]
        num_new = int(given[0]) if given else min(_USUAL_NEW_TOKENS, longest // 2)
        if not 0 < num_new < longest:
            raise ConfigError(
                f"max_gen_toks is {num_new}, the model has {longest} positions for context and answer: give "
                "fewer by --gen_kwargs max_gen_toks=N"
            )
        num_beams, asked = int(options.get("num_beams", 1)), options.get("do_sample")
        temperature = float(options.get("temperature", 1.0 if asked else 0.0))
        sampling = None
        if asked is not False and temperature > 0:
            sampling = Sampling(temperature, options.get("top_p"), options.get("top_k"))
        if num_beams > 1:
            decode = Decode(method="beam", num_beams=num_beams, length_penalty=1.0, max_new_tokens=num_new)
        else:
            decode = Decode(max_new_tokens=num_new)
        until = options.get("until") or []
        return Generation(
            decode, tuple(one for one in ([until] if isinstance(until, str) else until) if one), sampling
        )

    def _in_batches(
        self,
        kind: str,
        requests: Sequence[Instance],
        answer: Callable[[Sequence[Instance]], list[Answer]],
        disable_tqdm: bool,
    ) -> list[Answer]:
        """All answers, the longest contexts first; each group of requests is told to the harness's cache."""
        contexts = [str(one.args[0]) for one in requests]
        order = sorted(range(len(requests)), key=lambda number: (-len(contexts[number]), contexts[number]))
        at_once = BATCHES_AT_ONCE * self._batch_size
        found: dict[int, Answer] = {}
        with tqdm(total=len(requests), desc=f"Running {kind} requests", disable=disable_tqdm) as bar:
            for first in range(0, len(order), at_once):
                numbers = order[first : first + at_once]
                for number, one in zip(numbers, answer([requests[n] for n in numbers]), strict=True):
                    found[number] = one
                    self.cache_hook.add_partial(kind, requests[number].args, one)
                bar.update(len(numbers))
        return [found[number] for number in range(len(requests))]


def _all_found(answers: Sequence[Answer | None]) -> list[Answer]:
    found = [one for one in answers if one is not None]
    if len(found) < len(answers):
        raise DataError(
            f"{len(answers) - len(found)} request(s) have an image or a clip that cannot be decoded"
        )
    return found


def _positive(batch_size: int | str) -> int:
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}: metalm takes a number of requests, at least 1")
    return size


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {error}") from None
    return name


def _dtype(name: str) -> torch.dtype | None:
    names = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise ConfigError(f"dtype is {name!r}: it is one of {', '.join(names)}")
    return names[name]
