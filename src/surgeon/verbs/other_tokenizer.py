"""Another tokenizer than a model's: its files, the configs beside it, and what a model's own become with it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.config import text_config, with_text
from surgeon.anatomy.token_ids import followed
from surgeon.checkpoint.matching import ROLES, Match, Vocabulary
from surgeon.checkpoint.source import CONFIG, Source, content_of, inside
from surgeon.checkpoint.tokenizer_files import (
    GENERATION,
    TOKENIZER,
    TOKENIZER_CONFIG,
    is_tokenizer_file,
    parsed,
    tokenizer_files,
    written,
)
from surgeon.errors import CheckpointError
from surgeon.surgery import Surgery, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOST = "{} named tokens that the new tokenizer does not have, and leaves them out"
NO_TEMPLATE = "the new tokenizer has no chat template, and the model had one: it is left out"


@dataclass(frozen=True, eq=False)
class OtherTokenizer:
    """The new tokenizer: its files, the configs beside it, and the checkpoint that it lies in, None where in none."""

    label: str
    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    source: Source | None


def open_tokenizer(place: str | os.PathLike[str]) -> OtherTokenizer:
    """Return the new tokenizer. Raises CheckpointError for a name of none, PlanError without a tokenizer.json."""
    name = os.fspath(place)
    directory = Path(name).expanduser()
    if directory.is_dir() and not (directory / CONFIG).exists():
        files = {each: content_of(inside(directory, each)) for each in tokenizer_files(directory)}
        return OtherTokenizer(name, with_json(files, name), {}, {}, None)
    source = open_source(name)
    held = {each: content_of(source.fetch(each)) for each in source.companions if is_tokenizer_file(each)}
    generation = {}
    if GENERATION in source.companions:
        generation = parsed(GENERATION, content_of(source.fetch(GENERATION)))
    return OtherTokenizer(source.label, with_json(held, name), source.config, generation, source)


def with_json(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Return files of a tokenizer. Raises CheckpointError where tokenizer.json is not among them."""
    if TOKENIZER not in files:
        raise CheckpointError(
            f"{name} has no {TOKENIZER}",
            hint="transformers writes one: AutoTokenizer.from_pretrained(OTHER).save_pretrained(DIR)",
        )
    return files


def roles_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the ids of the tokens with a role, as transformers knows them."""
    found = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    return {role: i for role, i in found.items() if type(i) is int}


def files_with(
    begun: Surgery, other: OtherTokenizer, new: Vocabulary, found: Match
) -> tuple[dict[str, Any], dict[str, bytes | None], tuple[str, ...]]:
    """Return the config, the files of the new tokenizer and the generation config, and notes.

    Ids are those of the new tokenizer's own configs where it has some, else those of its roles; others follow the old
    token's bytes or role, or are left out.
    """
    lost: list[str] = []
    text = text_config(other.config)
    config = followed(begun.spec.config, found.new.get, lost)
    ids: dict[str, Any] = {}
    for role in ROLES:
        key = f"{role}_token_id"
        own = text.get(key, other.config.get(key))
        ids[key] = new.roles.get(role) if own is None else own
    own_text = text_config(begun.spec.config)
    changed = {key: value for key, value in ids.items() if key in own_text}
    if ids["eos_token_id"] is not None:
        changed["eos_token_id"] = ids["eos_token_id"]
    config = with_text(config, changed)
    config |= {key: value for key, value in ids.items() if key in begun.spec.config}
    files: dict[str, bytes | None] = {name: None for name in begun.tokenizer_files if name not in other.files}
    files |= other.files
    if (content := begun.companion(GENERATION)) is not None:
        generation = followed(parsed(GENERATION, content), found.new.get, lost)
        said = {**ids, **{key: other.generation[key] for key in ids if other.generation.get(key) is not None}}
        generation |= {key: value for key, value in said.items() if key in generation}
        generation["eos_token_id"] = said["eos_token_id"]
        files[GENERATION] = written(GENERATION, generation)
    gone = [key for key in lost if key not in ids]
    notes = [LOST.format(key) for key in gone]
    had = [name for name, content in files.items() if content is None and "template" in name]
    had += [CONFIG] if not had and _has_template(begun.tokenizer_files) and not _has_template(other.files) else []
    notes += [NO_TEMPLATE] if had else []
    return config, files, tuple(notes)


def _has_template(files: Mapping[str, bytes]) -> bool:
    if any("template" in name for name in files):
        return True
    content = files.get(TOKENIZER_CONFIG)
    return content is not None and bool(json.loads(content).get("chat_template"))
