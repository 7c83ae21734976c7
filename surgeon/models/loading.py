"""A whole model of transformers in memory, with the weights of a source and none that were drawn at random."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from surgeon.checkpoint.derived import JoinedSource
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import DataError, MeasureError
from surgeon.models.device import available_memory, compute_dtype
from surgeon.plan.plan import identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_model(source: Source, *, dtype: Any, hint: str, **options: Any) -> Any:
    """Return the model in evaluation mode, on the CPU unless `options` (of from_pretrained) place it elsewhere.

    Code that the checkpoint brings is not run, nor code that its config names.
    Raises MeasureError, with `hint`, where transformers cannot load it or would draw weights at random.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = str(source.config.get("model_type"))
    if known not in CONFIG_MAPPING:
        raise MeasureError(f"transformers has no model type {known!r} of its own", hint=hint)
    kind: Any = AutoModelForSeq2SeqLM if source.config.get("is_encoder_decoder") else AutoModelForCausalLM
    name, revision = loadable(source)
    safe = identity(spec_of(source), depth=0).config  # without keys that choose the code that runs it
    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(
                name,
                revision=revision,
                config=CONFIG_MAPPING[known].from_dict(dict(safe)),
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MeasureError(f"transformers cannot load {source.label}: {said}", hint=hint) from error
    model, report = loaded
    if lost := sorted(map(str, report["missing_keys"])):
        raise MeasureError(
            f"{source.label} has no weights for {lost[0]!r}, which transformers would draw at random",
            hint="This needs a model with a language model head; surgeon inspect shows what is there.",
        )
    return model.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing bars and reports about loading; what is wrong with it becomes an error.

    So does PEFT's use of names that transformers has replaced, which no user can do anything about.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


HINT = "The model is run by transformers; for one newer than this transformers: pip install -U transformers"
SMALLER = "Use another --device, or a smaller model."


def load_on(source: Source, device: str, *, hint: str = HINT, smaller: str = SMALLER) -> Any:
    """Return the model on `device`, in float32 or on a GPU in the 16 bits of its weights.

    Raises MeasureError where it does not fit (hint: `smaller`), cannot be loaded (`hint`), or lacks weights.
    """
    dtype = compute_dtype(source, device)
    needed = sum(dtype.itemsize * item.spec.num_parameters for item in source.tensors.values())
    if needed > available_memory(device):
        raise MeasureError(
            f"{source.label} takes {needed / 1e9:.1f} GB, more than there is on {device}",
            hint=smaller,
        )
    return load_model(source, dtype=dtype, hint=hint).to(device)


# What transformers makes of a damaged or hostile file, seen by trying.
_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint directory or Hub id. Code that the checkpoint brings is not run.

    Raises DataError when there is none, or none that transformers can load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with _explained(name), quiet_transformers():
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


def loadable(source: Source) -> tuple[str, str | None]:
    """Return by what name, and of which commit, `from_pretrained` loads a source; of two joined, the base."""
    base = source.base if isinstance(source, JoinedSource) else source
    if base.origin is not None:
        return str(base.origin), None
    found = base.provenance()
    return found["id"], found["commit"]
