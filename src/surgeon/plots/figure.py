"""The look of all pictures, in one place: colours, lines, marks and axes; and the file of a picture."""

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from surgeon.checkpoint.overlap import check_named
from surgeon.errors import OutputError, PlanError
from surgeon.options import OptionError, Reads
from surgeon.text import printable

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind eyes tell apart (Color Universal Design, 2008). No line or bar is told by
# its colour alone: each has a line style and a mark, or a hatch, so that a print in grey says the same.
BLUE, RED, GREEN, ORANGE, SKY, PINK, BLACK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000"
GREY = "#595959"
PALETTE = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
MAP = "cividis"  # of heat maps: made for colour-blind eyes; its brightness rises all the way, so it can be grey
DOTS = 150  # an inch


def require_matplotlib() -> None:
    """Raises PlanError where matplotlib is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise PlanError("pictures need matplotlib", hint='pip install "surgeon[plot]"')


@cache
def _picture_class() -> Any:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure of matplotlib that a notebook shows without pyplot."""

        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, format="png", dpi=DOTS)
            return png.getvalue()

    return Picture


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib of a size in inches, which notebooks show. Raises PlanError without it."""
    require_matplotlib()
    return _picture_class()(figsize=(width, height), layout="constrained")


def line_style(number: int) -> dict[str, Any]:
    """Return the colour, the mark and the dashes of line `number`: 28 in a row differ, in grey too."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def spans_decades(values: Sequence[float]) -> bool:
    """Return whether finite values span two decades, so that an axis may be logarithmic; all others are linear."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) >= 100 * min(finite)


def scale(axes: Any, values: Sequence[float]) -> None:
    """Make the y axis of a plot logarithmic where its values span two decades; else it is linear."""
    if spans_decades(values):
        axes.set_yscale("log")


def clean(axes: Any) -> None:
    """Take the frame away on the two sides without an axis."""
    axes.spines[["top", "right"]].set_visible(False)


def whole_numbers(axis: Any, *, most: int | None = None) -> None:
    """Mark an axis at whole numbers only, at `most` so many steps."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto" if most is None else most, integer=True))


def entitle(figure: Any, title: str) -> None:
    """Write a title over a figure: what was measured, and on what."""
    figure.suptitle("\n".join(printable(line).replace("$", r"\$") for line in title.split("\n")), fontsize="medium")


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
        figure.savefig(path, dpi=DOTS)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="Name another file.") from error
    except ValueError as error:  # a suffix that matplotlib does not know
        raise OutputError(
            f"cannot write {path}: {error}", hint="Name a file that ends in .png, .svg or .pdf."
        ) from error
