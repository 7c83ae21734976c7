"""The rows that a run trains, where they are chosen before its first step: the options, and what was chosen."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.errors import DataError
from surgeon.options import Checked, OptionError, option

LESS, BM25, RANDOM = "less", "bm25", "random"
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%|(\d+)")


@dataclass(frozen=True, kw_only=True)
class SelectionSettings(Checked):
    """Which rows of the data a run trains: all, or those that are chosen for another text."""

    select: str | None = option(
        "Train only so many of the rows, those that help most with --select-for: 5%, or 500.",
        None,
        metavar="N",
        group="data",
    )
    select_for: tuple[str, ...] = option(
        "Data that the selected rows are to help with; not what the result is judged on. Repeatable.",
        (),
        metavar="DATA",
        reads=True,
        group="data",
    )
    select_by: str = option(
        "How rows are selected: less (gradients), bm25 (words in common), random.",
        LESS,
        metavar="METHOD",
        choices=(LESS, BM25, RANDOM),
        group="data",
    )
    select_warmup: float = option(
        "With less: passes over a random share of that size first; gradients are taken after them.",
        4.0,
        metavar="E",
        group="data",
    )

    def check_selection(self) -> None:
        """Raise OptionError for options of a selection that make no sense, alone or together."""
        if self.select is None:
            changed = {"select_for": bool(self.select_for), "select_by": self.select_by != LESS}
            if name := next((name for name, is_set in changed.items() if is_set), None):
                flag = f"--{name.replace('_', '-')}"
                raise OptionError(name, f"{flag} has no effect without --select", hint="Such as --select 5%.")
            return
        count(self.select, 1)
        if self.select_by == RANDOM and self.select_for:
            raise OptionError("select_for", "a random selection is for nothing", hint="Leave out --select-for.")
        if self.select_by != RANDOM and not self.select_for:
            raise OptionError(
                "select_for", "--select-for is missing: what are the rows to help with?", hint="Or --select-by random."
            )
        if not 0 <= self.select_warmup <= 100:
            raise OptionError(
                "select_warmup",
                f"--select-warmup is {self.select_warmup:g}",
                hint="Such as --select-warmup 4; 0: none.",
            )


def count(select: str, rows: int) -> int:
    """Return how many of so many rows "5%" or "500" is, 1 at least. Raises OptionError for anything else."""
    match = _SHARE.fullmatch(select.strip())
    share, number = (float(match[1] or 0), int(match[2] or 0)) if match else (0.0, 0)
    if number:
        return number
    if not 0 < share < 100:
        raise OptionError("select", f"--select {select!r} is no part of the rows", hint="Such as --select 5%.")
    return max(1, int(rows * share / 100 + 0.5))


@dataclass(frozen=True)
class Selected:
    """The pieces of a run's data that are trained, `of` so many. `data` is what they were chosen for, with its hash.

    `scores` are those of the chosen ones, in their order; nothing where the choice was random.
    """

    pieces: Sequence[int]
    of: int
    by: str
    data: Sequence[Mapping[str, Any]] = ()
    scores: Sequence[float] = ()

    def __str__(self) -> str:
        return f"{len(self.pieces):,} of {self.of:,} rows selected by {self.by}"

    def to_dict(self) -> dict[str, Any]:
        """Return this as a run's directory holds it."""
        return {
            "pieces": list(self.pieces),
            "of": self.of,
            "by": self.by,
            "data": [dict(each) for each in self.data],
            "scores": list(self.scores),
        }

    def recorded(self) -> dict[str, Any]:
        """Return this for the receipt: which rows, in runs "0-3,7", and what they were chosen for."""
        return {"rows": runs(self.pieces), "of": self.of, "by": self.by, "data": [dict(each) for each in self.data]}

    @classmethod
    def read(cls, content: Any, where: str) -> "Selected":
        """Return what a run's directory holds. Raises DataError for anything else."""
        fault = f"{where} holds no selection of rows"
        if not isinstance(content, dict) or not isinstance(content.get("pieces"), list):
            raise DataError(fault, hint="Remove it: the rows are selected again.")
        if not content["pieces"] or not all(type(piece) is int and piece >= 0 for piece in content["pieces"]):
            raise DataError(fault, hint="Remove it: the rows are selected again.")
        return cls(**{name: content[name] for name in ("pieces", "of", "by", "data", "scores")})


def runs(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, runs as "first-last"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
