"""How commands print: results on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Mapping
from typing import Any


def emit(text: str) -> None:
    """Print a result."""
    sys.stdout.write(text + "\n")


def log(text: str) -> None:
    """Print what accompanies a result."""
    sys.stderr.write(text + "\n")


def emit_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
