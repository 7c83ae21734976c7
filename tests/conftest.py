"""Fixtures that many test files share, and when torch is imported.

Collecting the suite imports neither torch nor transformers: later.py says how. A test is slow, and `make quick` leaves
it out, where its file has such late imports or where it builds toys.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from later import import_late

SLOW_FIXTURES = {"toy", "toy64", "smollm2"}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts a background job so, and the commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need torch or a toy: by the imports of their file, or by their fixtures."""
    for item in items:
        if isinstance(item, pytest.Function) and (_is_slow(item.module) or SLOW_FIXTURES & set(item.fixturenames)):
            item.add_marker("slow")


@cache
def _is_slow(module: ModuleType) -> bool:
    """Return whether a test file imports something late, or anything of talkers.py, which builds toys."""
    origins = (getattr(value, "__module__", getattr(value, "__name__", None)) for value in vars(module).values())
    return "LATER" in vars(module) or "talkers" in origins


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Import what the file of a test imports late, before its fixtures are set up.

    transformers comes first, with its models: no test may be the first to import it in a changed environment.
    """
    if isinstance(item, pytest.Function) and item.get_closest_marker("slow"):
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401

        import_late(item.module)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a toy's name to its checkpoint, built when it is first asked for. Read-only."""
    import toys

    directory = tmp_path_factory.mktemp("toys")

    def build(name: str) -> Path:
        path = directory / name
        return path if path.exists() else toys.build(name, path)

    return build


@pytest.fixture(scope="session")
def toy64(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function like `toy`, for the checkpoints in float64 that growth is measured on. Read-only."""
    import exact64

    directory = tmp_path_factory.mktemp("toys64")

    def build(name: str) -> Path:
        path = directory / name
        return path if path.exists() else exact64.build64(name, path)

    return build


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread: toys are too small to share, and workers that do only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return a function that runs the command line in this process, from its arguments to its exit code."""
    from surgeon.cli.app import main

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["surgeon", *map(str, args)])
        out, err = io.StringIO(), io.StringIO()
        before = signal.getsignal(signal.SIGTERM)
        try:
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return Outcome(int(caught.value.code or 0), out.getvalue(), err.getvalue())

    return run
