"""Adapters that compress prompts for the model without adapters, as trained with --gist-reader frozen."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgeon.checkpoint.receipt import read_receipt
from surgeon.checkpoint.source import ADAPTER, ADAPTER_WEIGHTS, Source, inside
from surgeon.errors import CheckpointError, PlanError
from surgeon.mistyped import hint_beside

HOW = "surgeon finetune MODEL --gist --gist-reader frozen --lora 16 --keep-adapter writes one."


@dataclass(frozen=True)
class Compressor:
    """Adapters in a directory. They are on for a prompt and its gist, and off for the tokens after it."""

    directory: Path

    def check(self, source: Source) -> None:
        """Raise CheckpointError where there are no adapters, PlanError where they are for another model or reader."""
        if missing := next(
            (name for name in (ADAPTER, ADAPTER_WEIGHTS) if not (self.directory / name).is_file()), None
        ):
            raise CheckpointError(
                f"there is no adapter in {self.directory}: no {missing}", hint=hint_beside(self.directory, HOW)
            )
        for name in (ADAPTER, ADAPTER_WEIGHTS):
            inside(self.directory, name)
        record = read_receipt(self.directory) or {}
        if _settings(record).get("gist_reader") != "frozen":
            raise PlanError(
                f"{self.directory} does not say that it was trained with a frozen reader",
                hint="Adapters that read too are merged: train without --keep-adapter, and compress with the result.",
            )
        model, trained = source.provenance(), record.get("source")
        trained = trained if isinstance(trained, Mapping) else {}
        # A directory and a repository share no key to compare.
        known = [key for key in ("fingerprint", "id", "commit") if key in model and key in trained]
        if differs := next((key for key in known if model[key] != trained[key]), None):
            raise PlanError(
                f"{self.directory} was trained for another model than {source.label}: its {differs} is "
                f"{trained[differs]!r}",
                hint="Name the model with gist tokens that was trained.",
            )

    def attach(self, model: Any) -> None:
        """Add the adapters to a model of transformers, on. Raises PlanError where PEFT is missing or refuses them."""
        from surgeon.models.loading import libraries_fail, load_adapter

        if find_spec("peft") is None:
            raise PlanError("peft is needed for --adapter", hint='pip install "surgeon[train]"')
        with libraries_fail(f"PEFT cannot load {self.directory}", hint=HOW, error_type=PlanError):
            load_adapter(model, self.directory)

    def told(self) -> dict[str, Any]:
        """Return the adapters' entry in gist.json of a compressed prompt."""
        with (self.directory / ADAPTER_WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"path": os.fspath(self.directory.resolve()), "sha256": digest}


def _settings(record: Mapping[str, Any]) -> Mapping[str, Any]:
    steps = record.get("steps")
    last = steps[-1] if isinstance(steps, list) and steps else {}
    step = last.get("finetune") if isinstance(last, Mapping) else {}
    settings = step.get("settings") if isinstance(step, Mapping) else {}
    return settings if isinstance(settings, Mapping) else {}
