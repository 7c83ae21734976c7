"""Whether what a run replaces holds anything that it reads. Files are compared by where they lie, links included."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from surgeon.checkpoint.source import RESULTS
from surgeon.errors import HubError, OutputError
from surgeon.options import Reads
from surgeon.text import place_of

MOST_LINKS = 40  # that a path may lead through, as in the kernel
HINT = "Choose another place with -o."
Identity = tuple[int, int]  # a file system and a number in it: a bind mount gives a directory a second path


def check_replaced(target: Path, reads: Reads, *, what: str = "the output", hint: str = HINT) -> None:
    """Raises OutputError where replacing the directory `target` would remove or change something that is read.

    That is a file in it, the target of a link, a link on the way to it, and a directory that holds `target`.
    """
    place = Path(os.path.realpath(target))
    inside = set(_identities(place))
    for option, path in _named(reads):
        for location in _locations(path, without=place):
            if _lies_in(location, place, inside):
                held = "is" if location == place and _is_directory(path) else "holds"
                through = "" if location == Path(os.path.realpath(path)) else f", by way of {location}"
                raise OutputError(f"{what} {target} {held} what {option} reads: {path}{through}", hint=hint)
        if _is_directory(path) and _lies_in(place, path, {_identity(path)}) and not _is_result(place, path):
            raise OutputError(f"{what} {target} lies in what {option} reads: {path}", hint=hint)


def check_file_replaced(file: Path, reads: Reads) -> None:
    """Raises OutputError where writing over `file` would change something that is read."""
    if not file.exists():
        return
    steps, end = _followed(file)
    for option, path in _named(reads):
        is_same = not _is_directory(path) and path.samefile(file)  # also by a hard link: the file is written in place
        if is_same or {*steps, end} & set(_locations(path)) or (_is_directory(path) and _lies_in(end, path, set())):
            raise OutputError(f"{file} is, or belongs to, what {option} reads: {path}", hint="Name another file.")


def check_named(file: Path, reads: Reads, *, overwrite: bool) -> None:
    """Raises OutputError for a file that cannot be written by this name, that is read, or that is there already."""
    if not file.parent.is_dir():
        raise OutputError(f"no such directory: {file.parent}", hint=f"mkdir -p {file.parent}")
    check_file_replaced(file, reads)
    if os.path.lexists(file) and (not overwrite or file.is_dir()):
        raise OutputError(f"{file} exists", hint="Name another file, or add --overwrite.")
    if not os.access(file.parent, os.W_OK):
        raise OutputError(f"cannot write into {file.parent}", hint=f"Look: ls -ld {file.parent}")


def check_uploaded(repo_id: str, reads: Reads) -> None:
    """Raises HubError where an upload to a repository would replace a model or dataset on the Hub that is read."""
    for option, values in reads.items():
        for value in values:
            if not os.path.exists(value) and value.partition(":")[0].casefold() == repo_id.casefold():  # noqa: PTH110
                raise HubError(
                    f"--push-to-hub would replace what {option} reads: {value}",
                    hint="Push to another repository.",
                )


def _named(reads: Reads) -> Iterator[tuple[str, Path]]:
    """Yield all paths that are read, each with its option. What is on the Hub is read from its place in the cache."""
    for option, values in reads.items():
        for value in values:
            value = place_of(value)
            path = Path(value)
            with suppress(RuntimeError):  # ~name of a user without a home here
                path = path.expanduser()
            if os.path.lexists(path):
                yield option, path
            else:
                yield from ((option, place) for place in _cached(value))


def _cached(value: str) -> list[Path]:
    """Return the directories of the Hub's cache for the model and the dataset of this name, as far as there are any."""
    name = value.partition(":")[0]
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
        return []
    from huggingface_hub import constants

    folders = (Path(constants.HF_HUB_CACHE, f"{kind}--{name.replace('/', '--')}") for kind in ("models", "datasets"))
    return [folder for folder in folders if _is_directory(folder)]


def _locations(path: Path, *, without: Path | None = None) -> Iterator[Path]:
    """Yield where a file or directory lies, each link on the way to it, and the same for every link in a directory.

    Links to directories are followed. `without` is a directory whose content is left out, where it is a result.
    """
    pending, seen = [path], set()
    while pending:
        steps, end = _followed(pending.pop())
        yield from steps
        yield end
        if end in seen or not _is_directory(end):
            continue
        seen.add(end)
        for parent, directories, files in os.walk(end):
            here = Path(parent)
            pending += [here / name for name in (*directories, *files) if _is_link(here / name)]
            if without is not None and without != end:
                directories[:] = [
                    name for name in directories if here / name != without or not _is_result(without, end)
                ]


def _followed(path: Path) -> tuple[list[Path], Path]:
    """Return the links that a path leads through, each where it lies itself, and the file at the end."""
    links: list[Path] = []
    pending = list(reversed(path.absolute().parts))
    place = Path(pending.pop())
    while pending:
        part = pending.pop()
        if part == "..":
            place = place.parent
            continue
        step = place / part
        if not _is_link(step) or len(links) == MOST_LINKS:
            place = step
            continue
        links.append(step)
        pointed = step.readlink()
        place = Path(pointed.anchor) if pointed.is_absolute() else place
        pending += reversed(pointed.parts[1:] if pointed.is_absolute() else pointed.parts)
    return links, place


def _lies_in(location: Path, directory: Path, identities: "set[Identity | None]") -> bool:
    """Return whether a real path lies in a directory, or in one of the directories with these identities."""
    ways = (location, *location.parents)
    found = (_identity(way) for way in ways if not _is_link(way))
    return Path(os.path.realpath(directory)) in ways or any(identity in identities - {None} for identity in found)


def _is_result(place: Path, around: Path) -> bool:
    """Return whether a directory inside one that is read is a result, which was saved there and is not read."""
    is_cache = any(re.match(r"(models|datasets)--", part) for part in Path(os.path.realpath(around)).parts)
    return not is_cache and any((place / name).is_file() for name in RESULTS)


def _identities(directory: Path) -> "Iterator[Identity | None]":
    """Yield the identities of a directory and of all directories in it."""
    yield _identity(directory)
    for parent, names, _ in os.walk(directory):
        yield from (_identity(Path(parent, name)) for name in names if not _is_link(Path(parent, name)))


def _identity(path: Path) -> Identity | None:
    """Return the identity of a directory, None for anything else."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if _is_directory(path) else None


def _is_directory(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises where it may not look


def _is_link(path: Path) -> bool:
    return os.path.islink(path)  # noqa: PTH114  # the same
