"""Numbers for each of several models, which may differ by layer and by part: the weights and densities of a merge.

0.5,0.5             the same everywhere
0:1,1:0             from the first layer to the last, in a straight line; more numbers make a line with bends
mlp=0.3,0.7         in the MLPs; attention, norm, embedding (with the head) and outside (of the layers) are parts too
*q_proj*=0.3,       in tensors of such names; a model whose number is left out has that of the next text that fits
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from surgeon.anatomy.anatomy import Anatomy
from surgeon.mistyped import close_to
from surgeon.options import OptionError

PARTS = ("attention", "mlp", "norm", "embedding", "outside")
_NUMBER = re.compile(r"[-+]?([0-9]{1,9}(\.[0-9]{0,17})?|\.[0-9]{1,17})([eE][-+]?[0-9]{1,2})?")

Line = tuple[float, ...]  # numbers at equal distances from the first layer to the last; one number is the same in all


@dataclass(frozen=True, slots=True)
class Portion:
    """A line for each model, None where it has none of its own here, for the tensors of `where`; "": for all."""

    where: str
    lines: tuple[Line | None, ...]


def read_portions(texts: Iterable[str | float], option: str) -> tuple[Portion, ...]:
    """Return the numbers in the texts of an option; plain numbers in their place are one for each model.

    Raises OptionError for what is none.
    """
    given = list(texts)
    are_numbers = bool(given) and not any(isinstance(each, str) for each in given)
    found = []
    for text in [",".join(map(str, given))] if are_numbers else map(str, given):
        where, equals, numbers = text.rpartition("=")
        where = where.strip()
        if equals and "*" not in where and where not in PARTS:
            hint = f"Parts: {', '.join(PARTS)}; or a pattern of names such as *{where or 'q_proj'}*."
            raise OptionError(option, f"unknown part {where!r}{close_to(where, PARTS)}", hint=hint)
        found.append(Portion(where, tuple(_line(each, text, option) for each in numbers.split(","))))
    return tuple(found)


def _line(text: str, whole: str, option: str) -> Line | None:
    words = [word.strip() for word in text.split(":")]
    if words == [""]:
        return None
    if not all(_NUMBER.fullmatch(word) for word in words):
        hint = "Write a number for each model: 0.3,0.7; or 0:1,1:0 from the first layer to the last."
        raise OptionError(option, f"cannot read {text!r} in {whole!r} as a number", hint=hint)
    return tuple(map(float, words))


def check_count(portions: Sequence[Portion], count: int, option: str) -> tuple[Portion, ...]:
    """Return the portions with one line for each of `count` models; one number alone is that of all.

    Raises OptionError for another number of them.
    """
    found = []
    for portion in portions:
        lines = portion.lines * count if len(portion.lines) == 1 else portion.lines
        if len(lines) != count:
            raise OptionError(option, f"{len(lines)} numbers are given for {count} models", hint="One for each model.")
        found.append(Portion(portion.where, lines))
    return tuple(found)


def lines_of(portions: Sequence[Portion], number: int) -> list[tuple[str, Line]]:
    """Return the lines of one model, each with where it holds; those that hold everywhere come last."""
    found = [(each.where, line) for each in portions if (line := each.lines[number]) is not None]
    return [each for each in found if each[0]] + [each for each in found if not each[0]]


class Portions:
    """The numbers of `count` models for each tensor of a model with this anatomy; `default` is that of all others."""

    def __init__(
        self, portions: Sequence[Portion], anatomy: Anatomy, *, count: int, default: float, option: str
    ) -> None:
        self._anatomy, self._default = anatomy, default
        self._lines = [lines_of(portions, number) for number in range(count)]
        self._parts = _parts_of(anatomy) if any(each.where in PARTS for each in portions) else {}
        for portion in portions:
            if portion.where and not any(self._fits(portion.where, name) for name in anatomy.spec.tensors):
                hint = "surgeon inspect MODEL --tensors lists their names."
                raise OptionError(option, f"no tensor of the model is {portion.where!r}", hint=hint)

    def __call__(self, name: str) -> tuple[float, ...]:
        """Return the number of each model for the tensor `name`."""
        return tuple(self._number(lines, name) for lines in self._lines)

    def _number(self, lines: Sequence[tuple[str, Line]], name: str) -> float:
        line = next((line for where, line in lines if not where or self._fits(where, name)), (self._default,))
        return along(line, self._place(name))

    def _fits(self, where: str, name: str) -> bool:
        if where == "outside":
            return self._anatomy.locate(name) is None
        return self._parts.get(name) == where if where in PARTS else fnmatchcase(name, where)

    def _place(self, name: str) -> float:
        """Return where a tensor is from the first layer, 0, to the last, 1; behind the layers 1, before them 0."""
        located, last = self._anatomy.locate(name), self._anatomy.depth - 1
        if located is not None:
            return located[0] / last if last else 0.0
        if self._anatomy.family is None:
            return 0.0
        row, part = self._anatomy.row(name)
        return 1.0 if row.kind == "head" or part == "norm" else 0.0


def _parts_of(anatomy: Anatomy) -> Mapping[str, str]:
    anatomy.require_family()
    return {name: anatomy.row(name)[1] for name in anatomy.spec.tensors}


def along(line: Line, place: float) -> float:
    """Return the number at a place from 0 to 1 of a line with bends at equal distances."""
    at = place * (len(line) - 1)
    low = min(int(at), len(line) - 1)
    high = min(low + 1, len(line) - 1)
    return (1 - (at - low)) * line[low] + (at - low) * line[high] if high > low else line[low]
