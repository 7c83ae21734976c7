"""A LoRA adapter that PEFT saved, with its base as one checkpoint: each matrix W that it changes is W + s B A.

That is computed in float32, or in float64 for a W of that dtype, and rounded once to the dtype of W, into a temporary
file when a merged tensor is first read. All other tensors are read where the base has them.
"""

import hashlib
import math
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from surgeon.checkpoint.derived import DerivedSource
from surgeon.checkpoint.header import read_header
from surgeon.checkpoint.json_files import read_config
from surgeon.checkpoint.output import check_space
from surgeon.checkpoint.source import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    WEIGHTS,
    LocalSource,
    Source,
    StoredTensor,
    inside,
    is_adapter,
    stored,
)
from surgeon.checkpoint.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG, tokenizer_files
from surgeon.errors import CheckpointError, OutputError, PlanError, SurgeonError

if TYPE_CHECKING:
    from torch import Tensor

MERGED = "merged:"  # no file of a model has a colon in its name
WRAPPED = "base_model.model."  # before the names of all tensors that PEFT saves
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<end>weight|bias)")  # PEFT saves that of an embedding too
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.weight)?")
# How the modules are called that look up the rows of tokens.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")
_PATTERN = re.compile(r"\^?(?:[\w.]|\\[.d])(?:[\w.]|\\[.d]|[*+](?![*+]))*")
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What an adapter_config.json may say without changing what its tensors are; anything else that is set is refused.
_HARMLESS = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
        *("fan_in_fan_out", "init_lora_weights", "eva_config", "runtime_config", "qalora_group_size"),
        *("megatron_core", "ensure_weight_tying"),
    )
)
_BEGUN_BESIDE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it is


@dataclass(frozen=True, slots=True)
class Update:
    """What becomes of one tensor of the base: `whole` takes its place, `scale` times B A is added to it, or both.

    `is_transposed`: the base stores the matrix as (in, out), or it is an embedding.
    """

    down: StoredTensor | None = None
    up: StoredTensor | None = None
    scale: float = 1.0
    is_transposed: bool = False
    whole: StoredTensor | None = None


@dataclass(frozen=True)
class MergedSource(DerivedSource):
    """`base` with the adapter in `directory` merged into it; `name` is the adapter as the user named it."""

    directory: Path
    name: str
    config_of_adapter: Mapping[str, Any]

    prefix = MERGED

    @property
    def label(self) -> str:
        return self.name

    @property
    def origin(self) -> Path:
        return self.directory

    @cached_property
    def other(self) -> "_MergedFile":
        return _MergedFile(Path(tempfile.gettempdir()), self.name, self)

    @cached_property
    def updates(self) -> Mapping[str, Update]:
        """The changes that the adapter makes, by the base's name of the tensor. Raises CheckpointError, PlanError."""
        return _updates(self)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        tensors, end = dict(self.base.tensors), 0
        for name in self.updates:
            spec = tensors[name].spec
            tensors[name] = StoredTensor(spec, MERGED + WEIGHTS, end, end + spec.nbytes)
            end += spec.nbytes
        return tensors

    @cached_property
    def own_files(self) -> tuple[str, ...]:
        """The files of the adapter that take the place of the base's: those of a tokenizer, where it has one."""
        if not any((self.directory / name).is_file() for name in (TOKENIZER, TOKENIZER_CONFIG)):
            return ()
        return tuple(name for name in tokenizer_files(self.directory) if inside(self.directory, name))

    @cached_property
    def companions(self) -> Sequence[str]:
        return sorted({*self.base.companions, *self.own_files})

    def fetch(self, file: str) -> Path:
        return inside(self.directory, file) if file in self.own_files else super().fetch(file)

    def at_hand(self, file: str) -> Path | None:
        return None if file.startswith(MERGED) or file in self.own_files else self.base.at_hand(file)

    def about(self, file: str) -> Path | None:
        return inside(self.directory, file) if (self.directory / file).is_file() else None

    def check_unchanged(self) -> None:
        self.base.check_unchanged()
        if self._digest != self._digest_now():
            raise CheckpointError(f"{self.name} changed while it was read", hint="Run the command again.")

    def provenance(self) -> dict[str, Any]:
        """Return the identity of both: the adapter's path, a hash of its files with the base's, and the base's own."""
        base = self.base.provenance()
        digest = hashlib.sha256(f"{self._digest} {base.get('commit') or base.get('fingerprint')}".encode())
        return {"path": str(self.directory.resolve()), "fingerprint": f"sha256:{digest.hexdigest()}", "base": base}

    @cached_property
    def _digest(self) -> str:
        return self._digest_now()

    def _digest_now(self) -> str:
        digest = hashlib.sha256()
        for name in (ADAPTER, ADAPTER_WEIGHTS):
            with inside(self.directory, name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class _MergedFile(LocalSource):
    """The temporary file with the tensors that an adapter changes; it is written when a byte of it is asked for."""

    source: MergedSource

    def fetch(self, file: str) -> Path:
        return self._path

    @cached_property
    def _path(self) -> Path:
        directory = Path(tempfile.mkdtemp(prefix="surgeon-adapter-"))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        updates = self.source.updates
        tensors = {name: self.source.base.tensors[name] for name in updates}
        check_space(directory, sum(item.spec.nbytes for item in tensors.values()))
        try:
            with (directory / WEIGHTS).open("wb") as file:
                for name, update in updates.items():
                    file.write(_merged(self.source, tensors[name], update))
        except OSError as error:
            raise OutputError(
                f"cannot write {directory}: {error.strerror}", hint="Set TMPDIR to a disk with more space."
            ) from error
        return directory / WEIGHTS


def open_adapter(
    directory: Path,
    *,
    label: str,
    open_base: Callable[..., Source],
    base: str | None = None,
) -> MergedSource:
    """Return the checkpoint that an adapter and its base make: `base`, else the one that the adapter names.

    Reads the adapter's config, no weights. Raises CheckpointError for a base that cannot be opened, PlanError for an
    adapter that cannot be merged exactly.
    """
    config = read_config(inside(directory, ADAPTER))
    _check_config(config, label)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        has = " but adapter_model.bin, a pickle" if (directory / "adapter_model.bin").is_file() else ""
        hint = "Load it with PEFT, and save it again: save_pretrained writes safetensors."
        raise CheckpointError(f"{label} is an adapter without {ADAPTER_WEIGHTS}{has}", hint=hint)
    named = base or config.get("base_model_name_or_path")
    hint = f"surgeon convert {label} --base MODEL -o merged"
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{label} is an adapter that does not name its base model", hint=hint)
    if is_adapter(Path(named)):  # it may be this one
        raise PlanError(f"{label} is an adapter of an adapter, {named}", hint=f"surgeon convert {named} -o merged")
    revision = config.get("revision") if base is None and not Path(named).exists() else None
    try:
        opened = open_base(named, revision=revision)
        _ = opened.config
    except SurgeonError as error:
        raise CheckpointError(f"{label} is an adapter, and its base cannot be opened: {error}", hint=hint) from error
    return MergedSource(opened, directory, label, config)


def _check_config(config: Mapping[str, Any], label: str) -> None:
    """Raises PlanError for an adapter that is no plain LoRA, by the name of what it is."""
    kind = config.get("peft_type")
    hint = "Merge it with PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...)."
    if kind != "LORA":
        raise PlanError(f"{label} is an adapter of type {kind!r}; LoRA alone is merged here", hint=hint)
    if odd := next((key for key, value in config.items() if value and key not in _HARMLESS), None):
        raise PlanError(f"{label} is an adapter with {odd} = {config[odd]!r:.60}, which is not merged here", hint=hint)
    begun = config.get("init_lora_weights", True)
    if begun not in _BEGUN_BESIDE_BASE:
        raise PlanError(f"{label} began with {begun!r}, which changes the base model too", hint=hint)


def _updates(source: MergedSource) -> Mapping[str, Update]:
    """Return what an adapter changes, by the base's names in their order."""
    header = read_header(inside(source.directory, ADAPTER_WEIGHTS))
    tensors = {name.removeprefix(WRAPPED): stored(ADAPTER_WEIGHTS, entry) for name, entry in header.items()}
    pairs: dict[str, dict[str, StoredTensor]] = {}
    updates: dict[str, Update] = {}
    for name, tensor in tensors.items():
        if (match := _PAIR.fullmatch(name)) is not None:
            pairs.setdefault(match["module"], {})[match["part"] + ("e" if match["embedding"] else "")] = tensor
        elif ".lora_" in name:
            raise PlanError(f"{source.name} holds {name!r}, which is no plain LoRA", hint="Merge it with PEFT.")
        else:
            own = _BASE_LAYER.fullmatch(name)
            target = _target(source, name if own is None else f"{own['module']}.{own['end']}")
            base = source.base.tensors[target].spec
            if base.shape != tensor.spec.shape:
                raise CheckpointError(
                    f"{source.name} holds {name!r} of shape {list(tensor.spec.shape)}, and its base has "
                    f"{list(base.shape)}",
                    hint="Is it the base that the adapter was trained on? --base of surgeon convert names another.",
                )
            if own is None and _is_own_copy(source, name) and not _head_is_apart(source):
                _refuse_shared(source, name.removesuffix(".weight"))
            updates[target] = Update(whole=tensor)
    for module, parts in pairs.items():
        target, update = _pair(source, module, parts)
        updates[target] = replace(update, whole=updates[target].whole) if target in updates else update
    if not updates:
        raise CheckpointError(f"{source.name} is an adapter without tensors", hint="Save it again.")
    for name in updates:
        if source.base.tensors[name].spec.dtype not in _DTYPES:
            raise PlanError(
                f"{source.base.label} stores {name!r} as {source.base.tensors[name].spec.dtype}: it is quantized",
                hint=f"Name the model before it was quantized: surgeon convert {source.name} --base MODEL -o merged",
            )
    return {name: updates[name] for name in source.base.tensors if name in updates}


def _pair(source: MergedSource, module: str, parts: Mapping[str, StoredTensor]) -> tuple[str, Update]:
    """Return the tensor that a pair of matrices changes, and how. Raises CheckpointError for shapes that do not fit."""
    is_embedding = "Ae" in parts
    down, up = (parts.get(part + ("e" if is_embedding else "")) for part in "AB")
    if down is None or up is None or len(parts) != 2:
        raise CheckpointError(f"{source.name} holds one half of the adapter of {module!r}", hint="Save it again.")
    target = _target(source, f"{module}.weight")
    if is_embedding and not _head_is_apart(source):
        _refuse_shared(source, module)
    config, base = source.config_of_adapter, source.base.tensors[target].spec
    if any(len(each.shape) != 2 for each in (down.spec, up.spec, base)) or up.spec.shape[1] != down.spec.shape[0]:
        shapes = " and ".join(str(list(each.spec.shape)) for each in (down, up))
        raise CheckpointError(f"{source.name}: {module!r} has adapters of shapes {shapes}", hint="Matrices are merged.")
    rank, shape = down.spec.shape[0], (up.spec.shape[0], down.spec.shape[1])
    is_transposed = base.shape != shape or (shape[0] == shape[1] and bool(config.get("fan_in_fan_out")))
    is_transposed = is_transposed or is_embedding
    if base.shape != (shape[::-1] if is_transposed else shape):
        raise CheckpointError(
            f"{source.name} changes a matrix of shape {list(shape)}, and {target!r} of its base has {list(base.shape)}",
            hint="Is it the base that the adapter was trained on? --base of surgeon convert names another.",
        )
    alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    declared = _of_module(config.get("rank_pattern"), module, config.get("r", 8))
    if declared != rank or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{source.name}: {module!r} has rank {rank}, and {ADAPTER} says {declared}, alpha {alpha}",
            hint="The files do not belong together; fetch the adapter again.",
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return target, Update(down, up, scale, is_transposed)


def _of_module(patterns: object, module: str, default: Any) -> Any:
    """Return a module's own value, by the first pattern that ends its name, as PEFT looks for it.

    Raises CheckpointError for a pattern that could take for ever to be looked for: the file may be a stranger's.
    """
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if not _PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+")) > 2:
            hint = "Names of modules are read here; with other patterns, merge it with PEFT."
            raise CheckpointError(f"{ADAPTER} has the pattern {pattern!r}", hint=hint)
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _target(source: MergedSource, name: str) -> str:
    """Return the base's name of a tensor that PEFT names by its module: the same, or one without the model's prefix."""
    tensors = source.base.tensors
    if name in tensors:
        return name
    near = [known for known in tensors if known.endswith(f".{name}") or name.endswith(f".{known}")]
    if len(near) != 1:
        found = f"{len(near)} such tensors" if near else "no such tensor"
        raise PlanError(
            f"{source.name} changes {name!r}, and its base {source.base.label} has {found}",
            hint="Is it the base that it was trained on, with the same head? --base of surgeon convert names another.",
        )
    return near[0]


def _is_own_copy(source: MergedSource, name: str) -> bool:
    """Return whether a saved tensor is an embedding that PEFT trained as a copy, which the head did not follow."""
    module = name.removesuffix(".weight")
    copied = source.config_of_adapter.get("modules_to_save")
    is_copied = any(module == each or module.endswith(f".{each}") for each in copied or ())
    return is_copied and module.endswith(_EMBEDDINGS)


def _refuse_shared(source: MergedSource, module: str) -> NoReturn:
    raise PlanError(
        f"{source.name} changes {module!r}, which is the head too: to merge it would change both",
        hint="PEFT trained the two apart: give the base a head of its own, or train it again without its embedding.",
    )


def _head_is_apart(source: MergedSource) -> bool:
    """Return whether the base stores a head of its own beside the embedding."""
    heads = ("lm_head.weight", "embed_out.weight", "output.weight")
    return any(name.endswith(heads) for name in source.base.tensors)


def _merged(source: MergedSource, tensor: StoredTensor, update: Update) -> memoryview:
    """Return the bytes of a merged tensor."""
    import torch

    files = source.base.parts({tensor.file: [(tensor.start, tensor.end)]}) if update.whole is None else {}
    dtype = getattr(torch, _DTYPES[tensor.spec.dtype])
    own = inside(source.directory, ADAPTER_WEIGHTS)
    wide = torch.promote_types(dtype, torch.float32)
    if update.whole is not None:
        weight = _read(own, update.whole).to(wide)
    else:
        with files[tensor.file].opened() as file:
            content = bytearray(tensor.end - tensor.start)
            file.read_into(content, tensor.start)
        weight = torch.frombuffer(content, dtype=dtype).view(tensor.spec.shape).to(wide)
    if update.down is not None and update.up is not None:
        delta = _read(own, update.up).to(wide) @ _read(own, update.down).to(wide)
        weight = weight + (delta.T if update.is_transposed else delta) * update.scale
    return weight.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data


def _read(path: Path, tensor: StoredTensor) -> "Tensor":
    import torch

    with path.open("rb") as file:
        file.seek(tensor.start)
        content = bytearray(file.read(tensor.end - tensor.start))
    if len(content) != tensor.end - tensor.start:
        raise CheckpointError(f"{path} has become shorter while it was read", hint="Fetch the adapter again.")
    dtype = _DTYPES.get(tensor.spec.dtype)
    if dtype is None:
        raise CheckpointError(f"{path} holds a tensor of dtype {tensor.spec.dtype}", hint="Save it in float32.")
    return torch.frombuffer(content, dtype=getattr(torch, dtype)).view(tensor.spec.shape)
