"""A source that has a config and the names and shapes of its tensors, and no numbers: what a new model begins as."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import FilePart, TensorSpec
from surgeon.checkpoint.source import CARD, Ranges, Source, StoredTensor


@dataclass(frozen=True)
class BlankSource:
    """A model without weights. `config_source` is the checkpoint whose config it has, None where there is none.

    With `keeps_files` the files beside its weights go with the new ones: tokenizer, chat template.
    """

    label: str
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    config_source: Source | None = None
    keeps_files: bool = True
    file: Path | None = field(default=None)  # the config.json that was named

    @property
    def origin(self) -> Path | None:
        return self.file if self.config_source is None else self.config_source.origin

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {name: StoredTensor(spec, "", 0, 0) for name, spec in self.specs.items()}

    @cached_property
    def companions(self) -> Sequence[str]:
        if self.config_source is None or not self.keeps_files:
            return ()
        return [
            name for name in self.config_source.companions if name != CARD
        ]  # it describes weights that were trained

    def fetch(self, file: str) -> Path:
        assert self.config_source is not None, file
        return self.config_source.fetch(file)

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        assert not wanted, "there are no numbers to read"
        return {}

    def missing(self, wanted: Ranges) -> None:
        return None

    @property
    def transfer(self) -> None:
        return None

    def at_hand(self, file: str) -> Path | None:
        return None if self.config_source is None else self.config_source.at_hand(file)

    def about(self, file: str) -> Path | None:
        return None if self.config_source is None else self.config_source.about(file)

    def check_unchanged(self) -> None:
        if self.config_source is not None:
            self.config_source.check_unchanged()

    def provenance(self) -> dict[str, Any]:
        """Return what the config was taken from, and the SHA-256 of the config that the model is made of."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        place = {} if self.origin is None else {"path": str(self.origin.resolve())}
        if self.config_source is not None and self.origin is None:  # on the Hub, where it has a commit
            place = self.config_source.provenance()
        return {"config": self.label, **place, "config_sha256": digest}
