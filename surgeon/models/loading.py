"""Models, configs and tokenizers of transformers: the one place that calls its loaders.

No code of a checkpoint is ever run: trust_remote_code is False.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from surgeon.checkpoint.derived import JoinedSource
from surgeon.checkpoint.source import Source, check_links, spec_of
from surgeon.errors import DataError, MeasureError, SurgeonError, first_line
from surgeon.models.device import available_memory, compute_dtype
from surgeon.plan.plan import chooses_kernel, identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The errors of transformers for a damaged or hostile checkpoint, as observed.
_MODEL_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError)
_TOKENIZER_ERRORS = (*_MODEL_ERRORS, AttributeError)
HINT = "The model is run by transformers; for one newer than this transformers: pip install -U transformers"
SMALLER = "Use another --device, or a smaller model."


@contextmanager
def transformers_loads(label: str, *, hint: str, error_type: type[SurgeonError] = MeasureError) -> Iterator[None]:
    """Turn an error of transformers in this block into an `error_type` with the label and the reason."""
    try:
        yield
    except _MODEL_ERRORS as error:
        raise error_type(f"transformers cannot load {label}: {first_line(error)}", hint=hint) from error


def load_model(source: Source, *, dtype: Any, hint: str, **options: Any) -> Any:
    """Return the model in evaluation mode, on the CPU unless `options` (of from_pretrained) place it elsewhere.

    Raises MeasureError, with `hint`, where transformers cannot load it or would draw weights at random.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(source.config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise MeasureError(f"transformers has no model type {model_type!r} of its own", hint=hint)
    kind: Any = AutoModelForSeq2SeqLM if source.config.get("is_encoder_decoder") else AutoModelForCausalLM
    name, revision = loadable(source)
    safe = identity(spec_of(source), depth=0).config  # without keys that choose the code that runs it
    with transformers_loads(source.label, hint=hint), quiet_transformers():
        model, report = kind.from_pretrained(
            name,
            revision=revision,
            config=CONFIG_MAPPING[model_type].from_dict(dict(safe)),
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(map(str, report["missing_keys"])):
        raise MeasureError(
            f"{source.label} has no weights for {missing[0]!r}, which transformers would draw at random",
            hint="This needs a model with a language model head; surgeon inspect shows what is there.",
        )
    return model.eval()


def load_config(name: str, revision: str | None) -> Any:
    """Return the config of a checkpoint directory or Hub id, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def load_architecture(name: str, revision: str | None, *, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model of the class that its config names, and transformers' report of missing and unexpected keys.

    A class that transformers does not have is replaced by that of a language model. Config keys that choose a kernel,
    which may be code on the Hub, are left out.
    """
    import transformers

    raw, _ = transformers.PreTrainedConfig.get_config_dict(name, revision=revision)
    safe = {key: value for key, value in raw.items() if not chooses_kernel(key)}
    config = type(load_config(name, revision)).from_dict(safe)
    classes = [getattr(transformers, architecture, None) for architecture in config.architectures or []]
    usual = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    kind: Any = next(filter(None, classes), usual)
    model, report = kind.from_pretrained(
        name, config=config, revision=revision, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    return model, report


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing bars and loading reports; the errors that they report are raised by our checks.

    FutureWarnings of PEFT, about names that transformers has replaced, are hidden too: no user can act on them.
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


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint directory or Hub id.

    Raises DataError when there is none, or none that transformers can load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with _tokenizer_loads(name), quiet_transformers():
        loaded = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    tokenizer = cast(PreTrainedTokenizerBase, loaded)
    # Without its files, transformers makes some classes with no vocabulary: every text has 0 tokens then.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise DataError(f"{name} has no tokenizer: no token of a vocabulary is in it", hint=_copy_hint(name))
    return tokenizer


class _tokenizer_loads:  # noqa: N801  # used as a function
    """Turn an error of transformers in this block into a DataError.

    A class, for tokenizers raises bare Exceptions: no `except` clause catches that class and no subclass.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception or isinstance(error, _TOKENIZER_ERRORS):
            assert error is not None
            reason = first_line(error)
            if isinstance(error, (KeyError, TypeError, AttributeError)):  # their messages are names alone
                reason = f"transformers fails with {type(error).__name__}: {reason}"
            raise DataError(f"cannot load the tokenizer of {self.name}: {reason}", hint=_hint(self.name)) from error


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
    """Return the name and the commit that `from_pretrained` loads a source by; of joined sources, those of the base.

    Raises CheckpointError where transformers would follow a link out of the checkpoint.
    """
    base = source.base if isinstance(source, JoinedSource) else source
    if base.origin is not None:
        check_links(base.origin)
        return str(base.origin), None
    provenance = base.provenance()
    return provenance["id"], provenance["commit"]
