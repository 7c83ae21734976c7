"""Gist tokens: a prompt compressed into the states of a few tokens.

Source: Mu, Li and Goodman 2023, arXiv:2304.08467.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgeon.gist.tokens import GistTokens, names, read_gist

if TYPE_CHECKING:
    from surgeon.gist.prompt import GistPrompt, load

__all__ = ["GistPrompt", "GistTokens", "load", "names", "read_gist"]


def __getattr__(name: str) -> Any:
    if name not in ("GistPrompt", "load"):  # those import torch and transformers
        raise AttributeError(f"module 'surgeon.gist' has no attribute {name!r}")
    return getattr(import_module("surgeon.gist.prompt"), name)
