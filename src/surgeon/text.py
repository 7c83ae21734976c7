"""Numbers, tables and lists as plain text for people."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from itertools import groupby
from typing import Any


def printable(text: str) -> str:
    """Return text without the control characters that a hostile checkpoint could put into a name."""
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shortened(name: str) -> str:
    """Return a name of a length that can be read: of a longer one the beginning and the end."""
    return name if len(name) <= 120 else f"{name[:80]}...{name[-30:]}"


SCRUBBED = "***"
# Secrets by their form: tokens of the Hub, user and password of a URL, values of options and of parts of a query.
_SECRETS = re.compile(
    r"""\b(?:hf|api_org)_[A-Za-z0-9]{16,}
    |(?<=://)[^/\s@'"]+(?=@)
    |(?<=Basic\s)(?=[A-Za-z0-9+/]*[0-9+/=])(?=\S*[A-Z])[A-Za-z0-9+/]{8,}=*
    |(?i:(?<=bearer\s)[\w.~+/=-]+)
    |(?P<query>(?i:(?<=[?&])[\w-]*(?:token|key|signature|secret|password|credential|policy)[\w-]*=))[^&\s'"]+
    |(?P<option>(?i:--(?!experts-per-)(?:[\w-]+-)?(?:token|api-key|password|secret)[=\s]))(?!\d{1,6}\b)\S+""",
    re.VERBOSE,
)
_SECRET_NAMES = re.compile(r".*(TOKEN|API_KEY|SECRET|SECRET_KEY|ACCESS_KEY|PASSWORD|PASSWD)")
_SHORTEST = 8  # characters of a secret in the environment; a shorter value may be a word


def scrubbed(text: str) -> str:
    """Return text without tokens and passwords: those of the environment, and what is one by its form."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAMES.fullmatch(name):
            text = text.replace(value, SCRUBBED)
    return _SECRETS.sub(lambda match: f"{match['query'] or match['option'] or ''}{SCRUBBED}", text)


def size(nbytes: float) -> str:
    """Return a number of bytes with a unit, in powers of ten: "538 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(written: str) -> int | None:
    """Return the number of bytes in "5GB", "500MB", "2GiB" or "1000", None for a text that is no size above zero."""
    word = written.strip().upper()
    number = word.rstrip("KMGTIB")
    try:
        result = int(float(number) * _UNITS[word[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        return None
    return result if result >= 1 else None


_COUNT = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE]\+?[0-9]{1,2})?)\s*([KMBT]?)\s*", re.IGNORECASE)
_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: float | str) -> int | None:
    """Return the number in 6.7e9, "100M" or "6.7B", rounded down; None for what is no number from 0 on."""
    match = _COUNT.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str) and match is None:
        return None
    number = float(value) if match is None else float(re.sub("[_,]", "", match[1])) * _THOUSANDS[match[2].upper()]
    return int(number) if 0 <= number < 1e18 else None


_SLICED = re.compile(r"(.+)\[(\d{0,12}%?):(\d{0,12}%?)\]")


def sliced(spec: str) -> tuple[str, str, str]:
    """Return a data argument without its slice, and where that begins and ends: "rows.jsonl[:90%]" has "" and "90%".

    One without a slice has "" and "". A file of that very name goes before a slice.
    """
    found = None if os.path.lexists(spec) else _SLICED.fullmatch(spec)
    return (spec, "", "") if found is None else (found[1], found[2], found[3])


def place_of(spec: str) -> str:
    """Return the path in a data argument: without its slice, and without the split of a dataset that is saved there."""
    name = sliced(spec)[0]
    place, _, split = name.rpartition(":")
    is_saved = bool(place and split) and not os.path.lexists(name) and os.path.isdir(os.path.expanduser(place))  # noqa: PTH111, PTH112
    return place if is_saved else name


class Layout:
    """How the rows and tables of a text are laid out: in aligned columns. `showing.py` has another, for notebooks."""

    def rows(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Return lines of "name  value" with the values aligned."""
        width = max((len(name) for name, _ in pairs), default=0)
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in pairs)

    def table(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        """Return a table with aligned columns."""
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        padded = (
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in (header, *lines)
        )
        return "\n".join(f"  {line}".rstrip() for line in padded)


LAYOUT: ContextVar[Layout] = ContextVar("layout", default=Layout())  # noqa: B039  (it holds nothing)


def rows(pairs: Iterable[tuple[str, str]]) -> str:
    """Return lines of "name  value" with the values aligned."""
    return LAYOUT.get().rows([(printable(name), printable(value)) for name, value in pairs])


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns."""
    names, *cells = [[printable(cell) for cell in line] for line in (header, *lines)]
    return LAYOUT.get().table(names, cells)


def layers(layer_map: Sequence[int | None]) -> str:
    """Return a layer map as ranges: "0-5, 8, new"."""
    words: list[str] = []
    start = 0
    for i in range(1, len(layer_map) + 1):
        before = layer_map[i - 1]
        if i < len(layer_map) and before is not None and layer_map[i] == before + 1:
            continue
        first = layer_map[start]
        words.append("new" if before is None else str(before) if first == before else f"{first}-{before}")
        start = i
    return ", ".join(words)


def sources(layer_map: Sequence[int | None], mlp_map: Sequence[int | None] | None = None) -> str:
    """Return where the layers come from: "source layers 0-5, 8", or where they were re-paired, of each half."""
    if mlp_map is None:
        return f"source layers {layers(layer_map)}"
    return f"attentions of source layers {layers(layer_map)}; MLPs of {layers(mlp_map)}"


def few(files: Sequence[str]) -> str:
    """Return the names of one or two files, or the number of files."""
    return ", ".join(map(shortened, files)) if len(files) <= 2 else f"{len(files)} files"


_DEEPEST = 4  # values inside values that are said; a hostile file may hold thousands


def spoken(value: Any, depth: int = 0) -> str:
    """Return a value of JSON in words, without its punctuation: "type yarn, factor 4, list (1, 2)"."""
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str) or not isinstance(value, Mapping | list | tuple):
        return str(value) or "(empty)"
    if depth > _DEEPEST:
        return "..."
    inner = {True: "({})", False: "{}"}
    said = [
        inner[isinstance(item, Mapping | list | tuple) and bool(item)].format(spoken(item, depth + 1))
        for item in (value.values() if isinstance(value, Mapping) else value)
    ]
    named = map("{} {}".format, value, said) if isinstance(value, Mapping) else said
    return ", ".join(named) or "(empty)"


def brief(value: Any) -> str:
    """Return a config value as short text: repeated words are counted, long values cut."""
    if value is None:
        return "(absent)"
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value):
        return runs(value)
    words = spoken(value)
    return words if len(words) <= 60 else f"{words[:57]}..."


def listing(names: Sequence[str]) -> str:
    """Return the number of names, and the first three."""
    shown = ", ".join(map(shortened, names[:3]))
    return f"{len(names)}" + (f"  ({shown}{', ...' if len(names) > 3 else ''})" if names else "")


def runs(kinds: Sequence[str]) -> str:
    """Return "sliding x5, full, sliding x5, full" for a list of kinds."""
    words: list[str] = []
    for kind, group in groupby(kind.removesuffix("_attention") for kind in kinds):
        count = len(list(group))
        words.append(kind if count == 1 else f"{kind} x{count}")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Return a time with units: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


FEW_DIGITS = 1e7  # from here on a number is written with an exponent


def plus_minus(value: float, error: float | None) -> str:
    """Return "24.22 ± 0.84": as many digits as the error makes sense of, two of its own; without an error four."""
    if error is None or not 0 < error < math.inf or abs(value) >= FEW_DIGITS:
        return f"{value:.4g}" if error is None else f"{value:.6g} ± {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
