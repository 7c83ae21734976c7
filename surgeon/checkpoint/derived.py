"""A source that is another one in all but its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.source import Source


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
