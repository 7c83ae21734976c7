"""Trained weights as a source: its tensors are what training wrote, everything else is the model that was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from surgeon.checkpoint.derived import DerivedSource
from surgeon.checkpoint.source import LocalSource, StoredTensor

WEIGHTS = "trained:"  # no file of a model has a colon in its name


@dataclass(frozen=True)
class TrainedSource(DerivedSource):
    """`base` with the tensors of `weights`, whose files begin with "trained:"."""

    weights: LocalSource

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {
            name: StoredTensor(item.spec, WEIGHTS + item.file, item.start, item.end)
            for name, item in self.weights.tensors.items()
        }

    def fetch(self, file: str, ranges: Sequence[tuple[int, int]] | None = None) -> Path:
        if file.startswith(WEIGHTS):
            return self.weights.fetch(file.removeprefix(WEIGHTS), ranges)
        return self.base.fetch(file, ranges)
