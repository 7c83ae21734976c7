"""A model of transformers without its parameters: filled and emptied part by part, paused at its layers."""

import inspect
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgeon.anatomy.config import class_names, model_type
from surgeon.anatomy.stacks import TOWERS
from surgeon.checkpoint.header import FilePart
from surgeon.checkpoint.source import Ranges, Source, StoredTensor, ranges_by_file
from surgeon.errors import MeasureError, SurgeonError
from surgeon.models.loading import always_sees, config_of, from_config, libraries_fail, quiet_transformers
from surgeon.models.passage import await_at_exit
from surgeon.plan.arithmetic import TORCH_DTYPES


@dataclass
class Skeleton:
    """A model of transformers whose parameters have no memory yet (they are on the meta device)."""

    label: str
    module: Any
    dtype: torch.dtype
    conversions: Any
    bases: tuple[Any, ...] = ()

    def find_base(self, layers: nn.ModuleList) -> None:
        """Set the parts that run the layers and have no head: those that take tokens, the outermost first."""
        inside = [part for part in self.module.modules() if any(layers is child for child in part.modules())]
        around = [self.module.base_model, self.module.get_decoder(), *inside[::-1]]
        bases = [part for part in around if part is not self.module and part in inside and _takes(part, "input_ids")]
        self.bases = tuple(dict.fromkeys(bases)) or (self.module,)

    @property
    def base(self) -> Any:
        """The part around the layers whose output the head reads."""
        return self.bases[0]

    @property
    def takes_positions(self) -> bool:
        """Whether it takes the positions of tokens."""
        return _takes(self.base, "position_ids")

    def to_device(self, device: torch.device) -> "Skeleton":
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        return self

    def fill(self, tensors: dict[str, Any], device: torch.device) -> None:
        """Fill parameters from stored tensors, through transformers' own conversion of names and layouts."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(device_map={"": device}, weight_mapping=self.conversions)
        with quiet_transformers():
            report, _ = convert_and_load_state_dict_in_model(self.module, tensors, config)
        for kind in ("mismatched_keys", "error_msgs", "conversion_errors"):
            if wrong := getattr(report, kind):
                raise MeasureError(
                    f"transformers cannot load {self.label}: {kind.replace('_', ' ')} {min(map(str, wrong))}",
                    hint="surgeon inspect shows what the checkpoint holds.",
                )

    def check_present(self, inside: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Raises MeasureError for a parameter of a module, outside of `layers`, that has no numbers."""
        elsewhere = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for name, parameter in inside.named_parameters():
            if parameter.is_meta and id(parameter) not in elsewhere:
                raise MeasureError(
                    f"{self.label} has no weights for {name!r}, which transformers would draw at random",
                    hint="surgeon inspect shows what the checkpoint holds.",
                )

    def empty_around(self, layers: Iterable[nn.Module]) -> None:
        """Free the parameters outside of the layers."""
        inside = {id(module) for layer in layers for module in layer.modules()}
        for module in self.module.modules():
            if id(module) not in inside:
                empty_own(module)


def auto_class(source: Source) -> Any:
    """Return the Auto class of a source with one stack; without a head that of a language model, or of an encoder."""
    import transformers as auto
    from transformers.models.auto import modeling_auto as known

    named, kind = " ".join(class_names(source.config)), model_type(source.config)
    if "ForMaskedLM" in named:
        return auto.AutoModelForMaskedLM
    if "ForSequenceClassification" in named:
        return auto.AutoModelForSequenceClassification
    writes = not named or "CausalLM" in named or "LMHead" in named
    if kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not writes:
        return auto.AutoModel
    if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in source.config:
        return auto.AutoModelForCausalLM
    return auto.AutoModelForImageTextToText if always_sees(source.config) else auto.AutoModel


def predicts_next(source: Source) -> bool:
    """Return whether a source's own class of transformers predicts the next token, by its config."""
    return auto_class(source).__name__ in ("AutoModelForCausalLM", "AutoModelForImageTextToText")


def build_skeleton(source: Source, dtype: torch.dtype, kind: Any = None) -> Skeleton:
    """Return the model that a source's config describes, with its buffers and without its parameters.

    `kind` is its Auto class, by default the one of a model with one stack.
    """
    from accelerate import init_empty_weights
    from transformers.conversion_mapping import get_model_conversion_mapping

    hint = "Perplexity and scores need a language model that transformers has the code of."
    with libraries_fail(f"transformers cannot build {source.label}", hint=hint, error_type=MeasureError):
        config = config_of(source, hint=hint)
        with quiet_transformers(), _Nowhere(), init_empty_weights(include_buffers=False):
            module = from_config(kind or auto_class(source), config, dtype=dtype)
    module.eval()
    return Skeleton(source.label, module, dtype, get_model_conversion_mapping(module))


def _takes(module: nn.Module, name: str) -> bool:
    """Return whether the forward pass of a module has a parameter of that name."""
    return name in inspect.signature(module.forward).parameters


def layer_list(model: nn.Module, prefix: str, depth: int) -> nn.ModuleList:
    """Return the model's list of layers: the one of that depth, and of several the one that the files name `prefix`.

    Where files name none of them so (those of a Llava), it is the one that is in no other tower.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    path = prefix.rstrip(".")
    named = [module for name, module in lists.items() if name == path or name.endswith(f".{path}")]
    if not named and not lists:
        raise MeasureError(
            f"transformers builds no list of {depth} layers for {type(model).__name__}",
            hint="Perplexity and scores need a model whose layers stand in one torch.nn.ModuleList.",
        )
    inner = [module for name, module in lists.items() if not TOWERS.search(name)]
    return next(iter((*named, *inner, *lists.values())))


def empty(module: nn.Module) -> None:
    for child in module.modules():
        empty_own(child)


def empty_own(module: nn.Module) -> None:
    """Free a module's own parameters: they are on the meta device again."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class _Nowhere(TorchFunctionMode):
    """A context in which large empty tensors take no memory.

    accelerate would allocate and free each, in an order that leaves as many holes in the heap: gigabytes of addresses.
    """

    LARGE = 1 << 20  # numbers: no model fills a buffer of its own that began as so many empty ones

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and isinstance(args[0] if args else None, tuple) and math.prod(args[0]) > self.LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class Weights:
    """The floating tensors of a source. Their bytes are fetched when they are needed, or shortly before.

    With `ahead` those shortly before are read by another thread, and copied to that device.
    """

    def __init__(self, source: Source, *, ahead: torch.device | None = None) -> None:
        self._source, self._device = source, ahead
        self.stored = {name: item for name, item in source.tensors.items() if item.spec.dtype in TORCH_DTYPES}
        self._all = ranges_by_file(self.stored, self.stored)
        self._ahead: Thread | None = None
        self._ready: dict[str, Tensor] = {}  # read ahead, and not taken yet

    def parts(self, names: Iterable[str]) -> dict[str, FilePart]:
        """Return the parts of files that hold these tensors."""
        self.ready()  # a thread may be fetching them
        return self._source.parts(ranges_by_file(self.stored, names), among=self._all)

    def unread(self, names: Sequence[str], dtype: torch.dtype) -> "dict[str, _Unread | Tensor]":
        """Return these tensors as `dtype`, each to be read when transformers' loader slices it."""
        parts = self.parts(names)
        ready = {name: self._ready.pop(name) for name in names if name in self._ready}
        unread = {name: _Unread(self.stored[name], parts[self.stored[name].file], dtype) for name in names}
        return unread | ready

    def ready(self) -> dict[str, Tensor]:
        """Return the tensors that were read ahead and are not taken yet, once all are there."""
        if self._ahead is not None:
            self._ahead.join()
        return self._ready

    def read_ahead(self, names: Sequence[str], dtype: torch.dtype) -> None:
        """Begin to fetch tensors, or to read them, while others are computed with."""
        wanted = ranges_by_file(self.stored, names)
        if self._device is not None or self._source.missing(wanted):
            self._ahead = Thread(target=self._read, args=(wanted, names, dtype), daemon=True)  # ends with the process
            self._ahead.start()
            return
        if not hasattr(os, "posix_fadvise"):
            return
        for file, part in self._source.parts(wanted, among=self._all).items():
            with part.opened() as opened:
                for start, end in wanted[file]:
                    os.posix_fadvise(opened.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def _read(self, wanted: Ranges, names: Sequence[str], dtype: torch.dtype) -> None:
        with suppress(SurgeonError, torch.OutOfMemoryError):  # who needs the tensors reads them again, and is told
            parts = self._source.parts(wanted, among=self._all)  # a download ends with the process, wherever it is
            if self._device is None:
                return
            ending = Event()
            await_at_exit(ending.set)
            read: dict[str, Tensor] = {}
            for name in names:
                if ending.is_set():
                    return
                read[name] = read_as(self.stored[name], parts[self.stored[name].file], dtype)
            self._ready = copied(read, self._device)


def copied(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors on a device. A GPU computes on meanwhile: a stream of their own takes them from pinned memory."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copies = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    stream.synchronize()
    for copy in copies.values():
        copy.record_stream(current)  # or its memory could be taken while a layer still computes with it
    return copies


@dataclass(frozen=True)
class _Unread:
    """A stored tensor that is read when it is sliced."""

    stored: StoredTensor
    part: FilePart
    dtype: torch.dtype

    def __getitem__(self, key: Any) -> Tensor:
        return read_as(self.stored, self.part, self.dtype)[key]


# Not shared with child processes, as Python would by default on systems that distinguish.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
BLOCK = 1 << 22  # bytes that are in memory in both precisions


def read_as(stored: StoredTensor, part: FilePart, dtype: torch.dtype) -> Tensor:
    """Return a stored tensor of a floating dtype as `dtype`.

    Raises CheckpointError when the file has become shorter, or does not hold the tensor.
    """
    stored_as = TORCH_DTYPES[stored.spec.dtype]
    count = stored.spec.num_parameters
    values = _own_memory(count * dtype.itemsize).view(dtype)
    block = _own_memory(min(BLOCK, count * stored_as.itemsize))
    at = 0
    with part.opened() as file:
        while at < count:
            nbytes = min(len(block), (count - at) * stored_as.itemsize)
            file.read_into(block[:nbytes].numpy().data, stored.start + at * stored_as.itemsize)
            numbers = block[:nbytes].view(stored_as)
            values[at : at + len(numbers)].copy_(numbers)
            at += len(numbers)
    return values.view(stored.spec.shape)


def read_rows_as(stored: StoredTensor, part: FilePart, rows: list[int], dtype: torch.dtype) -> Tensor:
    """Return some rows of a stored tensor of a floating dtype as `dtype`; the others are not read."""
    size = (stored.end - stored.start) // stored.spec.shape[0]
    block = torch.empty((len(rows), size), dtype=torch.uint8)
    with part.opened() as file:
        for place, row in enumerate(rows):
            file.read_into(block[place].numpy().data, stored.start + row * size)
    numbers = block.view(TORCH_DTYPES[stored.spec.dtype])
    return numbers.view(len(rows), *stored.spec.shape[1:]).to(dtype)


def _own_memory(nbytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes), **_PRIVATE), dtype=torch.uint8)[:nbytes]


@contextmanager
def needed_rows(model: Any, weights: Weights, name: str, used: Tensor, device: torch.device) -> Iterator[None]:
    """Return a context in which a model's token embedding holds only the rows of the tokens `used`, ascending.

    `name` is that of the embedding's tensor.
    """
    module = model.get_input_embeddings()
    whole, padding = module.weight, module.padding_idx
    stored = weights.stored[name]
    rows = read_rows_as(stored, weights.parts([name])[stored.file], used.tolist(), whole.dtype)
    module._parameters["weight"] = nn.Parameter(rows.to(device), requires_grad=False)
    module.padding_idx = None  # it would number another row; it matters to gradients only
    places = used.to(device)
    hook = module.register_forward_pre_hook(lambda _, args: (torch.searchsorted(places, args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
        module._parameters["weight"], module.padding_idx = whole, padding
