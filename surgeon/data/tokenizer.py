"""The tokenizer of a model, loaded as anyone would load it."""

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

from surgeon.errors import DataError
from surgeon.reload import hushed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers makes of a damaged or hostile file, seen by trying.
_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint directory or Hub id. Code that the checkpoint brings is not run.

    Raises DataError when there is none, or none that transformers can load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with _explained(name), hushed():
        loaded = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    tokenizer = cast(PreTrainedTokenizerBase, loaded)
    # Without its files, transformers makes many a class with no vocabulary: every text has 0 tokens then.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise DataError(f"{name} has no tokenizer: no token of a vocabulary is in it", hint=_copy_hint(name))
    return tokenizer


class _explained:  # noqa: N801  # reads as the context managers that are functions
    """Turn what transformers raises in this block into one DataError.

    A class, for tokenizers raises bare Exceptions of which no `except` could catch that class and no other.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception or isinstance(error, _FAILURES):
            said = next(iter(str(error).strip().splitlines()), str(kind))
            if isinstance(error, (KeyError, TypeError, AttributeError)):  # they say what, not what of it
                said = f"transformers fails with {type(error).__name__}: {said}"
            raise DataError(f"cannot load the tokenizer of {self.name}: {said}", hint=_hint(self.name)) from error


def _hint(name: str) -> str:
    from huggingface_hub import constants

    if not os.path.exists(name):  # noqa: PTH110  # Path.exists raises for a name that is too long
        offline = "Unset HF_HUB_OFFLINE to ask the Hub for it, or name" if constants.HF_HUB_OFFLINE else "Name"
        return f"{offline} a checkpoint directory that exists."
    if not Path(name, "tokenizer.json").exists():
        return _copy_hint(name)
    return f"Fetch the tokenizer's files in {name} again, or: pip install -U transformers tokenizers"


def _copy_hint(name: str) -> str:
    return f"Copy tokenizer.json and tokenizer_config.json of the model that {name} comes from into it."
