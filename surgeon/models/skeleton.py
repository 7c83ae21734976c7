"""A model of transformers without its parameters: filled and emptied part by part, paused at its layers."""

import inspect
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import wraps
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgeon.anatomy.config import class_names
from surgeon.anatomy.stacks import TOWERS
from surgeon.checkpoint.header import FilePart
from surgeon.checkpoint.source import Ranges, Source, StoredTensor, ranges_by_file
from surgeon.errors import MeasureError, SurgeonError
from surgeon.models.loading import config_of, from_config, libraries_fail, quiet_transformers
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

    named, model_type = " ".join(class_names(source.config)), source.config.get("model_type")
    if "ForMaskedLM" in named:
        return auto.AutoModelForMaskedLM
    if "ForSequenceClassification" in named:
        return auto.AutoModelForSequenceClassification
    writes = not named or "CausalLM" in named or "LMHead" in named
    if model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not writes:
        return auto.AutoModel
    if model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in source.config:
        return auto.AutoModelForCausalLM
    has_images = model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return auto.AutoModelForImageTextToText if has_images else auto.AutoModel


def predicts_next(source: Source) -> bool:
    """Return whether a source's own class of transformers predicts the next token, by its config."""
    return auto_class(source).__name__ in ("AutoModelForCausalLM", "AutoModelForImageTextToText")


def build_skeleton(source: Source, dtype: torch.dtype) -> Skeleton:
    """Return the model that a source's config describes, with its buffers and without its parameters."""
    from accelerate import init_empty_weights
    from transformers.conversion_mapping import get_model_conversion_mapping

    hint = "Perplexity and scores need a language model that transformers has the code of."
    with libraries_fail(f"transformers cannot build {source.label}", hint=hint, error_type=MeasureError):
        config = config_of(source, hint=hint)
        with quiet_transformers(), _Nowhere(), init_empty_weights(include_buffers=False):
            module = from_config(auto_class(source), config, dtype=dtype)
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
    assert named or lists, f"transformers builds no list of {depth} layers"
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


_THREAD = threading.local()  # `answer`: who gives the outputs of paused modules in this thread
RUN = object()  # the answer that lets a module run as it is
AROUND = -1  # the index of a module around the layers


class _StoppedError(Exception):
    """Ends a forward pass that nobody waits for any more."""


@dataclass(frozen=True)
class LayerCall:
    """A layer that a forward pass has come to, or AROUND for a part around them, and the arguments of its call."""

    index: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Line:
    """The two ways between a forward pass and who drives it."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Any] = SimpleQueue()
        self.outputs: SimpleQueue[Any] = SimpleQueue()

    def ask(self, call: LayerCall) -> Any:
        """Return the output of a layer, once it has come."""
        if call.index == AROUND:
            return RUN
        self.calls.put(call)
        answer = self.outputs.get()
        if isinstance(answer, _StoppedError):
            raise answer
        return answer[0]


class Passage:
    """A forward pass of the model itself, which waits before each layer until somebody else has run that layer.

    It runs in a thread of its own: whatever a model hands from layer to layer is in its own variables meanwhile.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self._line = _Line()
        args = (_run_pass, self._line, run)
        Thread(target=copy_context().run, args=args, name="passage", daemon=True).start()
        self._at: Any = None
        self._wait()

    def __del__(self) -> None:
        self._line.outputs.put(_StoppedError())

    @property
    def call(self) -> LayerCall | None:
        """The layer before which the pass waits; None where it has come to its end."""
        return self._at if isinstance(self._at, LayerCall) else None

    @property
    def result(self) -> Any:
        """What the forward pass returned."""
        assert self.call is None, "the forward pass has come to its end"
        return self._at[0]

    def go_on(self, output: Any) -> None:
        """Give the pass the output of the layer, and wait until it comes to the next one or to its end."""
        self._at = None
        self._line.outputs.put((output,))
        self._wait()

    def _wait(self) -> None:
        self._at = self._line.calls.get()
        if isinstance(self._at, BaseException):
            raise self._at


def _run_pass(line: _Line, run: Callable[[], Any]) -> None:
    try:
        with answering(line.ask), torch.no_grad():
            line.calls.put((run(),))
    except _StoppedError:
        return
    except BaseException as error:  # noqa: BLE001  # raised again by who waits for the pass
        line.calls.put(error)


@dataclass(frozen=True)
class Call:
    """The arguments that the model passes to one of its layers beside the hidden states: masks, positions."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "tuple[Tensor, Call]":
        """Return the hidden states of a call, and its other arguments."""
        if args:
            return args[0], cls((None, *args[1:]), kwargs)
        return kwargs["hidden_states"], cls((), {key: value for key, value in kwargs.items() if key != "hidden_states"})

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of this call with other states, by position and by name."""
        if self.args:
            return (hidden, *self.args[1:]), dict(self.kwargs)
        return (), {"hidden_states": hidden, **self.kwargs}


def equal_calls(one: object, other: object) -> bool:
    """Return whether two calls have equal arguments: tensors (some depend on the tokens), flags, and tuples of them."""
    match one, other:
        case Tensor(), Tensor():
            return one.shape == other.shape and torch.equal(one, other)
        case Call(), Call():
            return equal_calls(one.args, other.args) and equal_calls(one.kwargs, other.kwargs)
        case (tuple() | list(), tuple() | list()):
            return len(one) == len(other) and all(map(equal_calls, one, other))
        case Mapping(), Mapping():
            return one.keys() == other.keys() and all(equal_calls(value, other[key]) for key, value in one.items())
        case _:
            return one is other or (type(one) is type(other) and isinstance(one, (int, float, str)) and one == other)


def differs(layer: nn.Module, one: "LayerCall", other: Call) -> str | None:
    """Return the first argument beside the states in which two calls of a layer differ; None where none does."""
    call = Call.split(one.args, one.kwargs)[1]
    parameters = list(inspect.signature(type(layer).forward).parameters)[1:]
    named = {**dict(zip(parameters, call.args, strict=False)), **call.kwargs}
    others = {**dict(zip(parameters, other.args, strict=False)), **other.kwargs}
    return next((repr(name) for name in named if not equal_calls(named[name], others.get(name))), None)


class StubOutput(Tensor):
    """A tensor that is also the first of several outputs: some models take a layer's output, some its item 0."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def __getitem__(self, key: Any) -> Tensor:
        return self if isinstance(key, int) and key == 0 else super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


def states_of(call: LayerCall) -> Tensor:
    """Return the states that a layer is called with."""
    return Call.split(call.args, call.kwargs)[0]


def first_of(output: Any) -> Tensor:
    """Return the states among the outputs of a layer, or of all of them: the first."""
    outputs = output.values() if isinstance(output, Mapping) else output
    return output if isinstance(output, Tensor) else next(iter(outputs))


@contextmanager
def answering(answer: Callable[[LayerCall], Any]) -> Iterator[None]:
    """Return a context in which the outputs of this thread's paused modules are those that `answer` returns."""
    before = getattr(_THREAD, "answer", None)
    _THREAD.answer = answer
    try:
        yield
    finally:
        _THREAD.answer = before


def pause_at(layers: Iterable[nn.Module], around: Iterable[nn.Module]) -> None:
    """Make the forward passes of modules ask for their outputs inside `answering`. Elsewhere they run as they are."""
    for index, layer in enumerate(layers):
        layer.forward = _paused(index, layer.forward)
    for part in around:
        part.forward = _paused(AROUND, part.forward)


def _paused(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def ask(*args: Any, **kwargs: Any) -> Any:
        answer: Callable[[LayerCall], Any] | None = getattr(_THREAD, "answer", None)
        output = RUN if answer is None else answer(LayerCall(index, args, kwargs))
        return forward(*args, **kwargs) if output is RUN else output

    return ask


class Weights:
    """The floating tensors of a source. Their bytes are fetched when they are needed, or shortly before."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.stored = {name: item for name, item in source.tensors.items() if item.spec.dtype in TORCH_DTYPES}
        self._all = ranges_by_file(self.stored, self.stored)
        self._ahead: Thread | None = None

    def parts(self, names: Iterable[str]) -> dict[str, FilePart]:
        """Return the parts of files that hold these tensors."""
        if self._ahead is not None:
            self._ahead.join()  # it may be fetching them
            self._ahead = None
        return self._source.parts(ranges_by_file(self.stored, names), among=self._all)

    def unread(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, "_Unread"]:
        """Return these tensors as `dtype`, each to be read when transformers' loader slices it."""
        parts = self.parts(names)
        return {name: _Unread(self.stored[name], parts[self.stored[name].file], dtype) for name in names}

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begin to fetch tensors, or to read them from the disk, while others are computed with."""
        wanted = ranges_by_file(self.stored, names)
        if self._source.missing(wanted):
            self._ahead = Thread(target=self._fetch, args=(wanted,), daemon=True)  # ends with the process
            self._ahead.start()
            return
        if not hasattr(os, "posix_fadvise"):
            return
        for file, part in self._source.parts(wanted, among=self._all).items():
            with part.opened() as opened:
                for start, end in wanted[file]:
                    os.posix_fadvise(opened.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def _fetch(self, wanted: Ranges) -> None:
        with suppress(SurgeonError):  # who needs the tensors fetches them again, and is told
            self._source.parts(wanted, among=self._all)


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
