"""surgeon.json: what was done to which weights, enough to do it again byte for byte."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgeon.checkpoint.source import RECEIPT

FORMAT = 1
_PACKAGES = ("surgeon", "torch", "transformers", "safetensors", "huggingface-hub")


def receipt(
    *,
    source: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    layer_map: Sequence[int | None],
    axis_maps: Mapping[str, Any],
    options: Mapping[str, Any],
    command: str | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return the receipt of a surgery; `options` are those that decide bytes (dtype, shard size, seed)."""
    return {
        "format": FORMAT,
        "source": dict(source),
        "steps": list(steps),
        "options": dict(options),
        "layer_map": list(layer_map),
        "axis_maps": dict(axis_maps),
        "command": command,
        "notes": list(notes),
        "versions": versions(),
    }


def to_bytes(content: Mapping[str, Any]) -> bytes:
    """Return a JSON object as the bytes of a file that a person can read.

    Half a surrogate pair, which a config or a file's name can hold and UTF-8 cannot, is written as its JSON escape.
    """
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_receipt(directory: Path) -> dict[str, Any] | None:
    """Return the receipt in a checkpoint directory, None where there is none that can be read."""
    try:
        content = json.loads((directory / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def versions() -> dict[str, str]:
    """Return the versions of what can influence a result. Imports none of it."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
