"""How a result shows itself: one line in a console, its text where it is printed, tables in a notebook."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from secrets import token_hex

from surgeon import text
from surgeon.text import Layout, printable

LONGEST = 300  # characters of a line in a console


class Shown:
    """A result with a `headline` and a `to_text`: its repr is one line, and a notebook shows its text as tables."""

    __slots__ = ()

    @property
    def headline(self) -> str:
        """The result in a few words, for a line in a console."""
        return ""

    def to_text(self) -> str:
        """Return the result for people."""
        return repr(self)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        words = printable(self.headline)
        words = words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."
        return f"<{type(self).__name__}{': ' if words else ''}{words}>"

    def _repr_html_(self) -> str:
        return html_of(self)


def html_of(shown: Shown) -> str:
    """Return the text of a result as HTML: its rows and tables as tables, the rest as paragraphs, all of it escaped."""
    with _tables() as layout:
        written = shown.to_text()
    parts = []
    for block in re.split(f"({layout.mark}[0-9]+;)", written):
        if block.startswith(layout.mark):
            parts.append(layout.made[int(block.removeprefix(layout.mark)[:-1])])
        elif words := block.strip():
            parts.append(f'<p style="white-space: pre-line">{_safe(words)}</p>')
    return f"<div>{''.join(parts)}</div>"


def table_of(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML; without a header the first cell of each line is its name."""
    head = f"<thead>{_line('th', header)}</thead>" if header else ""
    first = "td" if header else "th"
    body = "".join(_line("td", line, first=first) for line in lines)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _line(tag: str, cells: Sequence[str], *, first: str | None = None) -> str:
    tags = [first or tag, *[tag] * (len(cells) - 1)]
    left = 'style="text-align: left"'
    return f"<tr>{''.join(f'<{tag} {left}>{_safe(cell)}</{tag}>' for tag, cell in zip(tags, cells, strict=True))}</tr>"


class _Tables(Layout):
    """Keeps each piece of a text as a table, and puts a mark in its place that nobody can foresee."""

    def __init__(self) -> None:
        self.mark = f"{token_hex(16)}:"
        self.made: list[str] = []

    def rows(self, pairs: Sequence[tuple[str, str]]) -> str:
        return self._keep(table_of((), pairs))

    def table(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        return self._keep(table_of(header, lines))

    def _keep(self, html: str) -> str:
        self.made.append(html)
        return f"{self.mark}{len(self.made) - 1};"


@contextmanager
def _tables() -> Iterator["_Tables"]:
    layout = _Tables()
    before = text.LAYOUT.set(layout)
    try:
        yield layout
    finally:
        text.LAYOUT.reset(before)


def _safe(words: str) -> str:
    return escape(words if words.isprintable() else "".join(c if c == "\n" else printable(c) for c in words))
