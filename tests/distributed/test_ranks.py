"""How programs are started on ranks: each is a process of its own, and a hang is a failure with stacks."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from distributed.ranks import Ranks, run_program
from held_port import hold_port, port_of


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(text)
    return [str(path)]


def test_a_hang_is_a_failure_with_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    words = script(tmp_path, "import time\ndef sleeps_for_ever():\n    time.sleep(1000)\nsleeps_for_ever()\n")
    ranks = Ranks(words, 2)
    with pytest.raises(AssertionError, match="hung for 1 s") as failure:
        ranks.wait(timeout_s=1)
    assert str(failure.value).count("in sleeps_for_ever") == 2
    assert [process.wait() for process in ranks.processes] == [-signal.SIGABRT] * 2


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    words = script(
        tmp_path, "import os, time\nif os.environ['RANK'] == '0':\n    exit(3)\ntime.sleep(1000)\n"
    )
    ranks = Ranks(words, 2)
    assert ranks.wait(timeout_s=60) == [3, -signal.SIGKILL]


def test_a_held_port_is_given_to_nobody_but_its_server() -> None:
    with hold_port() as held:
        address = ("127.0.0.1", port_of(held))
        with socket.socket() as probe, pytest.raises(OSError, match="in use"):
            probe.bind(address)
        store = TCPStore(*address, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert TCPStore(*address, is_master=False).get("key") == b"value"


def test_a_traceback_and_its_code_are_those_of_an_interpreter(tmp_path: Path) -> None:
    code, output = run_program(script(tmp_path, "import sys\nsys.exit('no such file')\n"))
    assert (code, output) == (1, "no such file\n")
    code, output = run_program(script(tmp_path, "1 / 0\n"))
    assert code == 1
    assert output.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_what_is_registered_to_run_at_exit_runs(tmp_path: Path) -> None:
    text = "import atexit, threading, time\natexit.register(print, 'last')\n"
    text += "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
    assert run_program(script(tmp_path, text)) == (0, "thread\nlast\n")


def test_no_state_passes_from_one_program_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment, folder, random numbers, modules and torch's settings."""
    text = (
        "import os, sys, random, numpy, torch\n"
        "print(os.getcwd(), os.environ.get('LEFT'), torch.get_default_dtype(), 'left' in sys.modules)\n"
        "print(random.random(), numpy.random.rand())\n"
        "os.environ['LEFT'] = 'yes'\n"
        "sys.modules['left'] = sys\n"
        "torch.set_default_dtype(torch.float64)\n"
        "os.chdir('/')\n"
    )
    words = script(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    first, second = (run_program(words)[1].splitlines() for _ in range(2))
    assert first[0] == second[0] == f"{tmp_path} None torch.float32 False"
    assert not set(first[1].split()) & set(second[1].split())


def test_ranks_have_hash_seeds_of_their_own(tmp_path: Path) -> None:
    """As processes have: code whose collectives follow the order of a set would hang on them."""
    words = script(tmp_path, "print(hash('a word'), flush=True)\n")
    ranks = Ranks(words, 2)
    assert ranks.wait(timeout_s=60) == [0, 0]
    assert len(set(ranks.output().split())) == 2


def test_one_rank_gets_no_launch_variables(tmp_path: Path) -> None:
    words = script(
        tmp_path, "import os\nprint(sorted(n for n in ('RANK', 'WORLD_SIZE') if n in os.environ))\n"
    )
    assert "RANK" not in os.environ
    assert run_program(words) == (0, "[]\n")
