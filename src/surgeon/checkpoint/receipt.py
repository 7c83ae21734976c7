"""Two files that describe a result: surgeon.json, from which it can be repeated byte for byte, and the model card."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from surgeon.checkpoint.blank import BlankSource
from surgeon.checkpoint.derived import BASE, MODEL
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.source import RECEIPT, LocalSource, Source, Transfer, inside
from surgeon.errors import CheckpointError
from surgeon.text import scrubbed

# The receipt

FORMAT = 1
MOST_POSITIONS = 2**24  # of an axis; the largest vocabulary has some 2**18
_ENTRIES: Mapping[str, Callable[[], Any]] = {"layer_map": list, "mlp_map": list, "axis_maps": dict, "steps": list}
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
    approximate: Sequence[str] = (),
    transfer: Transfer | None = None,
    bytes_shared: int = 0,
    mlp_map: Sequence[int | None] | None = None,
) -> dict[str, Any]:
    """Return the receipt of a surgery; `options` are those that change bytes (dtype, shard size, seed, block).

    `mlp_map` is there only where the MLPs are of other layers than the attentions, of which `layer_map` tells then.
    `approximate` lists why the result may compute something else than its source, `bytes_shared` counts the bytes whose
    blocks on the disk were the source's when this was written; if empty, there is no entry. Where `transfer` says that
    only ranges of files were downloaded, "fetched" is "ranges" and "sha256_unchecked" names them.
    """
    return {
        "format": FORMAT,
        "source": dict(source),
        "steps": list(steps),
        "options": dict(options),
        "layer_map": list(layer_map),
        **({} if mlp_map is None else {"mlp_map": list(mlp_map)}),
        "axis_maps": dict(axis_maps),
        "command": None if command is None else scrubbed(command),
        "notes": list(notes),
        **({"approximate": list(approximate)} if approximate else {}),
        **({"fetched": "ranges", "sha256_unchecked": sorted(transfer.ranges)} if transfer and transfer.ranges else {}),
        **({"bytes_shared": bytes_shared} if bytes_shared else {}),
        "versions": versions(),
    }


def to_bytes(content: Mapping[str, Any]) -> bytes:
    """Return a JSON object as the bytes of a file that a person can read.

    A config or a file's name can hold half a surrogate pair. UTF-8 cannot: it is written as its JSON escape.
    """
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_receipt(directory: Path) -> dict[str, Any] | None:
    """Return the receipt in a checkpoint directory; None if it is missing or unreadable.

    Raises CheckpointError for a link that leads out of the directory.
    """
    path = inside(directory, RECEIPT)
    try:
        content = read_json(path)
    except CheckpointError:
        return None
    return content if isinstance(content, dict) and _is_sound(content) else None


def made_of(model: str | os.PathLike[str]) -> str | None:
    """Return the model that a checkpoint was made of, as its receipt names it: its id, or a directory that is there."""
    directory = Path(model)
    record = read_receipt(directory) if directory.is_dir() else None
    source = (record or {}).get("source")
    if not isinstance(source, dict):
        return None
    if isinstance(name := source.get("id"), str):
        return name
    path = Path(str(source.get("path")))
    return None if not path.is_dir() else str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _is_sound(content: Mapping[str, Any]) -> bool:
    """Return whether the entries of a receipt that surgeon reads again have the form that it writes."""
    layers, mlps, axes, steps = (content.get(key, kind()) for key, kind in _ENTRIES.items())
    return (
        _are_layers(layers)
        and _are_layers(mlps)
        and len(mlps) in (0, len(layers))
        and isinstance(axes, dict)
        and all(map(_are_runs, axes.values()))
        and isinstance(steps, list)
        and all(isinstance(step, dict) and all(isinstance(told, dict) for told in step.values()) for step in steps)
    )


def _are_layers(layers: object) -> bool:
    """Return whether this is a list of layers' numbers, with None for new ones."""
    return isinstance(layers, list) and all(layer is None or (type(layer) is int and layer >= 0) for layer in layers)


def _are_runs(runs: object) -> bool:
    """Return whether these are the positions of an axis in runs: the first, or -1 for new ones, and how many."""
    pairs = [run for run in runs if isinstance(run, list) and len(run) == 2] if isinstance(runs, list) else []
    if pairs != runs or not all(type(number) is int and number >= -1 for pair in pairs for number in pair):
        return False
    return all(count > 0 for _, count in pairs) and sum(count for _, count in pairs) <= MOST_POSITIONS


def versions() -> dict[str, str]:
    """Return the versions of the packages that can influence a result, without importing them."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    known = {"python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known


# What may be published

# Options of a command that name what is written on this machine.
_WRITTEN = ("-o", "--output", "--run-dir", "--plot", "--predictions", "--html")
_PATH = re.compile(r"(?<![\w:/.~-])(?:~/|~|\.{0,2}/)(?:[^\s/'\"`,;:)]+/)*([^\s/'\"`,;:)]+)/?")


def public_record(content: Any) -> Any:
    """Return a receipt, scores or another JSON value with every path of this machine reduced to its last name.

    The identity of what a path names stays: its fingerprint or hash, and the ids of the Hub.
    """
    if isinstance(content, Mapping):
        commands = {key: public_command(value) for key, value in content.items() if _is_command(key, value)}
        return {key: commands.get(key, public_record(value)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [public_record(value) for value in content]
    if not isinstance(content, str):
        return content
    return Path(content).name if _is_local(content) and Path(content).name else public_text(content)


def public_command(command: str) -> str:
    """Return a command line without tokens, and with every path of this machine reduced to its last name."""
    try:
        words = shlex.split(scrubbed(command))
    except ValueError:  # no command of a shell
        return public_text(scrubbed(command))
    public = []
    for before, word in pairwise(["", *words]):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        is_local = _is_local(value) or before in _WRITTEN or option in _WRITTEN
        public.append(f"{option}{equals}{Path(value).name or value if is_local else value}")
    return shlex.join(public)


def public_text(text: str) -> str:
    """Return a sentence with the absolute paths in it, and those from here, reduced to their last names."""
    return _PATH.sub(r"\1", text)


def _is_command(key: object, value: object) -> bool:
    return key == "command" and isinstance(value, str)


def _is_local(word: str) -> bool:
    """Return whether a word is a path of this machine. One such as org/name is so where it exists."""
    if "://" in word or "\n" in word or not ("/" in word or word.startswith("~")):
        return False
    return word.startswith(("/", "~", "./", "../")) or os.path.lexists(word)


def public_name(source: Source) -> str:
    """Return the name of a source for a card: its id on the Hub, or the last name of its directory."""
    base = source
    while (inner := getattr(base, "base", None)) is not None:  # of a source that is derived from another
        base = inner
    return str(base.directory.resolve().name) if isinstance(base, LocalSource) else base.label


def parents(source: Source) -> list[Source]:
    """Return the models of which a source is merged, the first one first; none where it is one model."""
    found: list[Source] = []
    while (word := getattr(source, "word", None)) is not None:  # of a source that is joined
        if word == BASE or word.startswith(f"{MODEL}-"):
            found.insert(0, source.joined)  # type: ignore[attr-defined]
        source = source.base  # type: ignore[attr-defined]
    return [source, *found] if found else []


def base_models(source: Source) -> list[str]:
    """Return the names of the models that a result was made from, each once; none where a config alone was."""
    if isinstance(source, BlankSource):
        return []
    return list(dict.fromkeys(public_name(each) for each in parents(source) or [source]))


# The model card

MAX_CARD = 50_000  # characters: the block stands at the beginning, and PyYAML reads some 100 kB a second
_COPIED_METADATA = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(
    *,
    title: str,
    base_models: Sequence[str],
    done: str,
    facts: Mapping[str, str],
    command: str | None,
    notes: tuple[str, ...] = (),
    source_card: Path | None = None,
    relation: str = "",
) -> str:
    """Return the card's text: the Hub's metadata block, then the surgery in words (`done`) and in a table (`facts`).

    A card is made to be published: it holds no path of this machine. Of several base models the relation is "merge", of
    one it is `relation`, where there is a word for it.
    """
    import yaml

    metadata: dict[str, Any] = {"base_model": base_models[0]} if base_models else {}
    if is_merged := len(base_models) > 1:
        metadata = {"base_model": list(base_models), "base_model_relation": "merge"}
    elif relation and base_models:
        metadata["base_model_relation"] = relation
    metadata |= {"library_name": "transformers", "tags": ["surgeon", "merge"] if is_merged else ["surgeon"]}
    metadata |= _source_metadata(source_card)
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {title}", ""]
    lines += [f"{done}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", *(f"- {public_text(note)}" for note in notes)]
    if command:
        lines += ["", "Made with:", "", "```bash", public_command(command), "```"]
    lines += ["", "`surgeon.json` holds the layer map, the source's identity and the versions.", ""]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # a path need not be UTF-8


def _source_metadata(card: Path | None) -> dict[str, Any]:
    """Return licence, language and task from the source's card; nothing if it is missing or unreadable."""
    metadata = {} if card is None else card_metadata(card)
    return {key: metadata[key] for key in _COPIED_METADATA if key in metadata}


def card_metadata(card: Path) -> dict[str, Any]:
    """Return the metadata at the beginning of a card, strings, lists and dictionaries; nothing if it is unreadable."""
    import yaml

    try:
        with card.open(encoding="utf-8") as file:
            head, block, *_ = file.read(MAX_CARD).split("---\n", 2)
        # BaseLoader makes only strings, lists and dictionaries: "no" stays Norwegian, and no tag can run code.
        metadata = yaml.load(block, Loader=yaml.BaseLoader) if not head.strip() else None  # noqa: S506
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
