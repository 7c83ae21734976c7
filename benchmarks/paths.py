"""Which files of surgeon the run of a command enters, for each command.

    python benchmarks/paths.py [NAME...]

Builds a toy with a tokenizer and a text, runs each command on them in a process of its own, and prints a table: the
command, the number of files, and their names in the order in which they are entered. A file is entered where one of its
functions runs once the command line is built. Bodies of classes and what runs while a file is imported do not count.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The commands by name. Each runs in a folder with the toy `llama`, the same with three layers as `small`, and a text.
MEASURED = "--data text.txt --samples 4 --sequence-length 32"
TRAINED = "--data text.txt --max-steps 3 --sequence-length 32 --batch-size 2"
PATHS = {
    name: command.split()
    for name, command in {
        "truncate": "truncate llama --layers 3 -o cut",
        "truncate-dry-run": "truncate llama --layers 3 -o cut --dry-run",
        "inspect": "inspect llama",
        "grow": "grow llama --layers 8 --hidden-size 96 --no-verify -o grown",
        "grow-verified": "grow llama --layers 8 --hidden-size 2x -o grown",
        "gist": "gist llama --tokens 2 -o tuned",
        "prune": f"prune llama --layers 4 {MEASURED} -o cut",
        "prune-magnitude": "prune llama --layers 4 --score magnitude --protect 0,0 -o cut",
        "evaluate": f"evaluate llama {MEASURED}",
        "evaluate-baseline": f"evaluate llama {MEASURED} --baseline small",
        "finetune": f"finetune llama {TRAINED} -o tuned",
        "finetune-distilled": f"finetune small {TRAINED} --teacher llama -o tuned",
    }.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of the commands: {', '.join(PATHS)}; all by default")
    names = parser.parse_args().names or list(PATHS)
    if unknown := set(names) - PATHS.keys():
        parser.error(f"no command is called {min(unknown)!r}")
    print("| command | files | names |\n| --- | --- | --- |")
    for name in names:
        entered = files_entered(PATHS[name])
        print(f"| surgeon {' '.join(PATHS[name])} | {len(entered)} | {' '.join(entered)} |", flush=True)


def files_entered(words: Sequence[str]) -> list[str]:
    """Return the files that a command enters, relative to surgeon/, in the order in which it enters them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        place, report = Path(directory) / "place", Path(directory) / "entered.json"
        shutil.copytree(models().name, place)
        command = [sys.executable, __file__, "--trace", str(report), *words]
        result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"surgeon {' '.join(words)} failed: {result.stderr.strip()}")
        entered: list[str] = json.loads(report.read_text(encoding="utf-8"))
    return entered


@cache
def models() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder with the models and the text that the commands read. It goes when the process ends."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    import talkers

    import surgeon

    directory = tempfile.TemporaryDirectory()
    place = Path(directory.name)
    talkers.talker(place / "llama")
    surgeon.truncate(place / "llama", layers=3).save(place / "small")
    talkers.written(place / "text.txt", talkers.TEXT * 20)
    return directory


def trace(report: Path, words: Sequence[str]) -> None:
    """Run a command in this process and write the files that it enters, as JSON."""
    import surgeon.cli.app

    package = Path(surgeon.__file__).parent
    entered: dict[str, None] = {}
    known: set[CodeType] = set()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code in known or not code.co_filename.startswith(f"{package}{os.sep}"):
            return
        if is_function(code) and not is_imported_by(frame, package):
            known.add(code)
            entered[Path(code.co_filename).relative_to(package).as_posix()] = None

    sys.argv = ["surgeon", *words]
    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        surgeon.cli.app.main()
    finally:
        sys.setprofile(None)
        report.write_text(json.dumps(list(entered)), encoding="utf-8")


def is_function(code: CodeType) -> bool:
    """Return whether this is the code of a function, not the body of a class or of a file."""
    return bool(code.co_flags & CO_OPTIMIZED)


def is_imported_by(frame: FrameType | None, package: Path) -> bool:
    """Return whether a file of the package is being imported while a frame runs."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(f"{package}{os.sep}"):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        trace(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
