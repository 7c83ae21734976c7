"""The file of a picture: whether it can be drawn, and its writing."""

from pathlib import Path
from typing import Any

from surgeon.checkpoint.overlap import check_file_replaced
from surgeon.errors import OutputError, PlanError
from surgeon.options import Reads

FORMATS = (".png", ".svg", ".pdf")


def require_matplotlib() -> None:
    """Raises PlanError where matplotlib is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise PlanError("pictures need matplotlib", hint='pip install "surgeon[plot]"')


def check_picture(path: Path, reads: Reads) -> None:
    """Raises PlanError or OutputError for a picture that could not be written: known before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise PlanError(f"cannot draw to {path}", hint=f"Name a file that ends in {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise OutputError(f"no such directory: {path.parent}", hint=f"mkdir -p {path.parent}")
    check_file_replaced(path, reads)
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
