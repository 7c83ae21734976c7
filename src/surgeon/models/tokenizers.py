"""A tokenizer of files that are not on the disk, or not yet, as transformers loads it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.receipt import to_bytes
from surgeon.checkpoint.source import CONFIG
from surgeon.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_from(files: Mapping[str, bytes], config: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of these files; `config` is the config.json beside them. Raises DataError."""
    with tempfile.TemporaryDirectory(prefix="surgeon-tokenizer-") as directory:
        for name, content in {**files, CONFIG: to_bytes(config)}.items():
            place = Path(directory, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        return load_tokenizer(directory)
