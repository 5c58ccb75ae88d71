"""Where the files that come with MetaLM are: at the top of the repository, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

from metalm.regular_files import path_exists


def project_root() -> Path:
    """The folder that holds `pipelines/`, `deepspeed_configs/`, `slurm/` and `tools/`."""
    inside = Path(__file__).parent / "project"
    return inside if inside.is_dir() else Path(__file__).parents[2]


def find_file(path: Path, folder: str, name: Path) -> Path:
    """The path if there is such a file, else the file of that name that comes with MetaLM.

    Args:
        path: where the file is looked for first.
        folder: one of the project's.
        name: relative to the folder, or with the folder before it: `demo.yaml`, `pipelines/demo.yaml`.

    Returns:
        `path` where neither exists.
    """
    if path_exists(path) or name.is_absolute():
        return path
    own = project_root() / (name if name.parts[:1] == (folder,) else folder / name)
    return own if path_exists(own) else path
