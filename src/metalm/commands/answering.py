"""`metalm generate` and `metalm chat`."""

from __future__ import annotations

import argparse
import functools
import io
import sys
from pathlib import Path
from typing import Any

from metalm.commands.argument_types import port, positive, seed, temperature
from metalm.errors import ConfigError
from metalm.progress import Phase


def add_commands(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt with an exported model",
        epilog='Example: metalm generate exported/demo --image scene.png --prompt "Summarize this image:"',
    )
    generate.add_argument("folder", type=Path, help="written by tools/convert_to_hf.py")
    generate.add_argument(
        "--prompt", default="", help="text; without markers, images and clips are before it"
    )
    generate.add_argument(
        "--image", type=Path, action="append", default=[], help="may be given several times"
    )
    generate.add_argument("--audio", type=Path, action="append", default=[], help="a clip, as --image")
    generate.add_argument("--num-beams", type=positive, default=1)
    generate.add_argument("--seed", type=seed, default=0)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        help="talk with an exported model: /image and /clip PATH, /forget, end of input",
        epilog="Example: metalm chat exported/demo --web",
    )
    chat.add_argument("folder", type=Path, help="written by tools/convert_to_hf.py")
    chat.add_argument("--web", action="store_true", help="on a page of this machine's browser instead")
    chat.add_argument(
        "--pictures", type=Path, help="folder for images with the boxes of answers; default: a temporary one"
    )
    chat.add_argument("--port", type=port, default=7860, help="of the page (default: %(default)s)")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        command.add_argument("--max-new-tokens", type=positive, default=64)
        command.add_argument("--temperature", type=temperature, default=0.0, help="above 0: sample")
        command.add_argument("--device", default="cpu")


def _generate(options: argparse.Namespace) -> None:
    with Phase("loading transformers"):
        from metalm.conversion.generate import generate_from_folder

    answer = generate_from_folder(
        options.folder,
        options.prompt,
        options.image,
        options.audio,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        temperature=options.temperature,
        seed=options.seed,
        device=options.device,
    )
    print(answer)


def _chat(options: argparse.Namespace) -> None:
    if options.web:
        if options.pictures is not None:
            raise ConfigError("--pictures is for the terminal: with --web the page shows them")
        with Phase("loading transformers"):
            from metalm.conversion.chat_page import serve_page

        serve_page(
            options.folder,
            options.port,
            functools.partial(print, flush=True),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            device=options.device,
        )
        return
    with Phase("loading transformers"):
        from metalm.conversion.chat import chat_with_folder

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused, and no more
    chat_with_folder(
        options.folder,
        iter(sys.stdin.readline, ""),
        print,
        hear=functools.partial(print, end="", flush=True),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        device=options.device,
        pictures=options.pictures,
    )
