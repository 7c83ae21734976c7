"""The directory of a run: what was asked of it, so that a resume continues that run and no other."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.checkpoint.receipt import to_bytes
from surgeon.errors import OutputError, PlanError
from surgeon.train.metrics import METRICS

REQUEST = "run.json"
RATE = "lr.json"  # what --lr auto found
DATA = "data.json"  # what was read: a resume reads the same


def claim(
    run_dir: Path, *, resume: bool, model: Mapping[str, Any], data: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """Note in an empty directory what is asked, or check that it is what the run that is there was asked.

    A run that failed before its first step, for want of data, say, was none: what is asked now takes its place.
    Raises OutputError for a directory that holds a run without `resume`, or something else; PlanError for another run.
    """
    asked = {"model": dict(model), "data": list(data), "settings": dict(settings)}
    file = run_dir / REQUEST
    if not file.exists():
        if any(not path.name.startswith(".") for path in run_dir.iterdir()):
            raise OutputError(f"{run_dir} is not empty, and holds no run", hint="Choose another place with --run-dir.")
        write_json(file, asked)
        return
    if not (run_dir / METRICS).exists():
        for name in (RATE, DATA):
            (run_dir / name).unlink(missing_ok=True)
        write_json(file, asked)
        return
    if not resume:
        hint = "Continue it with --resume, remove it, or choose another place with --run-dir."
        raise OutputError(f"{run_dir} holds a run", hint=hint)
    if differs := _difference(read_json(file), json.loads(to_bytes(asked))):
        what, was, now = differs
        raise PlanError(
            f"the run in {run_dir} began with {what} {was}, and {now} is asked for now",
            hint="Resume it with what it began with, or begin anew with another --run-dir.",
        )


def read_json(file: Path) -> Any:
    """Return what a file of a run holds. Raises OutputError for one that is damaged."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        hint = "Remove the run's directory, or choose another with --run-dir."
        raise OutputError(f"{file} is damaged: it is no JSON", hint=hint) from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file of a run, whole or not at all."""
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.write_bytes(to_bytes(content))
        beside.replace(file)
    except OSError as error:
        hint = "Free some space, or choose another place with --run-dir."
        raise OutputError(f"cannot write {file}: {error.strerror}", hint=hint) from error


def _difference(before: Any, now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first thing in which two requests differ: its name, and both values."""
    if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
        return "a request", before, "this one"
    flat = [
        {f"the {key}": content.get(key) for key in ("model", "data")}
        | {f"--{name.replace('_', '-')}": value for name, value in content["settings"].items()}
        for content in (before, now)
    ]
    was, asked = flat
    return next(((name, was.get(name), value) for name, value in asked.items() if was.get(name) != value), None)
