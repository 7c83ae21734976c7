"""A page of HTML that needs no other file: headings, sentences, tables, and pictures that it holds itself."""

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from surgeon.checkpoint.overlap import check_named
from surgeon.errors import OutputError
from surgeon.options import OptionError, Reads
from surgeon.plots.figure import require_matplotlib
from surgeon.text import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2433; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem 0.15rem 0; text-align: left; white-space: nowrap; }
th { border-bottom: 1px solid #7a8aa6; } tr:nth-child(even) td { background: #f4f6fa; }
"""


def check_page(path: Path, reads: Reads, *, overwrite: bool) -> None:
    """Raises OptionError or OutputError for a page that could not be written: known before anything is measured."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError("html", f"{path} is no name of a page", hint="Name a file that ends in .html.")
    check_named(path, reads, overwrite=overwrite)
    require_matplotlib()


def heading(words: str) -> str:
    """Return a heading."""
    return f"<h2>{_safe(words)}</h2>"


def sentences(words: Sequence[str]) -> str:
    """Return a list of sentences."""
    return f"<ul>{''.join(f'<li>{_safe(one)}</li>' for one in words)}</ul>"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table; one that is wider than the window is scrolled."""
    cells = "".join(f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in line)}</tr>\n" for line in lines)
    names = "".join(f"<th>{_safe(name)}</th>" for name in header)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead>\n<tbody>{cells}</tbody></table></div>'


def picture(figure: Any, description: str) -> str:
    """Return a figure of matplotlib as a picture inside the page."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png_picture(png.getvalue(), description)


def png_picture(png: bytes, description: str) -> str:
    """Return the content of a .png as a picture inside the page."""
    return f'<img alt="{_safe(description)}" src="data:image/png;base64,{b64encode(png).decode()}">'


def page_of(title: str, parts: Sequence[str]) -> bytes:
    """Return a page of these parts, as the content of a file."""
    head = f'<meta charset="utf-8"><title>{_safe(title)}</title><style>{STYLE}</style>'
    begin = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{_safe(title)}</h1>\n'
    return (begin + "\n".join(parts) + "\n</body></html>\n").encode("utf-8", "backslashreplace")


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of these parts. Raises OutputError where it cannot be written."""
    try:
        path.write_bytes(page_of(title, parts))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="Name another file.") from error


def _safe(words: str) -> str:
    return escape(printable(words))
