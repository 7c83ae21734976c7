"""Fixtures that many test files share."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import toys


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a toy's name to its checkpoint, built when it is first asked for. Read-only."""
    directory = tmp_path_factory.mktemp("toys")

    def build(name: str) -> Path:
        path = directory / name
        return path if path.exists() else toys.build(name, path)

    return build
