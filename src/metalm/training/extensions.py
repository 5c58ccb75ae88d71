"""DeepSpeed's extension for ranks on CPU, which is compiled at its first use on a machine.

`python -m metalm.training.extensions` compiles it beforehand.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from pathlib import Path

import torch
from deepspeed.comm.torch import build_shm_op

from metalm.cache_folder import cache_folder
from metalm.file_lock import taking_turns
from metalm.outputs import require_folder_place

logger = logging.getLogger(__name__)

_COMPILED = "deepspeed_shm_comm/deepspeed_shm_comm.so"


def prepare_extensions() -> None:
    """Have DeepSpeed's shared-memory op compiled, past locks that killed runs left behind.

    torch's extension loader waits for ever on the lock file of a dead process. Whoever holds our own
    lock, which the kernel releases on death, knows that such a file is stale.

    The loader asks ninja whether the op is up to date, and two versions of ninja, that of the environment and
    that of the system, refuse each other's logs: each would compile anew. So the environment's comes first,
    whether or not it is activated. What was compiled for another environment is not up to date either, though
    its versions are the same: each environment has a folder of its own.

    Raises:
        ConfigError: it cannot be kept anywhere.
    """
    if torch.cuda.is_available():
        return
    programs = Path(sys.executable).parent
    if (programs / "ninja").exists():
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    name = f"metalm-py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}-{environment}"
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache_folder(f"torch_extensions/{name}"))
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    require_folder_place(folder, "set TORCH_EXTENSIONS_DIR to a folder that you may write")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _COMPILED).exists():
        logger.warning("compiling an extension of DeepSpeed in %s, once: this takes some minutes", folder)
    with taking_turns(folder / "metalm.lock"):
        for stale in folder.glob("*/lock"):
            stale.unlink(missing_ok=True)
        build_shm_op()


if __name__ == "__main__":
    prepare_extensions()
