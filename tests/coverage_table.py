"""The table of model types and verbs in docs/models.md, and its counts in README.md: written from cells, read back.

A cell has a `verdict` and the sentence `why` behind it (benchmarks/families.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

BEGIN, END = "<!-- families: written by benchmarks/families.py -->", "<!-- /families -->"
WORKS = ("exact", "within")
_BAD = ("wrong", "crash")


def write_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], page: Path, readme: Path) -> None:
    """Write the table into a page, and its counts into a README, between the markers of each."""
    page.write_text(_between(page.read_text(), f"\n{table(rows)}\n"))
    said = fill(counts(page.read_text()), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    readme.write_text(_between(readme.read_text(), f"{said}\n  "))


def said_in(text: str) -> str:
    """Return what stands between the markers of a page, on one line."""
    return " ".join(_inside(text).split())


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the table, its footnotes, and the types that have no row, with the reason."""
    built = {name: _merged(variants) for name, variants in sorted(rows.items()) if "build" not in variants.get("", {})}
    verbs = list(dict.fromkeys(verb for cells in built.values() for verb in cells))
    notes: dict[str, int] = {}
    lines = [f"| type | {' | '.join(verbs)} |", f"| --- |{' --- |' * len(verbs)}"]
    useless: dict[str, list[str]] = {}
    for name, cells in built.items():
        if not any(cell.verdict in (*WORKS, *_BAD) for verb, cell in cells.items() if verb != "inspect"):
            useless.setdefault(_reason(name, next(iter(cells.values())).why or "no verb works"), []).append(name)
            continue
        lines.append(f"| `{name}` | {' | '.join(_cell(name, cells.get(verb), notes) for verb in verbs)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    missing: dict[str, list[str]] = {}
    for name, variants in sorted(rows.items()):
        if "build" in variants.get("", {}):
            missing.setdefault(_reason(name, variants[""]["build"].why), []).append(name)
    for title, groups in (("No verb but `inspect` works", useless), ("No toy could be built", missing)):
        lines += ["", f"{title}:", "", *(f"- {_names(names)}: {reason}" for reason, names in groups.items())]
    return "\n".join(lines)


def counts(page: str) -> str:
    """Return the sentence of README.md that counts the cells of a page's table."""
    lines = [line for line in _inside(page).splitlines() if line.startswith("| ")]
    verbs = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]]
    found = Counter(verb for row in cells for verb, cell in zip(verbs, row, strict=True) if cell.startswith(WORKS))
    said = ", ".join(f"{verb} {found[verb]}" for verb in verbs)
    return f"Of {len(cells)} model types, each built tiny and judged by transformers alone, these work: {said}."


def _merged(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cells of a type: of its variants the worst, where a verb works for both the lesser claim."""
    order = ("exact", "within", "refused", "wrong", "crash")
    merged = dict(variants[""])
    for cells in variants.values():
        for verb, cell in cells.items():
            if verb in merged and order.index(cell.verdict) > order.index(merged[verb].verdict):
                merged[verb] = cell
    return merged


def _cell(name: str, cell: Any, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell.verdict in WORKS:
        return str(cell.verdict)
    number = notes.setdefault(_reason(name, cell.why), len(notes) + 1)
    return f"{'**' + cell.verdict + '**' if cell.verdict in _BAD else 'no'} {number}"


def _reason(name: str, why: str) -> str:
    """Return a sentence that is the same for all types for which the reason is the same."""
    why = re.sub(r"\S*/(whole|as published)/toy", "it", why)
    why = re.sub(rf"\b{re.escape(name)}(_text)?\b", "the type", why)
    return re.sub(r"\b\d+(-\d+)?\b", "n", why).replace("|", "/")[:300]


def _names(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def _inside(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0]


def _between(text: str, new: str) -> str:
    before, marker, rest = text.partition(BEGIN)
    assert marker, "the markers are missing"
    return f"{before}{BEGIN}\n{new}{END}{rest.partition(END)[2]}"
