"""What may have been meant by a word or a path that was mistyped."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

CLOSE = 0.65  # of the likeness that difflib gives two texts, from 0 to 1
MOST_NAMES = 2000  # of a directory that are looked at


def close_word(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like a word, whatever its case; None where none is close."""
    by_lower = {each.lower(): each for each in known}
    close = get_close_matches(word.lower(), by_lower, n=1, cutoff=CLOSE)
    return by_lower[close[0]] if close else None


def close_to(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" where something known is close to a word, else nothing."""
    close = close_word(word, known)
    return "" if close is None else f"; did you mean {close}?"


def close_path(path: str | os.PathLike[str], *, directory: bool = False) -> str | None:
    """Return the path beside `path` whose name is most like its own, spelled as the user would; None without one.

    It is a file or a directory; with `directory` a directory.
    """
    place = Path(path)
    try:
        beside = list(islice(place.parent.expanduser().iterdir(), MOST_NAMES))
        names = [each.name for each in beside if not directory or each.is_dir()]
    except (OSError, ValueError, RuntimeError):  # ValueError: a NUL in the name; RuntimeError: ~name of nobody
        return None
    names = [name for name in names if not name.startswith(".") or place.name.startswith(".")]
    alike = [name for name in names if close_word(place.stem, [Path(name).stem])]  # ".txt" makes no two names alike
    close = close_word(place.name, alike)
    return None if close is None or close == place.name else str(place.with_name(close))


def hint_beside(path: str | os.PathLike[str], hint: str, *, directory: bool = False) -> str:
    """Return "Did you mean ...?" where something beside a path that does not exist is close to it, else `hint`."""
    close = close_path(path, directory=directory)
    return hint if close is None else f"Did you mean {close}?"
