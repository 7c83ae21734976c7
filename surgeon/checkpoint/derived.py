"""Sources that take everything but their tensors from another source: a model with a donor, and a trained model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.source import LocalSource, Source, StoredTensor


@dataclass(frozen=True)
class DerivedSource:
    """A source with the name, config, companion files and origin of `base`; a subclass gives the tensors."""

    base: Source

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

    def check_unchanged(self) -> None:
        self.base.check_unchanged()

    def provenance(self) -> dict[str, Any]:
        return self.base.provenance()


DONOR = "donor:"  # no tensor of a model has a colon in its name


@dataclass(frozen=True)
class JoinedSource(DerivedSource):
    """`base` with the tensors of `donor` added; their names and files begin with "donor:"."""

    donor: Source

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        donated = {DONOR + name: replace(item, file=DONOR + item.file) for name, item in self.donor.tensors.items()}
        return {**self.base.tensors, **donated}

    def fetch(self, file: str, ranges: Sequence[tuple[int, int]] | None = None) -> Path:
        if file.startswith(DONOR):
            return self.donor.fetch(file.removeprefix(DONOR), ranges)
        return self.base.fetch(file, ranges)

    def at_hand(self, file: str) -> Path | None:
        if file.startswith(DONOR):
            return self.donor.at_hand(file.removeprefix(DONOR))
        return self.base.at_hand(file)

    def check_unchanged(self) -> None:
        super().check_unchanged()
        self.donor.check_unchanged()

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {"donor": self.donor.provenance()}


TRAINED = "trained:"  # no file of a model has a colon in its name


@dataclass(frozen=True)
class TrainedSource(DerivedSource):
    """`base` with its tensors replaced by those of `weights`; their files begin with "trained:"."""

    weights: LocalSource

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {
            name: StoredTensor(item.spec, TRAINED + item.file, item.start, item.end)
            for name, item in self.weights.tensors.items()
        }

    def fetch(self, file: str, ranges: Sequence[tuple[int, int]] | None = None) -> Path:
        if file.startswith(TRAINED):
            return self.weights.fetch(file.removeprefix(TRAINED), ranges)
        return self.base.fetch(file, ranges)

    def at_hand(self, file: str) -> Path | None:
        if file.startswith(TRAINED):
            return self.weights.at_hand(file.removeprefix(TRAINED))
        return self.base.at_hand(file)

    def check_unchanged(self) -> None:
        super().check_unchanged()
        self.weights.check_unchanged()
