"""A source that is another one in all but its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.source import LocalSource, Source, StoredTensor


@dataclass(frozen=True)
class DerivedSource:
    """What is asked of `base` as it is: its name, its config, the files beside its weights, and where it came from."""

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

    def provenance(self) -> dict[str, Any]:
        return self.base.provenance()


DONOR = "donor:"  # no tensor of a model has a colon in its name


@dataclass(frozen=True)
class JoinedSource(DerivedSource):
    """`base`, and beside it the tensors of `donor`, whose names and files begin with "donor:"."""

    donor: Source

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        given = {DONOR + name: replace(item, file=DONOR + item.file) for name, item in self.donor.tensors.items()}
        return {**self.base.tensors, **given}

    def fetch(self, file: str, ranges: Sequence[tuple[int, int]] | None = None) -> Path:
        if file.startswith(DONOR):
            return self.donor.fetch(file.removeprefix(DONOR), ranges)
        return self.base.fetch(file, ranges)

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {"donor": self.donor.provenance()}


TRAINED = "trained:"  # no file of a model has a colon in its name


@dataclass(frozen=True)
class TrainedSource(DerivedSource):
    """`base` with the tensors of `weights`, whose files begin with "trained:"."""

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
