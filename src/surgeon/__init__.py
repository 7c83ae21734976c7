"""Model surgery on Hugging Face checkpoints: truncate, grow, prune and train, as exact, streaming plans.

    import surgeon

    surgeon.truncate("gpt2-large", layers=6).save("gpt2-large-6")
    print(surgeon.inspect("gpt2-large-6"))

`__init__.pyi` lists the public names. Each is imported when it is first used: importing surgeon imports neither torch
nor transformers. (Stubs for lazy imports: SPEC 1 of Scientific Python.)
"""

import ast
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


@cache
def _homes() -> dict[str, str]:
    """Return the module of each public name."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    if name == "__version__":
        return version("surgeon")
    if name.startswith("__") or name not in _homes():
        raise AttributeError(f"module 'surgeon' has no attribute {name!r}")
    return getattr(import_module(_homes()[name]), name)


def __dir__() -> list[str]:
    return sorted(("__version__", *_homes()))
