"""Gram matrices of the inputs of models' linear maps: a file that goes with a merge, and stands for the texts.

In the file, tensor `1/NAME.gram` is of the first model: float32, inputs x inputs, the mean over tokens of x x^T; where
the map has a bias, one more input is always 1. Its metadata say which model and which text each number stands for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from surgeon.errors import CheckpointError
from surgeon.plan.solved import SolvedFile

GRAMS = "grams.safetensors"
WORD = "grams"  # of the joined source
AGAIN = f"Give a text, or the {GRAMS} of a merge."


@dataclass(frozen=True)
class GramsFile(SolvedFile):
    """A file of Gram matrices as a source of tensors."""

    kept_as: ClassVar[str] = GRAMS
    holds: ClassVar[str] = "Gram matrices"
    again: ClassVar[str] = AGAIN

    @classmethod
    def at(cls, place: Path, label: str) -> "GramsFile":
        """Return the file of this path, or that in a directory. Raises CheckpointError where there is none."""
        path = place / GRAMS if place.is_dir() else place
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}", hint=AGAIN)
        return cls(path.parent, label, path.name)

    def of(self, identity: str, number: int) -> Mapping[str, Any] | None:
        """Return the entry of a model by the identity of its weights, that of this number first; None without one."""
        found = [each for each in self.record["models"] if each["model"] == identity]
        return next((each for each in found if each["number"] == str(number)), found[0] if found else None)

    @staticmethod
    def is_record(content: Mapping[str, Any]) -> bool:
        models = content.get("models")
        return isinstance(models, list) and all(
            isinstance(each, dict) and isinstance(each.get("model"), str) and isinstance(each.get("number"), str)
            for each in models
        )


def gram_name(number: int | str, tensor: str) -> str:
    """Return the name of a tensor's Gram matrix for the model of a number, counted from 1."""
    return f"{number}/{tensor}.gram"
