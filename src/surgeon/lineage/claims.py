"""What a checkpoint's own files say of where it comes from. These are claims: the weights are held against them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import QUANTIZATION_KEYS
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.receipt import MAX_CARD, card_metadata, read_receipt
from surgeon.checkpoint.source import ADAPTER, CARD, RECEIPT, Source
from surgeon.errors import CheckpointError, SurgeonError

MERGEKIT = "mergekit_config.yml"
LARGEST = 1_000_000  # bytes of a file that is read for a claim
MOST_MODELS = 50


@dataclass(frozen=True)
class Claim:
    """What one file says, and the models that it names. `layer_map` and `identity` are a receipt's."""

    file: str
    says: str
    models: tuple[str, ...] = ()
    layer_map: tuple[int | None, ...] | None = None
    identity: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the claim as `--json` prints it."""
        return {"file": self.file, "says": self.says, "models": list(self.models)}


def claims_of(source: Source) -> list[Claim]:
    """Return what the files of a checkpoint say, a receipt first. A file that cannot be read says nothing."""
    found = [_receipt(source), _card(source), _adapter(source), _mergekit(source), *_config(source)]
    return [claim for claim in found if claim is not None]


def _file(source: Source, name: str) -> Path | None:
    """Return a small file of a checkpoint on this machine, None where it has none."""
    try:
        path = source.about(name)
        return path if path is not None and path.stat().st_size <= LARGEST else None
    except (SurgeonError, OSError, ValueError):
        return None


def _receipt(source: Source) -> Claim | None:
    path = _file(source, RECEIPT)
    record = None if path is None else read_receipt(path.parent)
    if record is None:
        return None
    identity = record.get("source") if isinstance(record.get("source"), dict) else {}
    steps = [next(iter(step)) for step in record.get("steps", []) if step]
    models = tuple(_models_in(identity))
    made = ", then ".join(steps) or "copied"
    says = f"{made} from {' and '.join(models) if models else 'a model that it does not name'}"
    layers = tuple(record.get("layer_map", [])) or None
    return Claim(RECEIPT, says, models, layers, identity)


def _models_in(identity: Any) -> Iterator[str]:
    """Yield the models that the source of a receipt names: its own, then those that are joined to it."""
    if isinstance(identity, Mapping):
        name = identity.get("id", identity.get("path"))
        if isinstance(name, str):
            yield name
        for value in identity.values():
            yield from _models_in(value)


def _card(source: Source) -> Claim | None:
    path = _file(source, CARD)
    metadata = {} if path is None else card_metadata(path)
    models = _names(metadata.get("base_model"))
    if not models:
        return None
    relation = metadata.get("base_model_relation")
    how = f", by {relation}" if isinstance(relation, str) else ""
    return Claim(CARD, f"base_model is {' and '.join(models)}{how}", models)


def _adapter(source: Source) -> Claim | None:
    content = _json(_file(source, ADAPTER))
    models = _names(content.get("base_model_name_or_path"))
    return Claim(ADAPTER, f"an adapter of rank {content.get('r')} for {models[0]}", models) if models else None


def _mergekit(source: Source) -> Claim | None:
    import yaml

    path = _file(source, MERGEKIT)
    if path is None:
        return None
    try:
        content = yaml.load(path.read_text(encoding="utf-8")[:MAX_CARD], Loader=yaml.BaseLoader)  # noqa: S506  (only strings)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    models = tuple(dict.fromkeys(_merged(content)))[:MOST_MODELS]
    method = content.get("merge_method", "some method") if isinstance(content, dict) else "some method"
    return Claim(MERGEKIT, f"merged by {method} of {' and '.join(models)}", models) if models else None


def _merged(content: Any) -> Iterator[str]:
    """Yield the models that a recipe of mergekit names, wherever in it."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key in ("model", "base_model") and isinstance(value, str):
                yield value
            else:
                yield from _merged(value)
    elif isinstance(content, list):
        for item in content:
            yield from _merged(item)


def _config(source: Source) -> list[Claim]:
    found = []
    for key in QUANTIZATION_KEYS:
        rules = source.config.get(key)
        if isinstance(rules, Mapping):
            found.append(Claim("config.json", f"quantized by {rules.get('quant_method', 'an unnamed method')}"))
    name = source.config.get("_name_or_path")
    if isinstance(name, str) and name:
        found.append(Claim("config.json", f"_name_or_path is {name}", (name,)))
    return found


def _json(path: Path | None) -> Mapping[str, Any]:
    try:
        content = {} if path is None else read_json(path)
    except CheckpointError:
        return {}
    return content if isinstance(content, dict) else {}


def _names(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    return tuple(name for name in names if isinstance(name, str) and name)


def names_model(claim: Claim, source: Source) -> bool:
    """Return whether a claim names this checkpoint: by its fingerprint or commit, else by its last name."""
    if claim.identity:
        known = source.provenance()
        for key in ("fingerprint", "commit"):
            if key in claim.identity and key in known:
                return bool(claim.identity[key] == known[key])
    ends = {Path(name).name.lower() for name in claim.models}
    return Path(source.label.rstrip("/")).name.lower() in ends


# Files with one hash


def digests(source: Source) -> dict[str, str]:
    """Return the SHA-256 of each weight file where it is known without reading the file.

    A file in huggingface_hub's cache is a link to a blob that is called by its hash.
    """
    files = {tensor.file for tensor in source.tensors.values()}
    found = {}
    for file in files:
        path = source.at_hand(file)
        name = path.resolve().name if path is not None and path.is_symlink() else ""
        if len(name) == 64 and all(char in "0123456789abcdef" for char in name):
            found[file] = name
    return found if found.keys() == files else {}
