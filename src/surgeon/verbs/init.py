"""The verb `init`: a checkpoint with random weights, from a config alone."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon.anatomy.anatomy import family_of_type, read_anatomy
from surgeon.anatomy.config import TOKEN_IDS, size_of, text_config, vocabulary_key, with_vocabulary
from surgeon.anatomy.families import FAMILIES
from surgeon.checkpoint.blank import BlankSource
from surgeon.checkpoint.header import is_quantized
from surgeon.checkpoint.json_files import read_config
from surgeon.checkpoint.source import Source, content_of, inside, spec_of
from surgeon.checkpoint.tokenizer_files import tokenizer_files
from surgeon.errors import CheckpointError, PlanError
from surgeon.mistyped import close_path, close_to, close_word
from surgeon.options import Checked, OptionError, Verb, check_seed, option, revision_option, seed_option, takes
from surgeon.surgery import Surgery, open_source
from surgeon.transforms.initial import initialise

VERB = Verb(plans="init", begins=True, then="finetune {output} {data}")
BYTES = "bytes"  # the tokenizer that surgeon makes
_KEY = re.compile(r"[A-Za-z_]\w*")
_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_OF_PYTHON = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True, kw_only=True)
class InitOptions(Checked):
    """The options of `init`."""

    set: Sequence[str] = option(
        "A value of the config in place of its own: n_layer=8 (JSON, or a word). Repeatable.",
        (),
        metavar="KEY=VALUE",
        group="config",
    )
    tokenizer: str | os.PathLike[str] | None = option(
        "A directory with a tokenizer, or bytes: one of 256 bytes and an end of text, made here. "
        "Default: the one of CONFIG.",
        None,
        metavar="DIR",
        reads=True,
        group="config",
    )
    seed: int = seed_option()
    revision: str | None = revision_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        _ = self.values

    @property
    def values(self) -> dict[str, Any]:
        """The values of `set` by their keys. Raises OptionError for text that is no key and value."""
        values: dict[str, Any] = {}
        for text in self.set:
            key, equals, value = text.partition("=")
            if not equals or not _KEY.fullmatch(key):
                raise OptionError("set", f"{text!r} is no key and value", hint="Such as --set n_layer=8.")
            if key in values:
                raise OptionError("set", f"{key} is set twice", hint="Leave one of them out.")
            values[key] = _parsed(key, value)
        return values


def _parsed(key: str, text: str) -> Any:
    """Return a value that is written as JSON, or as one word, which is text."""
    try:
        return json.loads(text)
    except ValueError:
        if text in _OF_PYTHON:
            raise OptionError("set", f"{key}={text} is no JSON", hint=f"Write {key}={_OF_PYTHON[text]}.") from None
        if not _WORD.fullmatch(text):
            raise OptionError("set", f"{key}={text} is neither JSON nor one word", hint=f"Such as {key}=8.") from None
        return text


@takes(InitOptions)
def init(config: str | os.PathLike[str], options: InitOptions) -> Surgery:
    """Return the surgery that makes a checkpoint with random weights. Nothing is trained.

    `config` is a model type (`gpt2`, `llama`) with transformers' default sizes, a config.json, or a checkpoint
    directory or Hub id, whose config is taken and whose weights are not read. A name that is a model type is one,
    even where the Hub has a model of that name. Weights are drawn as transformers draws them.

    Raises PlanError for a model type whose first weights surgeon does not know, OptionError for an unknown key.

        surgeon.init("gpt2", set=["n_layer=8", "n_embd=96", "n_head=4"], tokenizer="bytes").save("small")
    """
    label, raw, base, file = _config_of(os.fspath(config), options.revision)
    _check_type(raw, label)

    from surgeon.models.blank import completed, described, known_keys

    values = _renamed(options.values, *known_keys(raw, label))
    is_type = base is None and file is None
    raw = completed({**raw, **values}, label) if is_type else {**raw, **values}
    files, tokens = _tokenizer(options.tokenizer)
    notes: tuple[str, ...] = ()
    if tokens is not None or size_of(raw, "vocab") is not None:
        raw, notes = _with_tokens(raw, tokens, given=values)
    name, specs = described(raw, label)
    raw = {**raw, "architectures": raw.get("architectures") or [name]}
    if "torch_dtype" not in raw:
        raw["dtype"] = raw.get("dtype") or "float32"
    source = BlankSource(label, raw, specs, base, keeps_files=options.tokenizer is None, file=file)
    step = {"config": label, "set": list(options.set), "seed": options.seed}
    step |= {} if options.tokenizer is None else {"tokenizer": os.fspath(options.tokenizer)}
    reads = {"CONFIG": (os.fspath(config),)} if not is_type else {}
    if options.tokenizer not in (None, BYTES):
        reads["--tokenizer"] = (os.fspath(options.tokenizer or ""),)
    anatomy = read_anatomy(spec_of(source))
    plan = initialise(anatomy, step, seed=options.seed)
    plan = replace(plan, notes=(*notes, *plan.notes))
    return Surgery(source, plan, attachments=files, begun_with=anatomy, reads=reads)


def _config_of(name: str, revision: str | None) -> tuple[str, dict[str, Any], Source | None, Path | None]:
    """Return the label of a config, its content, and the checkpoint or the file that it lies in."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        if revision is not None:
            raise CheckpointError(
                f"{name} is a file; a revision is for a model on the Hub", hint="Leave out --revision."
            )
        return path.resolve().parent.name or "model", read_config(path), None, path
    if not path.exists() and family_of_type(name) is not None:
        if revision is not None:
            raise PlanError(f"{name} is a model type, and has no revision", hint=f"Of a model on the Hub: ORG/{name}.")
        return name, {"model_type": name}, None, None
    if not path.exists() and "/" not in name and (near := close_word(name, FAMILIES)):
        raise PlanError(f"{name!r} is no model type with a table, and no file", hint=f"Did you mean {near}?")
    source = open_source(name, revision=revision)
    return source.label, dict(source.config), source, None


def _check_type(raw: Mapping[str, Any], label: str) -> None:
    """Raises PlanError for a model whose first weights are known to nobody but its own code."""
    if is_quantized(raw):
        raise PlanError(f"{label} is quantized, and random weights are not", hint="Take its unquantized config.")
    kind = str(raw.get("model_type"))
    family = family_of_type(kind)
    if family is None or family.is_partial or family.own_init:
        raise PlanError(
            f"how a new {kind} draws its weights is not known to surgeon",
            hint="docs/models.md lists the types with a table of their own.",
        )


def _renamed(values: Mapping[str, Any], known: set[str], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return values by the type's own names of the keys. Raises OptionError for a key that the config cannot have."""
    for key in values:
        if key not in known or key == "model_type":
            said = close_to(key, known) if key != "model_type" else ""
            raise OptionError(
                "set", f"the config has no {key!r} that can be set{said}", hint="Its keys are in config.json."
            )
    return {aliases.get(key, key): value for key, value in values.items()}


_Tokens = tuple[int, dict[str, int | None]]  # how many there are, and the special ones' ids by the config's key


def _tokenizer(place: str | os.PathLike[str] | None) -> tuple[dict[str, bytes], _Tokens | None]:
    """Return the files of a tokenizer, and its tokens."""
    if place is None:
        return {}, None
    if os.fspath(place) == BYTES:
        from surgeon.models.vocabularies import byte_tokenizer

        return byte_tokenizer(), (257, dict.fromkeys(TOKEN_IDS, 256))
    directory = Path(place).expanduser()
    if not directory.is_dir():
        close = close_path(directory, directory=True)
        hint = f"Did you mean {close}?" if close else "Name a directory, or bytes: the one tokenizer that is made here."
        raise CheckpointError(f"--tokenizer: no such directory: {place}", hint=hint)
    files = {name: content_of(inside(directory, name)) for name in tokenizer_files(directory)}

    from surgeon.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(directory))
    ids = {key: getattr(tokenizer, key) for key in TOKEN_IDS}
    return files, (len(tokenizer), ids)


def _with_tokens(
    raw: Mapping[str, Any], tokens: _Tokens | None, *, given: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a config with the tokens of a tokenizer, and notes; without one, special tokens that it lacks are null."""
    text = text_config(raw)
    if tokens is None:
        vocabulary = size_of(raw, "vocab") or 0
        beyond = [key for key in TOKEN_IDS if type(text.get(key)) is int and text[key] >= vocabulary]
        wrong = next((key for key in beyond if key in given), None)
        if wrong:
            raise OptionError(
                "set",
                f"{wrong}={given[wrong]} is beyond a vocabulary of {vocabulary}",
                hint="Name a token that there is.",
            )
        notes = [f"{key} is null: {text[key]} is beyond the {vocabulary} tokens" for key in beyond]
        return {**raw, **dict.fromkeys(beyond)}, tuple(notes)
    count, ids = tokens
    size = next((value for key, value in given.items() if key == vocabulary_key(raw)), None)
    if size is not None and (type(size) is not int or size < count):
        raise OptionError(
            "set",
            f"a vocabulary of {size} is too small: the tokenizer has {count} tokens",
            hint=f"Set {count} or more.",
        )
    return with_vocabulary(raw, size or count, {**ids, **{key: given[key] for key in ids if key in given}}), ()
