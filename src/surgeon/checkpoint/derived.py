"""Sources that take what is not theirs from another: a model with a donor, a trained model, one with other names."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import FilePart
from surgeon.checkpoint.source import LocalSource, Ranges, Source, StoredTensor, Transfer


@dataclass(frozen=True)
class DerivedSource(ABC):
    """A source with the name, config, companion files and origin of `base`; a subclass gives the tensors.

    The files of the source that it takes other tensors from begin with `prefix`.
    """

    base: Source

    @property
    @abstractmethod
    def prefix(self) -> str:
        """What the files of the other source begin with; no file of a model does."""

    @property
    @abstractmethod
    def other(self) -> Source:
        """The source of the other tensors."""

    @property
    def label(self) -> str:
        return self.base.label

    @property
    def origin(self) -> Path | None:
        return self.base.origin

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def companions(self) -> Sequence[str]:
        return self.base.companions

    def fetch(self, file: str) -> Path:
        if file.startswith(self.prefix):
            return self.other.fetch(file.removeprefix(self.prefix))
        return self.base.fetch(file)

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        (theirs, own), (all_theirs, all_own) = self._split(wanted), self._split(among or wanted)
        others = self.other.parts(theirs, among=all_theirs)
        return self.base.parts(own, among=all_own) | {self.prefix + file: part for file, part in others.items()}

    def missing(self, wanted: Ranges) -> int | None:
        theirs, own = self._split(wanted)
        numbers = [number for number in (self.base.missing(own), self.other.missing(theirs)) if number is not None]
        return sum(numbers) if numbers else None

    @property
    def transfer(self) -> Transfer | None:
        base, other = self.base.transfer, self.other.transfer
        if other is None:
            return base
        theirs = {self.prefix + file for file in other.ranges}
        return Transfer(other.nbytes + (base.nbytes if base else 0), theirs | (base.ranges if base else set()))

    def at_hand(self, file: str) -> Path | None:
        if file.startswith(self.prefix):
            return self.other.at_hand(file.removeprefix(self.prefix))
        return self.base.at_hand(file)

    def about(self, file: str) -> Path | None:
        return self.base.about(file)

    def check_unchanged(self) -> None:
        self.base.check_unchanged()
        self.other.check_unchanged()

    def provenance(self) -> dict[str, Any]:
        return self.base.provenance()

    def _split(self, ranges: Ranges) -> tuple[Ranges, Ranges]:
        """Return the ranges of the other source's files and of the base's, each by its own name of the file."""
        theirs = {file: spans for file, spans in ranges.items() if file.startswith(self.prefix)}
        own = {file: spans for file, spans in ranges.items() if file not in theirs}
        return {file.removeprefix(self.prefix): spans for file, spans in theirs.items()}, own


DONOR = "donor"  # the word of a model that gives layers
MODEL, BASE = "model", "base"  # of one that is merged, before its number; of the one that all were finetuned from


@dataclass(frozen=True)
class JoinedSource(DerivedSource):
    """`base` with the tensors of `joined` added; their names and files begin with `word` and a colon."""

    joined: Source
    word: str

    @property
    def prefix(self) -> str:
        return f"{self.word}:"  # no tensor of a model has a colon in its name

    @property
    def other(self) -> Source:
        return self.joined

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        joined = {
            self.prefix + name: replace(item, file=self.prefix + item.file)
            for name, item in self.joined.tensors.items()
        }
        return {**self.base.tensors, **joined}

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {self.word: self.joined.provenance()}


def alone(source: Source, word: str | None = None) -> Source:
    """Return the model of a source without what is joined to it; with a `word` only down to what is joined by it."""
    while isinstance(source, JoinedSource) and source.word != word:
        source = source.base
    return source


TRAINED = "trained:"  # no file of a model has a colon in its name


@dataclass(frozen=True)
class TrainedSource(DerivedSource):
    """`base` with its tensors replaced by those of `weights`; their files begin with "trained:"."""

    weights: LocalSource

    prefix = TRAINED

    @property
    def other(self) -> Source:
        return self.weights

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {
            name: StoredTensor(item.spec, TRAINED + item.file, item.start, item.end)
            for name, item in self.weights.tensors.items()
        }


# What training tools put before the names of all tensors: torch.compile, DataParallel and its kin, PEFT.
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")


def wrapper_of(names: Iterable[str]) -> str:
    """Return what is to be taken off all names: one known prefix, or several, the outermost first; "" for nothing."""
    names, found = list(names), ""
    while names and (one := next((each for each in WRAPPERS if all(name.startswith(each) for name in names)), None)):
        found += one
        names = [name.removeprefix(one) for name in names]
    return found


@dataclass(frozen=True)
class RenamedSource(DerivedSource):
    """`base` with `taken_off` taken off the names of all tensors, which begin with it."""

    taken_off: str

    prefix = "\0"  # no file has such a name: all files are the base's

    @property
    def other(self) -> Source:
        return self.base

    @property
    def transfer(self) -> Transfer | None:
        return self.base.transfer

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {name.removeprefix(self.taken_off): item for name, item in self.base.tensors.items()}

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        return self.base.parts(wanted, among=among)

    def missing(self, wanted: Ranges) -> int | None:
        return self.base.missing(wanted)

    def check_unchanged(self) -> None:
        self.base.check_unchanged()
