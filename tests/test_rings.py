"""What a command imports: heavy libraries only where they are needed, and cheap commands stay cheap."""

import subprocess
import sys
from pathlib import Path

import pytest

from surgeon.measure.record import Scores
from surgeon.surgery import open_source

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "matplotlib",
    "rich",
    "yaml",
    "gguf",
    "datasets",
    "pyarrow",
)


def modules_after(code: str) -> set[str]:
    """Return the heavy modules that a fresh interpreter has loaded after running `code`."""
    report = "\nimport sys; print(','.join(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split(",")) & set(HEAVY)


def command(*arguments: object) -> str:
    """Return code that runs the command line in this process."""
    words = [str(argument) for argument in arguments]
    return (
        "from surgeon.cli.app import app\n"
        f"try:\n    app({words!r})\n"
        "except SystemExit as done:\n    assert not done.code"
    )


def test_importing_surgeon_imports_nothing_heavy():
    assert modules_after("import surgeon; surgeon.truncate; surgeon.inspect") == set()


def test_a_clone_does_not_hide_the_package_from_the_directory_above_it(tmp_path):
    (tmp_path / "surgeon").mkdir()  # the name that git gives the clone
    for path in Path(__file__).parents[1].iterdir():
        (tmp_path / "surgeon" / path.name).symlink_to(path)

    code = "import surgeon; print(surgeon.truncate)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    assert "function truncate" in result.stdout, result.stderr


def test_importing_any_part_of_surgeon_opens_no_connection():
    watch = """
import importlib, pkgutil, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
import surgeon
modules = [module.name for module in pkgutil.walk_packages(surgeon.__path__, "surgeon.")]
for name in modules:
    if name != "surgeon.__main__":
        importlib.import_module(name)
print(len(modules))
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=0.1)
except SystemExit:
    print("watched")
"""
    result = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    number, watched = result.stdout.split()
    assert int(number) > 100
    assert watched == "watched"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["truncate", "--help"],
        ["inspect", "--help"],
        ["convert", "--help"],
        ["prune", "--help"],
        ["init", "--help"],
        ["data", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments):
    assert modules_after(command(*arguments)) == set()


def test_planning_and_inspecting_import_nothing_heavy(toy):
    assert modules_after(command("truncate", toy("llama"), "--layers", 2, "--dry-run")) == set()
    assert modules_after(command("truncate", toy("llama"), "--layers", 2, "--dry-run", "--inherit", "mlp")) == set()
    assert modules_after(command("truncate", toy("llama"), "--layers", 2, "--dry-run", "--dtype", "bfloat16")) == set()
    assert modules_after(command("inspect", toy("llama"), "--against", toy("llama-tied"))) == set()
    assert modules_after(command("prune", toy("llama"), "--layers", 4, "--hidden-size", 40, "--dry-run")) == set()


def test_moving_bytes_imports_only_yaml_for_the_card(toy, tmp_path):
    assert modules_after(command("truncate", toy("llama"), "--layers", 2, "-o", tmp_path / "cut")) == {"yaml"}


@pytest.mark.parametrize("options", [("--score", "last"), ("--score", "angular", "--scores-from", "{record}")])
def test_cutting_layers_by_what_is_known_moves_bytes_only(options, toy, tmp_path):
    matrix = [[None if end <= start else 0.5 for end in range(7)] for start in range(6)]
    model = open_source(toy("llama")).provenance()
    scores = Scores(model=model, depth=6, data=None, tokens=0, seed=0, layers={"angular": matrix})
    (tmp_path / "scores.json").write_bytes(scores.to_bytes())
    options = [option.format(record=tmp_path / "scores.json") for option in options]
    arguments = ["prune", toy("llama"), "--layers", 4, *options, "-o", tmp_path / "cut"]

    assert modules_after(command(*arguments, "--dry-run")) == set()
    assert modules_after(command(*arguments)) == {"yaml"}


def test_new_layers_of_zeros_need_no_arithmetic(toy, tmp_path):
    grow = command("grow", toy("llama"), "--layers", 8, "-o", tmp_path / "deeper", "--no-verify")

    assert modules_after(grow).isdisjoint({"torch", "numpy"})


def test_arithmetic_adds_torch_and_not_transformers(toy, tmp_path):
    loaded = modules_after(
        command("truncate", toy("llama"), "--layers", 2, "-o", tmp_path / "cut", "--dtype", "bfloat16")
    )

    assert "torch" in loaded
    assert loaded.isdisjoint({"transformers", "accelerate", "huggingface_hub", "rich"})
