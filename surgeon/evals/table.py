"""Figures as people read them, and as a block for a model card."""

from collections.abc import Sequence
from pathlib import Path

from surgeon import text


def short(label: str) -> str:
    """Return what a model or file is called: a path's last part, for where it lies here says nothing elsewhere."""
    return (Path(label).name or label) if Path(label).exists() else label


def plus_minus(value: float, error: float | None) -> str:
    """Return "24.2176 ± 0.84"."""
    return f"{value:.6g}" + ("" if error is None else f" ± {error:.2g}")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cell(word) for word in line)} |" for line in cells)


def cell(content: str) -> str:
    """Return text that stays inside its cell."""
    return text.printable(content).replace("|", r"\|")
