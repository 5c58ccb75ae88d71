"""Constraints that hold every dependency of pyproject.toml to the oldest version it allows, for pip."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def main() -> None:
    """Print one `name==version` a line."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in [*project["dependencies"], *extras]:
        if found := re.match(r"([\w.-]+)>=([\w.]+)", line):
            print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
    main()
