"""Two checkpoints as one source: the base under its own names, the other's tensors under a prefix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.derived import DerivedSource
from surgeon.checkpoint.source import Source, StoredTensor

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
