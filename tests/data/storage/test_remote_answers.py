"""Whatever a server of shards answers, samples are those that were indexed, or there is an error."""

from __future__ import annotations

import contextlib
import random
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from metalm.data.sources import Source, open_source
from metalm.data.storage import remote
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample, DataError
from mutations import mutate_bytes

MUTATIONS = 200


class Server(socketserver.ThreadingTCPServer):
    """Answers every request with the same bytes, whatever they are."""

    daemon_threads = True
    answer = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{{shard}}"


class _Handler(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.recv(4096)
            self.request.sendall(self.server.answer)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in (("ATTEMPTS", 2), ("DELAY_S", 0.01), ("STALL_S", 0.3)):
        monkeypatch.setattr(remote, name, value)
    with Server() as started:
        threading.Thread(target=started.serve_forever, args=(0.05,), daemon=True).start()
        yield started
        started.shutdown()


@pytest.fixture
def shard(text_source: Callable[..., Path], server: Server, tokenizer: Tokenizer) -> tuple[bytes, Source]:
    folder = text_source([9])
    content = (folder / "text-00000.tar").read_bytes()
    return content, open_source("a", folder, tokenizer, url=server.url)


def read_all(source: Source) -> list[list[int]]:
    locations = source.index.locate(np.arange(source.index.num_samples))
    try:
        found = []
        for half in (locations[:4], locations[4:]):
            source.reader.read_ahead(half)
            found += [source.token_ids(location).tolist() for location in half]
        return found
    finally:
        source.reader.close()


def http(body: bytes, status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}\r\n".encode() + body


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda body: b"",
    "no HTTP": lambda body: body,
    "noise": lambda body: bytes(range(256)) * 40,
    "cut off": lambda body: http(body[:3000], length=len(body)),
    "shorter": lambda body: http(body[:3000]),
    "empty": lambda body: http(b""),
    "zeros": lambda body: http(bytes(len(body))),
    "a page": lambda body: http(b"<html>please log in</html>" * 200),
    "a page instead of the end": lambda body: http(body[:4096] + b"<html>" * 900),
    "shifted": lambda body: http(b"\n" + body),
    "twice the front": lambda body: http(body[:2048] + body),
    "not found": lambda body: http(b"no", "404 Not Found"),
    "forbidden, with the content": lambda body: http(body, "403 Forbidden"),
    "busy": lambda body: http(b"later", "503 Service Unavailable"),
    "a loop": lambda body: http(b"", "302 Found", more="Location: /again\r\n"),
    "elsewhere": lambda body: http(b"", "302 Found", more="Location: file:///etc/passwd\r\n"),
    "wrong chunks": lambda body: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n" + body[:4000] + b"\r\nzz\r\n"
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ANSWERS)
def test_other_answers_end_with_the_address(server: Server, shard: tuple[bytes, Source], kind: str) -> None:
    content, source = shard
    server.answer = ANSWERS[kind](content)
    with pytest.raises(DataError, match=r"127\.0\.0\.1.*text-00000\.tar"):
        read_all(source)


@pytest.mark.timeout(120)
def test_no_mutation_of_an_answer_gives_other_samples(server: Server, shard: tuple[bytes, Source]) -> None:
    content, source = shard
    server.answer = http(content)
    expected = read_all(source)
    server.answer = http(content + b"more than was indexed")
    assert read_all(source) == expected
    chance, refused = random.Random(8), 0
    for number in range(MUTATIONS):
        changed = mutate_bytes(content, chance)
        if number % 2:
            changed = changed[: len(content)].ljust(len(content), b"\0")
        server.answer = http(changed)
        try:
            found = read_all(source)
        except (DataError, BadSample):
            refused += 1
        else:
            assert found == expected
    assert refused > MUTATIONS // 2
