"""A page to talk with an exported model: drop an image or a clip, ask, read the answer as it is made.

Served on the loopback alone, by the standard library: who reaches it may use the model. What comes from
elsewhere (another site's script, another host's name for this machine) is refused.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import tempfile
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from metalm.conversion.chat import Conversation, Shown
from metalm.conversion.generate import FolderModel
from metalm.errors import ConfigError, DataError
from metalm.modalities import MEDIA

LOOPBACK = "127.0.0.1"
MAX_REQUEST_BYTES = 64 << 20
PAGE = Path(__file__).with_name("chat_page.html")


class ChatServer(ThreadingHTTPServer):
    """One page with one conversation; a question waits until the answer before it is made."""

    daemon_threads = True

    def __init__(
        self, conversation: Conversation, port: int, *, max_new_tokens: int = 64, temperature: float = 0.0
    ) -> None:
        """
        Args:
            port: 0 for any that is free.
            max_new_tokens, temperature: of `Conversation.ask`.

        Raises:
            ConfigError: the port is taken.
        """
        self._conversation = conversation
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self._turn = threading.Lock()
        self._uploads = tempfile.TemporaryDirectory(prefix="metalm-chat-")
        self._num_uploads = 0
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port} cannot be used ({error}): name another by --port") from None

    @property
    def port(self) -> int:
        """That it listens to."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{LOOPBACK}:{self.port}/"

    def server_close(self) -> None:
        """Stop, and remove what was dropped on the page."""
        super().server_close()
        self._uploads.cleanup()

    def ask(self, text: str, media: list[tuple[str, bytes]], hear: Callable[[str], None]) -> bytes | None:
        """Ask the model; errors as `Conversation.ask`.

        Args:
            media: modality and content of files.

        Returns:
            What the answer points at, as `Conversation.pointed`.
        """
        with self._turn:
            shown = []
            for modality, content in media:
                self._num_uploads += 1
                shown.append(Shown(modality, Path(self._uploads.name) / str(self._num_uploads)))
                shown[-1].path.write_bytes(content)
            answer = self._conversation.ask(
                text,
                shown,
                max_new_tokens=self._max_new_tokens,
                temperature=self._temperature,
                hear=hear,
            )
            return self._conversation.pointed(answer)

    def forget(self) -> None:
        """Begin anew."""
        with self._turn:
            self._conversation.forget()


def serve_page(
    folder: Path,
    port: int,
    say: Callable[[str], None],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device: str = "cpu",
) -> None:
    """Serve the page of an exported model until it is interrupted.

    Args:
        say: is told where the page is.

    Raises:
        ConfigError: the folder is no exported model, or the port is taken.
    """
    conversation = Conversation(FolderModel(folder, device))
    with (
        ChatServer(conversation, port, max_new_tokens=max_new_tokens, temperature=temperature) as server,
        contextlib.suppress(KeyboardInterrupt),
    ):
        say(f"{server.url} (Ctrl-C ends it)")
        server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        """The page."""
        if self._is_ours() and self.path == "/":
            self._begin(HTTPStatus.OK, "text/html; charset=utf-8")
            self.wfile.write(PAGE.read_bytes())

    def do_POST(self) -> None:
        """A question, answered line by line as it is made; or the wish to forget."""
        if not self._is_ours():
            return
        if self.path == "/forget":
            self.server.forget()
            self._begin(HTTPStatus.NO_CONTENT, "text/plain")
            return
        try:
            text, media = self._question()
        except (ValueError, KeyError, TypeError, binascii.Error):
            self.send_error(HTTPStatus.BAD_REQUEST, "expected JSON with a text and media in base64")
            return
        self._begin(HTTPStatus.OK, "application/x-ndjson")
        with contextlib.suppress(ConnectionError):  # the reader may have left
            try:
                picture = self.server.ask(text, media, lambda piece: self._write({"piece": piece}))
                if picture is not None:
                    self._write({"picture": base64.b64encode(picture).decode()})
            except (ConfigError, DataError) as error:
                self._write({"error": str(error)})

    def log_message(self, *_: object) -> None:
        """Nothing: what is said stays between the two."""

    def _is_ours(self) -> bool:
        """Whether it was sent by the page, under the name of this machine's loopback."""
        names = [f"{name}:{self.server.port}" for name in (LOOPBACK, "localhost")]
        origin = self.headers.get("Origin")
        is_ours = self.headers.get("Host") in names and (
            origin is None or origin in [f"http://{name}" for name in names]
        )
        if not is_ours or self.path not in ("/", "/ask", "/forget"):
            self.send_error(HTTPStatus.NOT_FOUND if is_ours else HTTPStatus.FORBIDDEN)
            return False
        return True

    def _question(self) -> tuple[str, list[tuple[str, bytes]]]:
        size = int(self.headers["Content-Length"])
        if not 0 <= size <= MAX_REQUEST_BYTES:
            raise ValueError
        asked = json.loads(self.rfile.read(size))
        text = asked["text"]
        if not isinstance(text, str):
            raise TypeError
        media = [(one["type"], base64.b64decode(one["data"], validate=True)) for one in asked["media"]]
        if not all(modality in MEDIA for modality, _ in media):
            raise ValueError
        return text, media

    def _begin(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        policy += "img-src data: blob:; media-src data: blob:; connect-src 'self'; frame-ancestors 'none'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()

    def _write(self, line: dict[str, str]) -> None:
        self.wfile.write(json.dumps(line).encode() + b"\n")
