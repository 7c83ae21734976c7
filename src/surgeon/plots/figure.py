"""The file of a picture: whether it can be drawn, and its writing."""

from pathlib import Path
from typing import Any

from surgeon.checkpoint.overlap import check_named
from surgeon.errors import OutputError, PlanError
from surgeon.options import OptionError, Reads

FORMATS = (".png", ".svg", ".pdf")


def require_matplotlib() -> None:
    """Raises PlanError where matplotlib is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise PlanError("pictures need matplotlib", hint='pip install "surgeon[plot]"')


def check_picture(path: Path, reads: Reads, *, overwrite: bool, option: str = "output") -> None:
    """Raises OptionError, PlanError or OutputError for a picture that could not be written: at once.

    One that exists is replaced with `overwrite` alone. `option` is the option that names it.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(option, f"cannot draw to {path}", hint=f"Name a file that ends in {', '.join(FORMATS)}.")
    check_named(path, reads, overwrite=overwrite)
    require_matplotlib()


def save(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib. Raises OutputError where the file cannot be written, or has an unknown suffix."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="Name another file.") from error
    except ValueError as error:  # a suffix that matplotlib does not know
        raise OutputError(
            f"cannot write {path}: {error}", hint="Name a file that ends in .png, .svg or .pdf."
        ) from error
