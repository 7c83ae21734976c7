"""Where a checkpoint comes from. A source answers two questions: *headers*, and *these byte ranges*.

Its callers do not know whether it is a directory, the Hub, or a pickle. `Source.parts` may return whole files, or
sparse ones that hold only some ranges; no other byte of a `FilePart` can be read.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from surgeon.checkpoint.header import CHANGED_HINT, CheckpointSpec, Entry, FilePart, TensorSpec, opened, read_header
from surgeon.checkpoint.json_files import read_config, read_index
from surgeon.errors import CheckpointError
from surgeon.mistyped import hint_beside

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT_BYTES = 512

# Files that hold weights of this model in some form. A surgery makes them stale, so it never copies them.
WEIGHT_SUFFIXES = frozenset(
    (
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5"),
        *(".msgpack", ".ot", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".npz", ".distcp"),
    )
)
WEIGHT_INDEXES = (".safetensors.index.json", ".bin.index.json", ".h5.index.json", ".msgpack.index.json")
CARD = "README.md"
RECEIPT = "surgeon.json"
SCORES = "scores.json"  # the scores that decided a cut; they do not apply to a model that is made from the result
SEARCH = "search.json"  # the cuts that a search measured, of which one was made; the same goes for them
# A directory inside a checkpoint with one of these is a result or a run that was saved there, and no part of it.
RESULTS = (RECEIPT, "gist.json", "run.json")
MISMATCH_HINT = "The files do not belong together; fetch the whole checkpoint again."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the half-open byte range [start, end) that it takes in `file`."""

    spec: TensorSpec
    file: str
    start: int
    end: int


Ranges = Mapping[str, Sequence[tuple[int, int]]]  # half-open byte ranges by file


class Source(Protocol):
    """A checkpoint to read from. Frozen: asking twice gives the same answer."""

    @property
    def label(self) -> str:
        """The checkpoint as the user named it."""

    @property
    def origin(self) -> Path | None:
        """The file or directory that an output must not replace; None for a source that is not local."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, parsed."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the checkpoint, by name."""

    @property
    def companions(self) -> Sequence[str]:
        """The files that go with the weights (tokenizer, chat template, licence ...), by their relative POSIX path."""

    def fetch(self, file: str) -> Path:
        """Return `file` on this machine, whole."""

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        """Return for each file a part that holds at least the ranges in `wanted`, at their own offsets.

        `among` is all that the caller will have asked for in the end, where that is more.
        """

    def missing(self, wanted: Ranges) -> int | None:
        """Return how many bytes `parts` would download for `wanted`; None for a source on this machine."""

    @property
    def transfer(self) -> "Transfer | None":
        """What was downloaded of the weights so far; None for a source on this machine."""

    def at_hand(self, file: str) -> Path | None:
        """Return `file` where this machine has it as it is; None where `fetch` would have to get or make it first."""

    def about(self, file: str) -> Path | None:
        """Return a file that speaks of this checkpoint, such as its card, on this machine; None where it has none."""

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file has changed since it was first looked at: a result may mix two states."""

    def provenance(self) -> dict[str, Any]:
        """Return the identity of these weights: an id and a commit, or a path and a fingerprint."""


@dataclass
class Transfer:
    """The bytes of weights that were downloaded, and the files of which only `ranges` are here.

    The Hub names a hash of a whole file and none of a part, so those of these files were not checked.
    """

    nbytes: int = 0
    ranges: set[str] = field(default_factory=set)


def spec_of(source: Source) -> CheckpointSpec:
    """Return the config and the tensors' specs, from which a plan is decided. Computed once for each source."""
    cache = vars(source)  # cached_property stores its values here too
    if "spec" not in cache:
        cache["spec"] = CheckpointSpec(source.config, {name: tensor.spec for name, tensor in source.tensors.items()})
    spec: CheckpointSpec = cache["spec"]
    return spec


@dataclass(frozen=True)
class LocalSource:
    """A checkpoint directory as transformers writes it."""

    directory: Path
    label: str

    @property
    def origin(self) -> Path:
        return self.directory

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_config(self.local(CONFIG))

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        if _is_there(self.directory / WEIGHTS):  # where both exist, transformers reads this one too
            header = read_header(self.local(WEIGHTS))
            return {name: stored(WEIGHTS, entry) for name, entry in header.items()}
        if _is_there(self.directory / INDEX):
            return self._sharded()
        raise CheckpointError(f"{self.directory} has no {WEIGHTS}", hint=self._hint_without_weights())

    @cached_property
    def companions(self) -> Sequence[str]:
        paths = sorted(self.directory.rglob("*"))
        results = {path.parent for path in paths if path.name in RESULTS} - {self.directory}
        own = (path for path in paths if results.isdisjoint(path.parents) and (path.is_file() or not path.exists()))
        relative = (path.relative_to(self.directory).as_posix() for path in own)
        names = [name for name in relative if is_companion(name) and _is_there(self.directory / name)]
        for name in names:
            inside(self.directory, name)
        return names

    def fetch(self, file: str) -> Path:
        return self.local(file)

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        return {file: FilePart(self.fetch(file)) for file in wanted}

    def missing(self, wanted: Ranges) -> None:
        return None

    @property
    def transfer(self) -> None:
        return None

    def local(self, file: str) -> Path:
        """Return the path of a file of this checkpoint that will be read. Its size and time of change are kept.

        Raises CheckpointError for a link that leads out of the checkpoint.
        """
        path = inside(self.directory, file)
        self.look_at(path)
        return path

    def look_at(self, path: Path) -> None:
        """Keep the size and the time of change of a file that will be read, unless they are kept already."""
        if path not in self._looks:
            self._looks[path] = _look(path)

    def check_unchanged(self) -> None:
        for path, look in self._looks.items():
            if _look(path) != look:
                raise CheckpointError(f"{path} changed while it was read", hint=CHANGED_HINT)
        again = replace(self)  # a file can also change within one tick of the clock
        try:
            is_same = again.config == self.config and ("tensors" not in vars(self) or again.tensors == self.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self.label} changed while it was read: {error}", hint=CHANGED_HINT) from error
        if not is_same:
            raise CheckpointError(f"{self.label} changed while it was read", hint=CHANGED_HINT)

    @cached_property
    def _looks(self) -> dict[Path, tuple[int, int] | None]:
        return {}

    def at_hand(self, file: str) -> Path | None:
        return self.directory / file

    def about(self, file: str) -> Path | None:
        return inside(self.directory, file) if (self.directory / file).is_file() else None

    def provenance(self) -> dict[str, Any]:
        return {"path": str(self.directory.resolve()), "fingerprint": fingerprint(self)}

    def _sharded(self) -> Mapping[str, StoredTensor]:
        weight_map = read_index(self.local(INDEX))
        shards = sorted(set(weight_map.values()))
        for number, shard in enumerate(shards, start=1):
            if not _is_there(self.directory / shard):
                raise CheckpointError(
                    f"shard {number} of {len(shards)} is missing: {self.directory / shard}",
                    hint="The download did not finish; fetch the checkpoint again.",
                )
        return assemble({shard: read_header(self.local(shard)) for shard in shards}, weight_map)

    def _hint_without_weights(self) -> str:
        others = sorted(self.directory.glob("pytorch_model*.bin")) + sorted(self.directory.glob("*.gguf"))
        if others and others[0].suffix == ".gguf":
            return f"surgeon convert {others[0]}"
        if others:
            return f"surgeon convert {self.directory}"
        return f"A checkpoint is a directory with {CONFIG} and {WEIGHTS}; look with: ls {self.directory}"


def _look(path: Path) -> tuple[int, int] | None:
    """Return the size of a file and when it was last changed; None where it cannot be looked at."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return found.st_size, found.st_mtime_ns


# Opening


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter of PEFT, and no weights of a model."""
    weights = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return _is_file(directory / ADAPTER) and not any(os.path.lexists(directory / name) for name in weights)


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # Path.is_file raises for a name that is too long


def open_directory(directory: Path, *, label: str | None = None) -> LocalSource:
    """Return the checkpoint in `directory`. Reads no file yet; checks only that the directory can be one.

    Raises CheckpointError when it is not a directory, or has no config.json.
    """
    name = label or str(directory)
    if not _is_there(directory):
        hint = hint_beside(name, "Name a checkpoint directory, or a Hub id (gpt2-large).", directory=True)
        raise CheckpointError(f"no such directory: {name}", hint=hint)
    if not directory.is_dir():
        hint = (
            f"surgeon convert {name}" if directory.suffix in (".gguf", ".bin") else "Name the directory that holds it."
        )
        raise CheckpointError(f"{name} is a file; a checkpoint is a directory", hint=hint)
    if not _is_there(directory / CONFIG):
        raise CheckpointError(f"{name} is not a checkpoint: it has no {CONFIG}", hint=_hint_without_config(directory))
    return LocalSource(directory, name)


def _hint_without_config(directory: Path) -> str:
    if ggufs := sorted(directory.glob("*.gguf")):
        return f"surgeon convert {ggufs[0]}"
    nested = sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))
    return f"Did you mean {nested[0]}?" if nested else f"Name the directory that holds {CONFIG}."


def _is_there(path: Path) -> bool:
    """Return whether `path` exists. Raises CheckpointError when it is a broken link."""
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if not os.path.lexists(path):
            return False
        raise CheckpointError(
            f"{path} is a broken link: it points to {path.readlink()}",
            hint="Fetch the file again, or remove the link if the checkpoint does not need it.",
        ) from error
    return True


# Links

TEMPLATES = "additional_chat_templates"  # a directory from which transformers reads too
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # configs, tokenizers, templates, code
_IN_CACHE = re.compile(r"(models|datasets|spaces)--.+")
_SHARED_BLOB = re.compile(r"blobs/([0-9a-f]{2})/\1[0-9a-f]{62}")


def inside(directory: Path, file: str) -> Path:
    """Return the path of a file of a checkpoint, after checking that no link leads out of the checkpoint.

    A stranger's checkpoint may hold a link to any file of this machine, whose content a result would carry on. Links
    are followed within the directory and, from a snapshot in the Hub's cache, to the blobs of that cache. The directory
    itself may be a link: the user has named it. Raises CheckpointError.
    """
    path = directory / file
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if real.is_relative_to(root) or _is_blob(real, root):
        return path
    raise CheckpointError(
        f"{path} is a link that leads out of the checkpoint: to {real}",
        hint="If you trust that file, put a copy of it in place of the link.",
    )


def check_links(directory: Path) -> None:
    """Raises CheckpointError where a file that transformers reads beside the weights is a link that leads out."""
    for name in _names_in(directory):
        if name.endswith(_TEXTS):
            inside(directory, name)
    for name in _names_in(directory / TEMPLATES):
        inside(directory, f"{TEMPLATES}/{name}")


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208  # names, and no paths, are wanted
    except OSError:
        return []


def _is_blob(real: Path, root: Path) -> bool:
    """Return whether a file is a blob of the Hub's cache, for a root in one of its snapshots.

    huggingface_hub places blobs in <cache>/models--NAME/blobs, and from version 2 also in <cache>/blobs/XX, where the
    repositories share them.
    """
    for place in (root, *root.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and _IN_CACHE.fullmatch(repository.name):
            shared = real.relative_to(repository.parent).as_posix() if real.is_relative_to(repository.parent) else ""
            return real.is_relative_to(repository / "blobs") or bool(_SHARED_BLOB.fullmatch(shared))
    return False


def content_of(path: Path) -> bytes:
    """Return the content of a small file of a checkpoint. Raises CheckpointError when it cannot be read."""
    with opened(path) as file:
        return file.read()


# Tensors in several files


def assemble(headers: Mapping[str, Mapping[str, Entry]], weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Return all tensors of a sharded checkpoint, after checking that headers and index agree.

    Raises CheckpointError naming the first tensor that only one of them has, or that two shards have.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard, entries in headers.items():
        for name, entry in entries.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name!r} is stored twice, in {tensors[name].file} and in {shard}", hint=MISMATCH_HINT
                )
            if weight_map.get(name) != shard:
                place = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{shard} holds {name!r}, but {INDEX} places it {place}", hint=MISMATCH_HINT)
            tensors[name] = stored(shard, entry)
    if absent := next((name for name in weight_map if name not in tensors), None):
        raise CheckpointError(
            f"{INDEX} places {absent!r} in {weight_map[absent]}, which does not hold it", hint=MISMATCH_HINT
        )
    return tensors


def stored(file: str, entry: Entry) -> StoredTensor:
    """Return the header entry of one file as a tensor of the checkpoint."""
    return StoredTensor(entry.spec, file, entry.start, entry.end)


# Which files and bytes


def is_companion(relative: str) -> bool:
    """Return whether a file of a checkpoint's repository is copied into a result.

    Tokenizers, templates, licences and code are; weights in any format, hidden files and training leftovers are not.
    The model card counts too, though a surgery rewrites it: it names the licence.
    """
    path = PurePosixPath(relative)
    if any(part.startswith(".") for part in path.parts):
        return False
    if len(path.parts) > 1 and re.fullmatch(r"runs|checkpoint-\d+", path.parts[0]):
        return False
    if relative in (CONFIG, RECEIPT, SCORES, SEARCH) or relative.endswith(WEIGHT_INDEXES):
        return False
    return path.suffix.lower() not in WEIGHT_SUFFIXES


def fingerprint(source: Source) -> str:
    """Return the SHA-256 that identifies a checkpoint's weights: "sha256-sampled:" and 64 hex digits.

    It covers the config, every tensor's name, dtype and shape, and the first 512 bytes of each tensor's data. A
    training step changes it, and it needs no pass over the weights. It is no proof against tampering.
    """
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    by_file: dict[str, list[tuple[int, int]]] = {}
    for item in source.tensors.values():
        by_file.setdefault(item.file, []).append((item.start, min(item.end, item.start + FINGERPRINT_BYTES)))
    with ExitStack() as stack:
        files = {file: stack.enter_context(part.opened()) for file, part in source.parts(by_file).items()}
        for name, item in sorted(source.tensors.items()):
            digest.update(f"\0{name}\0{item.spec.dtype}{list(item.spec.shape)}\0".encode())
            sample = bytearray(min(FINGERPRINT_BYTES, item.end - item.start))
            files[item.file].read_into(sample, item.start)
            digest.update(sample)
    return f"sha256-sampled:{digest.hexdigest()}"


def ranges_by_file(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, list[tuple[int, int]]]:
    """Return, for each file, the byte ranges that hold the tensors `names`, adjacent ones merged."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for tensor in sorted((tensors[name] for name in names), key=lambda tensor: (tensor.file, tensor.start)):
        spans = ranges.setdefault(tensor.file, [])
        if spans and spans[-1][1] == tensor.start:
            spans[-1] = (spans[-1][0], tensor.end)
        else:
            spans.append((tensor.start, tensor.end))
    return ranges
