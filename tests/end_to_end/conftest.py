from __future__ import annotations

from pathlib import Path

import pytest

from tiny_pipeline import prepare_tiny


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data in small, with `tiny.yaml`."""
    folder = tmp_path_factory.mktemp("tiny")
    prepare_tiny(folder)
    return folder
