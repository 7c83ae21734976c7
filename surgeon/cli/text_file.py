"""A text that an option names by its file."""

from pathlib import Path

from surgeon.errors import DataError


def read_text(path: Path) -> str:
    """Return what a file holds, to the last newline. Raises DataError where it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint=f"Look: ls -l {path}") from error
    except UnicodeDecodeError as error:
        hint = f"Convert it: iconv -f LATIN1 -t UTF-8 {path}"
        raise DataError(f"{path} is not UTF-8 at byte {error.start}", hint=hint) from error
