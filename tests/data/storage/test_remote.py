"""Shards behind `http:` and `pipe:`: the same samples as from files, resumed in mid-shard, never executed."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pydantic import ValidationError

from data.order.test_sample_order import corpus
from data.steps import global_rows, opened, with_data
from data.test_tools import run_tool
from metalm.config.rules import check_config
from metalm.config.schema import RunConfig, SourceConfig
from metalm.data.order.sample_order import ShardOrder
from metalm.data.sources import open_source
from metalm.data.storage import remote
from metalm.data.storage.index import build_index, open_index
from metalm.data.storage.remote import RemoteShard, shard_url
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on the loopback; the next answers break off after so many bytes (None: whole)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.limits: list[int | None] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{{shard}}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        limit = self.server.limits.pop(0) if self.server.limits else None
        with contextlib.suppress(ConnectionError):  # the reader may have enough
            self.wfile.write(content[:limit])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []

    def start(folder: Path) -> Server:
        servers.append(Server(folder))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DELAY_S", 0.01)


def away_from(index: Path, shards: Path) -> None:
    """Moves the shards of a folder to another, so that they cannot be read from the first."""
    shards.mkdir()
    for shard in index.glob("*.tar"):
        shard.rename(shards / shard.name)


@pytest.fixture
def text(text_source: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A folder with an index, and the folder of its shards."""
    index = text_source([17, 40, 3, 25])
    away_from(index, tmp_path / "text")
    return index, tmp_path / "text"


@pytest.fixture
def config(
    make_config: Callable[..., RunConfig],
    text: tuple[Path, Path],
    pair_source: Callable[..., Path],
    tmp_path: Path,
    serve: Callable[[Path], Server],
) -> RunConfig:
    """A mixture of text behind a pipe and pairs behind http."""
    pairs = pair_source([20, 11])
    away_from(pairs, tmp_path / "pairs")
    return make_config(
        {
            "prose": {
                "path": text[0],
                "url": f"pipe:cat {text[1]}/{{shard}}",
                "readers": {"text": "text"},
            },
            "scenes": {
                "path": pairs,
                "url": serve(tmp_path / "pairs").url,
                "readers": {"image": "vision", "text": "vision"},
            },
        }
    )


STEPS = 24


def test_rows_depend_on_neither_ranks_nor_workers_nor_resumes(config: RunConfig) -> None:
    reference, _ = global_rows(config, STEPS, dp_size=1)
    assert global_rows(config, 12, dp_size=2)[0] == reference[:12]
    assert global_rows(with_data(config, workers=2), 8, dp_size=1)[0] == reference[:8]
    done, states = 0, None
    for steps, dp_size in [(1, 1), (6, 2), (3, 4), (14, 1)]:
        rows, states = global_rows(config, steps, dp_size=dp_size, states=states)
        assert rows == reference[done : done + steps]
        done += steps
    assert done == STEPS


@pytest.mark.parametrize("samples", [[300, 211, 90], [30, 1, 5, 0, 17] * 9, [50], [3, 2]])
@pytest.mark.parametrize("window", [1, 24])
def test_every_sample_once_per_epoch_from_whole_shards(samples: list[int], window: int) -> None:
    lanes = 8
    index = corpus(samples)
    order = ShardOrder(index, seed=1, source_name="prose", num_lanes=lanes, shuffle_window=window)
    num_shards = sum(count > 0 for count in samples)
    windows = -(-max(samples) // window)
    dealt: Counter[int] = Counter()
    for lane in range(lanes):
        # After num_shards turns of all lanes, `lanes` epochs have been dealt.
        for turn in range(num_shards):
            blocks = [order.block(lane, turn * windows + number) for number in range(windows)]
            shards = {int(np.searchsorted(index.shard_ends, s, side="right")) for b in blocks for s in b}
            assert len(shards) == 1
            lasts = [block.max() for block in blocks if len(block)]
            assert lasts == sorted(lasts)  # windows follow each other in the shard
            dealt.update(int(sample) for block in blocks for sample in block)
    assert dealt == {sample: lanes for sample in range(sum(samples))}


def test_streamed_text_is_the_text_of_the_files(
    text: tuple[Path, Path], tokenizer: Tokenizer, serve: Callable[[Path], Server]
) -> None:
    index, shards = text
    server = serve(shards)
    streamed = open_source("a", index, tokenizer, url=server.url)
    locations = streamed.index.locate(np.arange(streamed.index.num_samples))
    for shard in range(4):
        window = [location for location in locations if location.shard == shard]
        for half in (window[: len(window) // 2], window[len(window) // 2 :]):
            streamed.reader.read_ahead(half)
            for location in reversed(half):
                content = (shards / streamed.index.shards[shard].name).read_bytes()
                expected = content[location.offset : location.offset + location.size]
                np.testing.assert_array_equal(streamed.token_ids(location), np.frombuffer(expected, "<u2"))
    assert server.asked == [f"/text-0000{n}.tar" for n in range(4)]
    streamed.reader.close()


def test_a_resume_in_mid_shard_passes_over_what_was_read(
    make_config: Callable[..., RunConfig],
    text_source: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    index = text_source([400])
    away_from(index, tmp_path / "shards")
    source = {"path": index, "url": f"pipe:cat {tmp_path}/shards/{{shard}}"}
    config = make_config({"prose": source}, data={"lanes": 1}, training={"global_batch_size": 2})
    with opened(config) as data:
        for _ in range(60):
            next(data)
        states = json.loads(json.dumps(data.lane_states()))
        expected = next(data)[0].tokens
    assert states["0"]["sources"]["prose"]["packer"]["place"][0] > 10
    with caplog.at_level("INFO"), opened(config, lane_states={0: states["0"]}) as data:
        assert (next(data)[0].tokens == expected).all()
    assert "text-00000.tar: reading on from byte" in caplog.text


def test_a_stream_that_breaks_is_opened_again(
    text: tuple[Path, Path],
    make_config: Callable[..., RunConfig],
    serve: Callable[[Path], Server],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = serve(text[1])
    config = make_config(
        {"prose": {"path": text[0], "url": server.url}},
        data={"lanes": 1, "shuffle_window": 64},
        training={"global_batch_size": 2},
    )
    undisturbed, _ = global_rows(config, 12, dp_size=1)
    server.limits = [1500, 1500, None, 1500]
    assert global_rows(config, 12, dp_size=1)[0] == undisturbed
    assert not server.limits
    assert "attempt 1 of 5" in caplog.text and "attempt 2 of 5" in caplog.text


def test_no_secret_of_a_url_is_logged(
    text: tuple[Path, Path],
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("metalm.data.storage.remote.DELAY_S", 0.01)
    for url in ("http://me:hunter2@127.0.0.1:9/{shard}?key=hunter2", "pipe:KEY=hunter2 false {shard}"):
        config = make_config({"prose": {"path": text[0], "url": url}})
        with opened(config) as data, pytest.raises(DataError, match=r"cannot read .*text-0000") as raised:
            next(data)
        assert "hunter2" not in str(raised.value) + caplog.text
    assert "attempt 1 of 5" in caplog.text


def test_a_stream_that_stays_broken_ends_the_run_with_its_url_and_place(
    text: tuple[Path, Path], make_config: Callable[..., RunConfig], serve: Callable[[Path], Server]
) -> None:
    index, shards = text
    server = serve(shards)
    missing = make_config({"prose": {"path": index, "url": server.url.replace("/{", "/x/{")}})
    with opened(missing) as data, pytest.raises(DataError, match=r"/x/text-.*exit code 22 \(5 attempts\)"):
        next(data)
    assert len(server.asked) == 5
    for shard in shards.iterdir():
        shard.write_bytes(shard.read_bytes()[:3000])
    cut = make_config({"prose": {"path": index, "url": f"pipe:cat {shards}/{{shard}}"}})
    with opened(cut) as data, pytest.raises(DataError, match=r"it ends after 3,000 of [\d,]+ bytes"):
        for _ in range(20):
            next(data)


def test_another_shard_behind_the_url_is_found_out(
    text: tuple[Path, Path], make_config: Callable[..., RunConfig]
) -> None:
    index, shards = text
    content = bytearray((shards / "text-00001.tar").read_bytes())
    for position in range(124, len(content), 512):
        content[position] ^= 1
    for shard in shards.iterdir():
        shard.write_bytes(content)
    config = make_config({"prose": {"path": index, "url": f"pipe:cat {shards}/{{shard}}"}})
    with opened(config) as data, pytest.raises(DataError, match="holds no member of"):
        next(data)


def test_a_stream_that_stalls_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_S", 0.2)
    with RemoteShard("pipe:sleep 60") as stream, pytest.raises(TimeoutError, match="nothing came"):
        stream.read(1)


@pytest.mark.parametrize("name", ["a;b.tar", "$(touch x)", "../a.tar", "-rf", "a b", "'a'", "http://a", ""])
def test_names_of_an_index_that_a_shell_would_read_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="cannot be read from a URL"):
        shard_url("pipe:cat /data/{shard}", name)


def test_nothing_of_an_index_is_executed(
    text: tuple[Path, Path], make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    index, shards = text
    document: dict[str, Any] = json.loads((index / "index.json").read_text())
    for shard in document["shards"]:
        shard["name"] = f"x;touch {tmp_path}/executed"
        shard["url"] = f"pipe:touch {tmp_path}/executed"
    (index / "index.json").write_text(json.dumps(document))
    config = make_config({"prose": {"path": index, "url": f"pipe:cat {shards}/{{shard}}"}})
    with pytest.raises(DataError, match=r"cannot be used|cannot be read from a URL"), opened(config) as data:
        next(data)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "url", ["http://host/all.tar", "s3://bucket/{shard}", "/data/{shard}", "cat {shard}"]
)
def test_urls_that_cannot_be_opened_are_refused_in_the_config(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        SourceConfig(path=Path("a"), url=url)


def test_held_out_sources_lie_on_a_file_system(make_config: Callable[..., RunConfig]) -> None:
    source = {"path": "a", "url": "http://host/{shard}"}
    config = make_config({"a": source}, evaluation={"b": source})
    with pytest.raises(ConfigError, match=r"data\.evaluation\.b\.url is given"):
        check_config(config, {}, {})


def test_shards_behind_a_url_are_indexed_and_checked(
    text: tuple[Path, Path], tokenizer_folder: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    index, shards = text
    server = serve(shards)
    url = ("--url", server.url)
    arguments = ("--kind", "text", "--tokenizer", tokenizer_folder, "--shards", "text-{00000..00003}.tar")
    done = run_tool("index_shards.py", tmp_path / "index", *url, *arguments, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "85 samples in 4 shards" in done.stdout
    assert (tmp_path / "index" / "index.json").read_bytes() == (index / "index.json").read_bytes()
    assert sorted(server.asked) == [f"/text-0000{n}.tar" for n in range(4)]
    check = ("check_shards.py", tmp_path / "index", *url, "--tokenizer", tokenizer_folder, "--processes", 1)
    done = run_tool(*check)
    assert done.returncode == 0, done.stdout
    assert "4 of 4 shards are sound" in done.stdout
    done = run_tool(
        "index_shards.py", tmp_path / "other", "--kind", "text", "--url", "ftp://a", "--shards", "a"
    )
    assert done.returncode == 64 and "is no URL of shards" in done.stderr


def test_a_broken_stream_is_never_indexed_as_a_shorter_shard(
    text: tuple[Path, Path], tmp_path: Path, tokenizer: Tokenizer, serve: Callable[[Path], Server]
) -> None:
    server = serve(text[1])
    names = [shard.name for shard in open_index(text[0], check_sizes=False).shards]
    server.limits = [5000]
    arguments = {"kind": "text", "url": server.url, "tokenizer_fingerprint": tokenizer.fingerprint}
    index = build_index(tmp_path / "index", shard_names=names, **arguments)
    assert index.skipped == {} and index.num_samples == 85
    server.limits = [5000] * 5
    with pytest.raises(DataError, match=r"text-00000.tar: its program ended with exit code 18"):
        build_index(tmp_path / "other", shard_names=names, **arguments)


def test_closing_ends_the_programs(tmp_path: Path) -> None:
    stream = RemoteShard("pipe:yes")
    assert stream.read(10) == b"y\n" * 5
    began = time.monotonic()
    stream.close()
    assert stream._pipe.proc.returncode is not None
    assert time.monotonic() - began < 5


def test_a_program_that_stalls_ends_with_those_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_S", 0.2)
    with RemoteShard("pipe:sleep 617 | cat") as shard:
        with pytest.raises(TimeoutError, match="nothing came"):
            shard.read(1)
        programs = psutil.Process(shard._pipe.proc.pid).children(recursive=True)
    assert len(programs) == 2
    _, alive = psutil.wait_procs(programs, timeout=10)
    assert not alive
