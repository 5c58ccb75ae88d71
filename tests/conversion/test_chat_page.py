"""The page of `metalm chat --web`: it answers as the conversation does, and to its own page alone."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conversion.cases import pictures
from conversion.conftest import Workshop
from metalm.conversion.chat import Conversation, Shown
from metalm.conversion.chat_page import ChatServer
from metalm.conversion.generate import FolderModel, Hear
from metalm.errors import ConfigError
from metalm.modalities.image import encode_png

KIND = "deepnorm"


@pytest.fixture(scope="module")
def model(workshop: Workshop) -> FolderModel:
    return FolderModel(workshop.exported(KIND))


@pytest.fixture
def server(model: FolderModel) -> Iterator[ChatServer]:
    with serving(Conversation(model)) as server:
        yield server


@contextmanager
def serving(conversation: Conversation) -> Iterator[ChatServer]:
    with ChatServer(conversation, 0, max_new_tokens=4) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(
    server: ChatServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def ask(server: ChatServer, text: str, *images: bytes) -> list[dict[str, Any]]:
    media = [{"type": "image", "data": base64.b64encode(image).decode()} for image in images]
    body = json.dumps({"text": text, "media": media})
    status, answer = send(server, "POST", "/ask", body.encode(), Origin=server.url.rstrip("/"))
    assert status == 200
    return [json.loads(line) for line in answer.splitlines()]


def test_questions_with_images_are_answered_and_mistakes_told(
    server: ChatServer, model: FolderModel, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.asarray(pictures()[1])).save(path)
    alone = Conversation(model)
    expected = alone.ask("the fox", [Shown("image", path)], max_new_tokens=4)
    assert "".join(line["piece"] for line in ask(server, "the fox", path.read_bytes())) == expected
    (mistake,) = ask(server, "dog", b"no image")
    assert "undecodable_image" in mistake["error"]
    assert "".join(one["piece"] for one in ask(server, "over")) == alone.ask("over", max_new_tokens=4)
    assert send(server, "POST", "/forget")[0] == 204
    expected = Conversation(model).ask("over", max_new_tokens=4)
    assert "".join(one["piece"] for one in ask(server, "over")) == expected


class Pointing(Conversation):
    """Answers by a box, whatever the model says."""

    def ask(self, *words: Any, hear: Hear, **options: Any) -> str:
        super().ask(*words, **options)
        answer = "<box> 8 0 24 16 </box>"
        hear(answer)
        return answer


def test_what_an_answer_points_at_is_shown(model: FolderModel) -> None:
    content = encode_png(np.zeros((320, 320, 3), np.uint8))
    with serving(Pointing(model)) as server:
        piece, picture = ask(server, "the fox", content)
        assert piece == {"piece": "<box> 8 0 24 16 </box>"}
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["picture"]))))
        assert shown.shape == (320, 320, 3)
        rows, columns = np.nonzero(shown.any(axis=-1))
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 160, 80, 239)
        assert len(ask(server, "over")) == 2
        send(server, "POST", "/forget")
        assert ask(server, "over") == [piece]


def test_only_the_page_itself_is_answered(server: ChatServer) -> None:
    status, page = send(server, "GET", "/")
    assert status == 200 and b"<title>MetaLM</title>" in page
    assert send(server, "GET", "/etc/passwd")[0] == 404
    assert send(server, "GET", "/", Host="evil.example")[0] == 403
    assert send(server, "POST", "/forget", Origin="http://evil.example")[0] == 403
    bad_media = (b"3", b'["!"]', b'[{"type": "image", "data": "!"}]', b'[{"type": "smell", "data": ""}]')
    for body in (
        b"{",
        b"[]",
        b'{"text": 3, "media": []}',
        *(b'{"text": "a", "media": %s}' % m for m in bad_media),
    ):
        assert send(server, "POST", "/ask", body)[0] == 400
    with pytest.raises(ConfigError, match="cannot be used"):
        ChatServer(Conversation(server._conversation.model), server.port)
