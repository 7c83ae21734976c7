"""Checkpoints of a run: each is written whole or not at all, and a resumed run takes the newest one that is whole.

A checkpoint is filled under a hidden name, gets MANIFEST.json last, and is synced and renamed. So a killed run leaves
whole checkpoints and hidden leftovers, and the next run removes the leftovers. A manifest finds damage; it is no
signature: whoever can write into the directory can write a manifest too, so read pickles with weights_only.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

from filelock import FileLock, Timeout

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.header import Entry, read_header
from surgeon.checkpoint.output import as_output_error, publish, sync_tree, write_whole
from surgeon.checkpoint.source import CONFIG, INDEX, WEIGHTS, LocalSource, spec_of
from surgeon.errors import CheckpointError, OutputError

MANIFEST = "MANIFEST.json"
VERSION = 1
NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
LOCK = ".surgeon.lock"  # held while a run writes into its directory; the system drops it with the process
LEFTOVER = re.compile(r"\.checkpoint-\d+\.(partial|surgeon-old-\d+)")
THREADS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter's lock
CHUNK = 1 << 24  # bytes read at a time in the search for numbers that are not finite

OPTIMIZER = "optimizer.pt"
# The files that a resume needs, under the names that one process, DDP, FSDP or DeepSpeed give them. Trainer goes on
# without an optimizer, a schedule or a random state, and then no longer continues the run that was interrupted.
_SHARDS = r"global_step\d+/.+"  # DeepSpeed's own directory
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "trainer_state.json": (r"trainer_state\.json",),
    OPTIMIZER: (r"optimizer\.(pt|bin)", r"optimizer_\d+/.+", _SHARDS),
    "scheduler.pt": (r"scheduler\.pt", _SHARDS),
    "rng_state.pth": (r"rng_state\.pth", r"rng_state_0\.pth"),
    "weights (model.safetensors or adapter_model.safetensors)": (
        r"(adapter_)?model(-\d+-of-\d+)?\.safetensors",
        r"pytorch_model_fsdp(_\d+/.+|\.bin)",
        _SHARDS,
    ),
}
_STATES = re.compile(r"optimizer\.(pt|bin)|optimizer_\d+/.+")  # of the optimiser; DeepSpeed's hold the weights too
FINISHED = "finished"  # in the manifest of a checkpoint of a finished run, from which no step is trained
_RANK = re.compile(r"rng_state_(\d+)\.pth")
_BITS_OF_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00}  # all ones in the exponent: infinite or not a number


class DamagedCheckpointError(CheckpointError):
    """A run's checkpoint differs from its manifest, lacks a file, or holds weights that are not finite."""


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Make a run directory, keep other runs out of it, and remove the leftovers of killed ones.

    Raises OutputError where another run writes into it, or where it cannot be made.
    """
    lock = FileLock(run_dir / LOCK, timeout=0)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"another run writes into {run_dir}", hint="Wait for it, or choose --run-dir.") from error
    except OSError as error:
        hint = "Choose another place with --run-dir."
        raise OutputError(f"cannot write {error.filename or run_dir}: {error.strerror}", hint=hint) from error
    try:
        sweep(run_dir)
        yield
    finally:
        with suppress(OSError):
            (run_dir / LOCK).unlink()
        lock.release()


def stage_path(run_dir: Path, step: int) -> Path:
    """Return the hidden directory in which checkpoint `step` is written, as `checkpoint-<step>`, by all processes."""
    return run_dir / f".checkpoint-{step}.partial"


def begin(run_dir: Path, step: int) -> Path:
    """Make the stage of checkpoint `step` and return it, after removing the leftovers of killed runs.

    One process calls this; others that save with it wait, then fill `checkpoint-<step>` in `stage_path` too.
    Raises OutputError when it cannot be made.
    """
    stage = stage_path(run_dir, step)
    try:
        sweep(run_dir)
        (stage / _name(step)).mkdir(parents=True)
    except OSError as error:
        raise as_output_error(error, run_dir / _name(step)) from error
    return stage


def commit(run_dir: Path, step: int) -> Path:
    """Write the manifest of a stage that all processes have filled, sync it, and return it as the new checkpoint.

    Raises OutputError when the disk is full or refuses, DamagedCheckpointError where a file is missing. Then, and after
    an interruption, there is no new checkpoint, and an older one of this step is still there.
    """
    stage, target = stage_path(run_dir, step), run_dir / _name(step)
    made = stage / _name(step)
    try:
        _write_manifest(made, step)
        sync_tree(made)
        publish(made, target, overwrite=True)
    except OSError as error:
        raise as_output_error(error, target) from error
    finally:
        abandon(run_dir, step)
    return target


def abandon(run_dir: Path, step: int) -> None:
    """Remove a stage, if there is one."""
    shutil.rmtree(stage_path(run_dir, step), ignore_errors=True)


@contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Turn the errors of a checkpoint that cannot be written into an OutputError that says where and why."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise as_output_error(error, run_dir) from error
    except (RuntimeError, SafetensorError) as error:
        text = str(error)
        # of a full disk torch reports only the position of its zip writer; safetensors passes on the system's error
        if "inline_container" not in text and "PytorchStreamWriter" not in text and "os error" not in text:
            raise
        free = shutil.disk_usage(run_dir).free
        raise OutputError(
            f"a checkpoint could not be written to {run_dir}, where {free / 1e9:.2f} GB are free",
            hint="Free some space, or keep fewer checkpoints with --keep-checkpoints.",
        ) from error


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first. They are not checked."""
    if not run_dir.is_dir():
        return []
    return sorted((path for path in run_dir.iterdir() if NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(directory: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = NAME.fullmatch(directory.name)
    assert match is not None, f"{directory} is no checkpoint's name"
    return int(match[1])


def newest(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that verifies, None where there is none; call `warn` for each one that does not."""
    for directory in reversed(checkpoints(run_dir)):
        try:
            check(directory)
        except DamagedCheckpointError as error:
            warn(f"{error}; an older checkpoint is looked for")
        else:
            return directory
    return None


def rotate(run_dir: Path, keep: int, protect: Collection[int] = ()) -> list[int]:
    """Remove all but the `keep` newest checkpoints and those of the steps in `protect`; return the steps removed.

    Each is hidden by a rename first, so that a kill leaves no partial checkpoint under its name.
    """
    assert keep > 0, "a run keeps its newest checkpoint"
    old = [path for path in checkpoints(run_dir)[:-keep] if step_of(path) not in protect]
    for path in old:
        hidden = run_dir / f".{path.name}.surgeon-old-{os.getpid()}"
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
        except OSError as error:
            hint = f"Look at it: ls -ld {path}"
            raise OutputError(f"cannot remove {path}: {error.strerror}", hint=hint) from error
        shutil.rmtree(hidden, ignore_errors=True)
    return [step_of(path) for path in old]


def settle(run_dir: Path, protect: Collection[int] = ()) -> tuple[list[Path], int]:
    """Keep the newest checkpoint of a finished run and those of `protect`, without their optimiser's states.

    Returns those that are left, and how many bytes were removed. Of what is left a run can write its result again, but
    not train on. Killed at any moment, it leaves checkpoints that verify.
    """
    before = size_of(run_dir)
    rotate(run_dir, 1, protect)
    left = checkpoints(run_dir)
    for directory in left:
        _drop_states(directory)
    return left, before - size_of(run_dir)


def _drop_states(directory: Path) -> None:
    """Remove the optimiser's states of a checkpoint, after its manifest, which then says that the run is finished."""
    try:
        files, is_finished = _read_manifest(directory)
    except DamagedCheckpointError:  # left for someone to look at
        return
    states = [name for name in _files(directory) if _STATES.fullmatch(name)]
    if states and not is_finished:
        kept = {name: facts for name, facts in files.items() if name not in states}
        with _as_output(directory):
            write_whole(directory / MANIFEST, [_manifest(step_of(directory), kept, is_finished=True)])
    with _as_output(directory):
        for name in states:
            (directory / name).unlink()
        for parent in {(directory / name).parent for name in states} - {directory}:
            parent.rmdir()


@contextmanager
def _as_output(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise as_output_error(error, place) from error


def size_of(directory: Path) -> int:
    """Return the bytes of all files below a directory."""
    found = 0
    for path in directory.rglob("*"):
        with suppress(OSError):  # one that goes while we look
            found += path.lstat().st_size if not path.is_dir() else 0
    return found


def sweep(run_dir: Path) -> None:
    """Remove the hidden leftovers of killed runs. Only the process that has the run directory to itself may do so."""
    leftovers = [path for path in run_dir.iterdir() if LEFTOVER.fullmatch(path.name)] if run_dir.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def check(directory: Path) -> None:
    """Confirm that a checkpoint is whole, byte for byte, complete, and of finite weights.

    Raises DamagedCheckpointError naming the file at fault. Nothing is unpickled. Every byte is read and hashed; the
    bytes of weights are read twice.
    """
    files, is_finished = _read_manifest(directory)
    present = _files(directory)
    if is_finished:  # its states may be on their way out
        present = [name for name in present if not _STATES.fullmatch(name)]
    for name in files:
        if name not in present:
            _refuse(directory, f"lacks {name}, which its manifest names")
    for name in present:
        if name not in files:
            _refuse(directory, f"has a file {name} that its manifest does not name")
    _check_complete(directory, files, is_finished=is_finished)
    for name, (size, _) in files.items():
        if (real := (directory / name).stat().st_size) != size:
            fault = "is truncated" if real < size else "is too long"
            _refuse(directory, f"is damaged: {name} {fault}, {real} bytes instead of {size}")
    with ThreadPoolExecutor(THREADS) as pool:
        for name, digest in zip(files, pool.map(lambda name: _sha256(directory / name), files), strict=True):
            if digest != files[name][1]:
                _refuse(directory, f"is damaged: {name} is not what was written (its sha256 differs)")
    _check_weights(directory, present)


def _name(step: int) -> str:
    return f"checkpoint-{step}"


def _write_manifest(directory: Path, step: int) -> None:
    """Write the manifest of a complete directory."""
    names = _files(directory)
    _check_complete(directory, names)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda name: _sha256(directory / name), names))
    files = {name: ((directory / name).stat().st_size, digest) for name, digest in zip(names, digests, strict=True)}
    (directory / MANIFEST).write_bytes(_manifest(step, files))
    mode = (directory / MANIFEST).stat().st_mode & 0o777  # by the umask: safetensors lets only the owner read
    with suppress(OSError):  # on a file system without permissions
        for name in names:
            (directory / name).chmod(mode)


def _manifest(step: int, files: Mapping[str, tuple[int, str]], *, is_finished: bool = False) -> bytes:
    """Return a manifest: of each file its size and sha256."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    content = {"version": VERSION, "step": step, **({FINISHED: True} if is_finished else {}), "files": listed}
    return (json.dumps(content, indent=1) + "\n").encode()


def _read_manifest(directory: Path) -> tuple[dict[str, tuple[int, str]], bool]:
    """Return size and sha256 of every file in a manifest, and whether the run was finished."""
    if not directory.is_dir():
        _refuse(directory, "is no directory")
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        empty = not any(directory.iterdir())
        _refuse(directory, "is empty" if empty else f"has no {MANIFEST}: it was not written whole, or not by surgeon")
    except (OSError, ValueError, RecursionError) as error:
        _refuse(directory, f"has a {MANIFEST} that cannot be read: {error}")
    try:
        if manifest["version"] != VERSION:
            _refuse(directory, f"has a {MANIFEST} of version {manifest['version']}, not {VERSION}")
        if manifest["step"] != step_of(directory):
            _refuse(directory, f"says in its {MANIFEST} that it is the checkpoint of step {manifest['step']}")
        files = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        _refuse(directory, f"has a {MANIFEST} of another form")
    for name in files:  # names are only ever looked up inside the directory
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            _refuse(directory, f"has a {MANIFEST} that names {name!r}, outside of it")
    return files, manifest.get(FINISHED) is True


def _files(directory: Path) -> list[str]:
    """Return all files below a directory by their relative POSIX names, without the manifest and hidden ones."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if not path.is_dir())
    visible = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in visible if name != MANIFEST)  # file systems and desktops leave hidden files


def _check_complete(directory: Path, names: Collection[str], *, is_finished: bool = False) -> None:
    for part, patterns in REQUIRED.items():
        if is_finished and part == OPTIMIZER:
            continue
        if not any(re.fullmatch(pattern, name) for pattern in patterns for name in names):
            _refuse(directory, f"has no {part}; a run cannot go on from it exactly")
    ranks = {int(match[1]) for name in names if (match := _RANK.fullmatch(name))}
    if missing := set(range(max(ranks, default=-1) + 1)) - ranks:
        _refuse(directory, f"has no rng_state_{min(missing)}.pth, the random state of one of its processes")


def _check_weights(directory: Path, names: Collection[str]) -> None:
    """Refuse weights that are incomplete, as far as headers and the family's table can tell, or not finite."""
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    try:
        if WEIGHTS in names or INDEX in names:
            source = LocalSource(directory, str(directory))
            assert source.tensors
            if CONFIG in names:
                read_anatomy(spec_of(source))
        headers = {name: read_header(directory / name) for name in weights}
    except CheckpointError as error:
        raise DamagedCheckpointError(f"{directory} is damaged: {error}", hint=_HINT) from error
    for file, entries in headers.items():
        if (tensor := _first_nonfinite(directory / file, entries)) is not None:
            _refuse(directory, f"holds numbers that are not finite in {tensor!r} of {file}")


def _first_nonfinite(path: Path, entries: Mapping[str, Entry]) -> str | None:
    """Return the first tensor with an infinity or a NaN, None where there is none."""
    with path.open("rb") as file:
        for name, entry in entries.items():
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                raw = file.read(min(CHUNK, left))
                left -= len(raw)
                if not _is_finite(raw, entry.spec.dtype):
                    return name
    return None


def _is_finite(raw: bytes, dtype: str) -> bool:
    """Return whether all numbers are finite. Integers are; no run trains 8-bit floats."""
    import numpy as np

    if bits := _BITS_OF_INFINITY.get(dtype):
        return int((np.frombuffer(raw, np.uint16) & np.uint16(bits)).max()) < bits
    kind = {"F32": np.float32, "F64": np.float64}.get(dtype)
    return kind is None or bool(np.isfinite(np.frombuffer(raw, kind)).all())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_HINT = "Resume from an older one, or start again: nothing of it can be trusted."


def _refuse(directory: Path, fault: str) -> NoReturn:
    raise DamagedCheckpointError(f"{directory} {fault}", hint=_HINT)
