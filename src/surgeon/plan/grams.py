"""Gram matrices of the inputs of models' linear maps: a file that goes with a merge, and stands for the texts.

In the file, tensor `1/NAME.gram` is of the first model: float32, inputs x inputs, the mean over tokens of x x^T; where
the map has a bias, one more input is always 1. Its metadata say which model and which text each number stands for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.derived import JoinedSource
from surgeon.checkpoint.header import read_metadata
from surgeon.errors import CheckpointError
from surgeon.plan.repairs import RepairsFile

GRAMS = "grams.safetensors"
WORD = "grams"  # of the joined source
_KEY = "surgeon"


@dataclass(frozen=True)
class GramsFile(RepairsFile):
    """A file of Gram matrices as a source of tensors."""

    @classmethod
    def at(cls, place: Path, label: str) -> "GramsFile":
        """Return the file of this path, or that in a directory. Raises CheckpointError where there is none."""
        path = place / GRAMS if place.is_dir() else place
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}", hint="Give a text, or the grams.safetensors of a merge.")
        return cls(path.parent, label, path.name)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The models and texts. Raises CheckpointError for a file without such a record."""
        try:
            content = json.loads(read_metadata(self.local(self.file)).get(_KEY, ""))
            models = content["models"]
            known = [(str(each["model"]), str(each["number"])) for each in models]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            hint = "Give a text, or the grams.safetensors of a merge."
            raise CheckpointError(f"{self.path} holds no Gram matrices", hint=hint) from error
        assert len(known) == len(models)
        return dict(content)

    def of(self, identity: str, number: int) -> Mapping[str, Any] | None:
        """Return the entry of a model by the identity of its weights, that of this number first; None without one."""
        found = [each for each in self.record["models"] if each["model"] == identity]
        return next((each for each in found if each["number"] == str(number)), found[0] if found else None)


@dataclass(frozen=True)
class GrammedSource(JoinedSource):
    """Models joined with a file of Gram matrices, which goes with their result."""

    joined: GramsFile

    @property
    def companions(self) -> Sequence[str]:
        return [*self.base.companions, GRAMS]

    def fetch(self, file: str) -> Path:
        return self.joined.local(self.joined.file) if file == GRAMS else super().fetch(file)


def gram_name(number: int | str, tensor: str) -> str:
    """Return the name of a tensor's Gram matrix for the model of a number, counted from 1."""
    return f"{number}/{tensor}.gram"
