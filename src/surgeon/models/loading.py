"""Models, configs and tokenizers of transformers and PEFT: the one place that calls their loaders.

Code of a checkpoint runs only inside `trusting(True)`, which is --trust-remote-code: loaders are told so in each call.
None of them can ask, because none has a standard input.
"""

import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgeon.anatomy.config import CONFIG_HINT, class_names, size_of, text_config, unquantized, with_floats
from surgeon.checkpoint.derived import alone
from surgeon.checkpoint.header import not_regular
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.lora import MergedSource
from surgeon.checkpoint.source import ADAPTER, CONFIG, Source, check_links, inside, is_companion
from surgeon.errors import CheckpointError, DataError, MeasureError, PlanError, SurgeonError, failure_of_library
from surgeon.models.device import available_memory, compute_dtype
from surgeon.models.merged import directory_of
from surgeon.plan.plan import chooses_kernel
from surgeon.progress import stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HINT = "The model is run by transformers; for one newer than this transformers: pip install -U transformers"
SMALLER = "Use another --device, or a smaller model."
RUN_HINT = "Is a value of config.json not what the weights were made with? --debug shows where it fails."
TRUST_HINT = "Read its .py files first: they run with all your rights. Then add --trust-remote-code."
MOST_BYTES = 200_000_000  # of a file beside the weights; the largest tokenizer.json has some 35 MB

# --- code of a checkpoint -----------------------------------------------------------------------------------------

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting(is_trusted: bool) -> Iterator[None]:
    """Return a context in which the code of checkpoints runs, where `is_trusted`; outside of one it never does."""
    token = _TRUSTED.set(is_trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def code_is_trusted() -> bool:
    """Return whether the code of checkpoints runs here."""
    return _TRUSTED.get()


@contextmanager
def libraries_fail(what: str, *, hint: str, error_type: type[SurgeonError] = MeasureError) -> Iterator[None]:
    """Return a context in which the error of a library becomes an `error_type`: `what`, and the library's own reason.

    An error in surgeon's own code passes, for it is a bug.
    """
    try:
        yield
    except BaseException as error:
        if (said := failure_of_library(error)) is None:
            raise
        raise error_type(f"{what}: {said}", hint=_hint_for_disk(error) or hint) from error


def _hint_for_disk(error: BaseException) -> str | None:
    """Return the hint for an error behind which is a disk that is full or cannot be written; None for any other."""
    cause: BaseException | None = error
    for _ in range(8):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return "Free some space, or set HF_HOME to a directory on another disk."
        cause = cause and (cause.__cause__ or cause.__context__)
    return None


@contextmanager
def runs(label: str, *, trust_remote_code: bool = False) -> Iterator[None]:
    """Return a context in which a model is loaded and run; an error in a library's code becomes a MeasureError.

    With `trust_remote_code` its own code may run.
    """
    with libraries_fail(f"{label} cannot be run", hint=RUN_HINT), trusting(trust_remote_code):
        yield


@contextmanager
def _without_input() -> Iterator[None]:
    """Return a context in which nobody can be asked: transformers asks whether to run code, and `yes` answers."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


def _from_pretrained(kind: Any, name: "str | os.PathLike[str] | None", **options: Any) -> Any:
    """Return what a class of transformers loads. Nothing else calls `from_pretrained`, but for `load_adapter`."""
    with stage(f"loading {Path(os.fspath(name or '')).name}"), _without_input():
        return kind.from_pretrained(name, trust_remote_code=_TRUSTED.get(), **options)


def from_config(kind: Any, config: Any, **options: Any) -> Any:
    """Return a model with new weights, which an Auto class of transformers makes of a config."""
    with _without_input():
        return kind.from_config(config, trust_remote_code=_TRUSTED.get(), **options)


def _safe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that choose other files or a kernel, which may be code on the Hub."""
    kept = {key: value for key, value in config.items() if not chooses_kernel(key) and key != "transformers_weights"}
    return {key: _safe(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


# --- models -------------------------------------------------------------------------------------------------------


@contextmanager
def transformers_loads(label: str, *, hint: str, error_type: type[SurgeonError] = MeasureError) -> Iterator[None]:
    """Turn an error of transformers in this block into an `error_type` with the label and the reason."""
    with libraries_fail(f"transformers cannot load {label}", hint=hint, error_type=error_type):
        yield


def config_of(source: Source, *, hint: str) -> Any:
    """Return the config of a source as transformers reads it.

    Raises MeasureError, with `hint`, for a model type that transformers does not have; of trusted code it needs none.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, has_code = str(source.config.get("model_type")), source.config.get("auto_map") is not None
    if has_code and _TRUSTED.get():
        name, revision = loadable(source)
        return _from_pretrained(AutoConfig, name, revision=revision)
    if model_type not in CONFIG_MAPPING and has_code:
        raise MeasureError(f"{source.label} is run by code of its own (auto_map in config.json)", hint=TRUST_HINT)
    text = text_config(source.config)
    padding, vocabulary = text.get("pad_token_id"), size_of(text, "vocab")
    if isinstance(padding, int) and vocabulary is not None and padding >= vocabulary:
        message = f"config.json of {source.label} says pad_token_id = {padding}, beyond its {vocabulary} tokens"
        raise CheckpointError(message, hint="Set it to a token of the vocabulary, or to null.")
    return parsed_config(source.config, f"config.json of {source.label}", hint=hint)


def parsed_config(config: Mapping[str, Any], what: str, *, hint: str = HINT) -> Any:
    """Return a config as transformers reads it, with its validators run. Imports no torch where there is none.

    Raises MeasureError, with `hint`, for a model type that transformers does not have, and for a config it refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise MeasureError(f"transformers has no model type {model_type!r} of its own", hint=hint)
    with libraries_fail(f"transformers refuses {what}", hint=hint):
        return CONFIG_MAPPING[model_type].from_dict(with_floats(_safe(config)))


def check_tokens(largest: int, known: int, label: str) -> None:
    """Raises MeasureError where a text has a token beyond the `known` ones of the model."""
    if largest >= known:
        raise MeasureError(
            f"the text holds token {largest}, and {label} knows {known} tokens",
            hint="The tokenizer belongs to another model; fetch the checkpoint again.",
        )


def num_known(model: Any) -> int:
    """Return how many tokens a model of transformers knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def always_sees(config: Mapping[str, Any]) -> bool:
    """Return whether transformers has a model type only with its eyes: no language model of it alone."""
    from transformers.models.auto import modeling_auto as known

    kind = config.get("model_type")
    sees = kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sees and kind not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _writer(config: Mapping[str, Any]) -> Any:
    """Return the Auto class of a model that writes: one that sees, too, where no other has its type."""
    import transformers as auto

    if config.get("is_encoder_decoder"):
        return auto.AutoModelForSeq2SeqLM
    return auto.AutoModelForImageTextToText if always_sees(config) else auto.AutoModelForCausalLM


def load_model(source: Source, *, dtype: Any, hint: str, kind: Any = None, **options: Any) -> Any:
    """Return the model in evaluation mode, by an Auto class or as one that writes, on the CPU or where `options` say.

    Raises MeasureError, with `hint`, where transformers cannot load it or would draw weights at random.
    """
    name, revision = loadable(source, weights=True)
    _check_files(name)
    if ADAPTER in source.companions:
        raise MeasureError(
            f"{source.label} holds an adapter beside its weights ({ADAPTER}), which transformers would add to them",
            hint="Merge it into the weights, or take its files out of the checkpoint.",
        )
    with transformers_loads(source.label, hint=hint), quiet_transformers():
        model, report = _from_pretrained(
            kind or _writer(source.config),
            name,
            revision=revision,
            config=config_of(source, hint=hint),
            dtype=dtype,
            use_safetensors=True,
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

    return _from_pretrained(AutoConfig, name, revision=revision)


def load_architecture(name: str, revision: str | None, *, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model of the class that its config names, and transformers' report of missing and unexpected keys.

    A class that transformers does not have is replaced by that of a language model.
    """
    import transformers

    _check_files(name)
    raw, _ = transformers.PreTrainedConfig.get_config_dict(name, revision=revision)
    config = type(load_config(name, revision)).from_dict(_safe(raw))
    options = {"config": config, "revision": revision, "dtype": dtype, "use_safetensors": True}
    model, report = _from_pretrained(_class_of(config, raw), name, **options, output_loading_info=True)
    return model, report


def _class_of(config: Any, raw: Mapping[str, Any]) -> Any:
    """Return the class of transformers that a config names, else the one that its Auto classes choose for it."""
    import transformers

    named = (getattr(transformers, word, None) for word in class_names(raw))
    classes = (each for each in named if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel))
    usual = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return next(classes, usual)


def load_shapes(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return transformers' report of loading tensors of these shapes into the model of a config, without their numbers.

    A quantized model is taken for the unquantized one. Raises MeasureError where transformers cannot build it.
    """
    import torch
    from transformers import AutoModel
    from transformers.models.auto.auto_factory import _get_model_class

    nowhere = torch.device("meta")
    tensors = {name: torch.empty(shape, dtype=torch.float32, device=nowhere) for name, shape in shapes.items()}
    config = parsed_config(unquantized(raw), "the config")
    kind = _class_of(config, raw)
    if hasattr(kind, "_model_mapping"):  # an Auto class, which would look for files
        mapping = next(each._model_mapping for each in (kind, AutoModel) if type(config) in each._model_mapping)
        kind = _get_model_class(config, mapping)  # type: ignore[no-untyped-call]
    with libraries_fail("transformers cannot build the result", hint=HINT), quiet_transformers():
        _, report = _from_pretrained(
            kind,
            None,
            config=config,
            state_dict=tensors,
            device_map={"": nowhere},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are reported, not raised
            output_loading_info=True,
        )
    return dict(report)


def load_gguf(path: Path) -> tuple[Any, dict[str, Any], Any]:
    """Return the model in a GGUF file, dequantized to float32, with transformers' report of it, and its tokenizer.

    A config.json or tokenizer_config.json beside the file may name code, which does not run.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GgufConfig

    config = _from_pretrained(AutoConfig, path.parent, gguf_file=path.name)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model, report = _from_pretrained(kind, path.parent, gguf_file=path.name, **options, output_loading_info=True)
    return model, report, _from_pretrained(AutoTokenizer, path.parent, gguf_file=path.name)


def load_adapter(model: Any, directory: Path) -> Any:
    """Return the model with the LoRA adapters in a directory added to it, in place, by PEFT.

    Raises PlanError for adapters of other kinds, and of LoRA for those that import a module by its name.
    """
    from peft import PeftModel

    config = read_json(inside(directory, ADAPTER))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise PlanError(f"{directory} holds an adapter of type {kind!r}, not LORA", hint="surgeon trains LoRA alone.")
    if config.get("megatron_config") is not None:
        raise PlanError(f"{directory / ADAPTER} names a module to import (megatron_core)", hint="It is not surgeon's.")
    with quiet_transformers(), _without_input():
        return PeftModel.from_pretrained(model, str(directory))


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether the code of a family ties the head of a model with this config; False for an unknown one."""
    from transformers import AutoConfig

    try:
        with libraries_fail("no config", hint=HINT, error_type=MeasureError):
            parsed = AutoConfig.for_model(**with_floats(config))
    except MeasureError:
        return False
    return bool(getattr(parsed, "tie_word_embeddings", False))


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


def load_on(source: Source, device: str, *, hint: str = HINT, smaller: str = SMALLER, kind: Any = None) -> Any:
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
    return load_model(source, dtype=dtype, hint=hint, kind=kind).to(device)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint directory or Hub id.

    Raises DataError when there is none, or none that transformers can load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    _check_files(name)
    try:
        with libraries_fail(f"cannot load the tokenizer of {name}", hint=_hint(name), error_type=DataError):
            with quiet_transformers():
                tokenizer = cast(PreTrainedTokenizerBase, _from_pretrained(AutoTokenizer, name, revision=revision))
            # Without its files, transformers makes some classes with no vocabulary: every text has 0 tokens then.
            is_empty = tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens)
    except DataError as error:
        if "trust_remote_code" in str(error.__cause__):
            message = f"the tokenizer of {name} is code of its own (auto_map in tokenizer_config.json)"
            raise DataError(message, hint=TRUST_HINT) from error
        with libraries_fail(
            f"transformers refuses config.json of {name}", hint=CONFIG_HINT, error_type=CheckpointError
        ):
            if Path(name, CONFIG).exists():
                load_config(name, revision)  # its class decides that of the tokenizer
        raise
    if is_empty:
        raise DataError(f"{name} has no tokenizer: no token of a vocabulary is in it", hint=_copy_hint(name))
    return tokenizer


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


# --- what is loaded -----------------------------------------------------------------------------------------------


def loadable(source: Source, *, weights: bool = False) -> tuple[str, str | None]:
    """Return the name and the commit that `from_pretrained` loads a source by; of joined sources, those of the base.

    Raises CheckpointError where transformers would follow a link out of the checkpoint.
    """
    base = alone(source)
    if isinstance(base, MergedSource):
        return str(directory_of(base, weights=weights)), None
    if base.origin is not None:
        check_links(base.origin)
        return str(base.origin), None
    provenance = base.provenance()
    return provenance["id"], provenance["commit"]


def _check_files(name: str) -> None:
    """Raise CheckpointError for a file in a directory that a loader would wait for, or read without end."""
    if not os.path.isdir(name):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        return
    for path in (each for each in sorted(Path(name).iterdir()) if each.exists() and not each.is_dir()):
        if (what := not_regular(path)) is not None:
            raise CheckpointError(f"{path} is {what}, not a file", hint=f"Look at it: ls -l {path}")
        if is_companion(path.name) and (size := path.stat().st_size) > MOST_BYTES:
            raise CheckpointError(
                f"{path} has {size / 1e6:.0f} MB; a file beside the weights has at most {MOST_BYTES / 1e6:.0f}",
                hint="Fetch it again, or take it out of the checkpoint.",
            )
