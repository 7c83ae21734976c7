"""The texts of a search: rows to search on, rows to fit a repair on, and rows that only judge. No row serves twice."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import Source
from surgeon.errors import DataError
from surgeon.measure.calibration import Calibration, read_calibration, sample_calibration
from surgeon.models.streaming import check_runs

if TYPE_CHECKING:
    from torch import Tensor

SEARCHED = 4  # one of so many rows is searched on, and one of so many of these screens
HELD = 8  # one of so many rows chooses a repair
ITSELF = "text by the model itself"


@dataclass(frozen=True, eq=False)
class SearchText:
    """Rows of tokens by what they are for, each of shape (R, T); `watch` and `held` are None without a second text.

    `held` are rows of that text that a repair is chosen by and not fitted to. `confirm` has the judging rows of each
    text by its name; `origins` say where rows are from, and their hashes.
    """

    screen: "Tensor"
    search: "Tensor"
    fit: "Tensor"
    watch: "Tensor | None"
    held: "Tensor | None"
    confirm: Mapping[str, "Tensor"]
    origins: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> dict[str, "Tensor"]:
        """The rows of each stage that measures."""
        found = {"screen": self.screen, "search": self.search, **self.confirm}
        return found if self.watch is None else {**found, "watch": self.watch}

    def __str__(self) -> str:
        rows, length = self.search.shape
        names = ", ".join(self.confirm)
        return f"{rows} x {length} = {rows * length:,} tokens to search on, {len(self.fit)} rows to fit on, of {names}"


@dataclass
class _Parts:
    search: list["Tensor"] = field(default_factory=list)
    fit: list["Tensor"] = field(default_factory=list)
    confirm: dict[str, "Tensor"] = field(default_factory=dict)
    origins: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def search_text(
    source: Source,
    data: Sequence[str],
    eval_data: Sequence[str],
    *,
    samples: int,
    sequence_length: int,
    device: str,
    seed: int,
    columns: str | None = None,
) -> SearchText:
    """Return the rows of a search: of each text as many, in turns; without `data` rows that the model writes.

    `samples` rows fit, a quarter as many are searched on, and as many confirm on each text. The rows of `eval_data`
    watch and confirm, and are not searched on. Raises DataError for a text with too few rows.
    """
    check_runs(source)
    searched = max(2, samples // SEARCHED)
    parts = _Parts()
    names = list(dict.fromkeys(data)) or [ITSELF]
    share = max(1, -(-searched // len(names))), max(1, -(-samples // len(names))), samples
    for name in names:
        text = _read(source, name, sum(share), sequence_length, device=device, seed=seed, columns=columns)
        found, fit, confirm = _split(text.tokens, share, name)
        parts.search.append(found)
        parts.fit.append(fit)
        parts.confirm[name] = confirm
        _note(parts, name, text)
    watch, held = [], []
    for name in dict.fromkeys(eval_data):
        if name in parts.confirm:
            raise DataError(
                f"{name} is searched on, so it cannot watch the search", hint="Give --eval-data another text."
            )
        amount = searched, max(2, samples // HELD), samples
        text = _read(source, name, sum(amount), sequence_length, device=device, seed=seed, columns=columns)
        seen, apart, parts.confirm[name] = _split(text.tokens, amount, name)
        watch.append(seen)
        held.append(apart)
        _note(parts, name, text)
    search = _in_turns(parts.search)[: max(searched, len(names))]
    return SearchText(
        screen=search[: max(1, len(search) // SEARCHED)],
        search=search,
        fit=_in_turns(parts.fit),
        watch=_in_turns(watch) if watch else None,
        held=_in_turns(held) if held else None,
        confirm=parts.confirm,
        origins=parts.origins,
        notes=tuple(dict.fromkeys(parts.notes)),
    )


def _read(
    source: Source, name: str, rows: int, length: int, *, device: str, seed: int, columns: str | None
) -> Calibration:
    if name == ITSELF:
        return sample_calibration(source, samples=rows, sequence_length=length, device=device, seed=seed)
    return read_calibration(source, [name], samples=rows, sequence_length=length, columns=columns)


def _note(parts: _Parts, name: str, text: Calibration) -> None:
    parts.origins[name] = dict(text.origin)
    parts.notes += text.notes


def _split(tokens: "Tensor", amounts: Sequence[int], name: str) -> "list[Tensor]":
    """Return rows in parts of these numbers, in their order; of fewer rows, in proportion, and one each at least."""
    there, wanted = len(tokens), sum(amounts)
    if there < len(amounts):
        raise DataError(
            f"{name} has {there} rows of {tokens.shape[1]} tokens, and a search needs {len(amounts)} at least",
            hint="Give more text, or a smaller --sequence-length.",
        )
    sizes = [max(1, amount * there // wanted) for amount in amounts] if there < wanted else list(amounts)
    sizes[-1] = there - sum(sizes[:-1]) if there < wanted else sizes[-1]
    while sizes[-1] < 1:
        largest = sizes.index(max(sizes))
        sizes[largest], sizes[-1] = sizes[largest] - 1, sizes[-1] + 1
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [tokens[start:stop] for start, stop in itertools.pairwise(edges)]


def _in_turns(parts: "Sequence[Tensor]") -> "Tensor":
    """Return rows of several texts as one, a row of each in turn, so that the first few are of all."""
    import torch

    length = min(part.shape[1] for part in parts)
    most = max(map(len, parts))
    rows = [part[row, :length] for row in range(most) for part in parts if row < len(part)]
    return torch.stack(rows)
