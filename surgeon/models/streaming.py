"""A forward pass that streams: layer by layer, with the weights of one layer in memory.

Every batch goes through a layer before the next one is read, so that a model larger than memory runs from the disk.
The rest (embeddings, positions, masks, the final norm, the head) is computed by the model's own forward pass, in which
the layers are stubs. So this file knows nothing of any family.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.config import class_names, text_config
from surgeon.checkpoint.header import is_quantized
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import MeasureError
from surgeon.models.loading import check_tokens, num_known, quiet_transformers
from surgeon.models.skeleton import Weights, build_skeleton, empty, empty_own, layer_list, read_rows_as

HEAD_TOKENS = 512  # logits of so many tokens exist at once: 0.3 GB in float32 for a vocabulary of 150,000
BATCH_TOKENS = 2048  # tokens that go through a layer at once; more make no matrix product faster on a CPU
STATES_BYTES = 2_000_000_000  # the states of a group of rows take no more memory
Progress = Callable[[int], None]  # is called with the number of tokens that just went through a layer


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


class StubOutput(Tensor):
    """A tensor that is also the first of several outputs: some models take a layer's output, some its item 0."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def __getitem__(self, key: Any) -> Tensor:
        return self if isinstance(key, int) and key == 0 else super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


@dataclass
class Batch:
    """Rows on their way through the layers. `hidden`, shape (B, T, D), is the input of the next layer.

    `real`, shape (B, T), is False for padding; None where there is none.
    """

    tokens: Tensor
    real: Tensor | None
    hidden: Tensor
    calls: Sequence[Call]

    def chosen(self, states: Tensor) -> Tensor:
        """Return the states of the tokens that are no padding, shape (N, D)."""
        return states.flatten(0, 1) if self.real is None else states[self.real]


def groups(rows: int, bytes_per_row: int, budget: int = STATES_BYTES) -> list[tuple[int, int]]:
    """Return ranges of rows whose states fit in memory together, as equal as they can be; a row is never split."""
    most = max(1, budget // bytes_per_row)
    count = math.ceil(rows / most)
    edges = [rows * i // count for i in range(count + 1)] if rows else []
    return list(pairwise(edges))


def check_runs(source: Source) -> None:
    """Raises MeasureError for a model whose layers cannot be run one by one on a text. Reads the config only."""
    if source.config.get("is_encoder_decoder"):
        raise MeasureError(
            f"{source.label} has an encoder and a decoder; layers are scored in a model with one stack",
            hint="Scores that read no text work: --score random, last or magnitude.",
        )
    if is_quantized(source.config):
        raise MeasureError(
            f"{source.label} is quantized; scores are taken from unquantized weights",
            hint="Prune the unquantized checkpoint, then quantize the result.",
        )
    if any(name.endswith("ForMaskedLM") for name in class_names(source.config)):
        raise MeasureError(
            f"{source.label} sees tokens on both sides, and scores need a model that predicts the next token",
            hint="Scores that read no text work: --score random, last or magnitude.",
        )
    if text_config(source.config).get("num_kv_shared_layers"):
        raise MeasureError(
            f"late layers of {source.label} use the keys and values of early ones, so they cannot run alone",
            hint="Scores that read no text work: --score random, last or magnitude.",
        )


class Observer:
    """Sees the states between layers while batches go through them. A subclass overrides what it needs.

    `kept_states` is how many states of each token it keeps until its group of rows is done.
    """

    kept_states = 0

    def begin(self, batch: Batch) -> None:
        """See a batch before the first layer."""

    def see(self, layer: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        """See the states before and after a layer, shape (B, T, D)."""

    def end_group(self) -> None:
        """See the end of a group of rows: the hidden states of its batches are the final ones now."""


class Watcher:
    """Sees the inside of a layer. `batch` is the one that goes through it."""

    batch: Batch | None = None

    def watch(self, layer: int, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the inside of a layer is seen."""
        return nullcontext()

    def result(self) -> dict[str, Tensor]:
        """Return the importance of positions, by axis."""
        return {}


class StreamedModel:
    """A checkpoint that computes from its files. With `resident`, layers stay in memory once they are read."""

    def __init__(
        self, source: Source, *, device: str = "cpu", dtype: torch.dtype = torch.float32, resident: bool = False
    ) -> None:
        spec = spec_of(source)
        anatomy = read_anatomy(spec)
        check_runs(source)
        self.anatomy, self.depth = anatomy, anatomy.depth
        self.device, self._resident = torch.device(device), resident
        self._weights = Weights(source)
        self._model = build_skeleton(source, dtype).to_device(self.device)
        self._layers = layer_list(self._model.module, anatomy.stacks[0].prefix, self.depth)
        self._names: list[list[str]] = [[] for _ in range(self.depth)]
        self._outer: list[str] = []
        for name in self._weights.stored:
            place = anatomy.stacks[0].locate(name)
            (self._names[place[0]] if place else self._outer).append(name)
        self._calls: dict[Any, list[Call]] = {}
        self._loaded: set[int] = set()

    @property
    def label(self) -> str:
        """The checkpoint as the user named it."""
        return self._model.label

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self._model.module.config.get_text_config().hidden_size)

    def module(self, layer: int) -> nn.Module:
        """Return the module of a layer; its weights are there inside `layer`."""
        return self._layers[layer]

    def embed(self, tokens: Tensor, real: Tensor | None = None) -> list[Batch]:
        """Return the rows, shape (R, T), as batches before the first layer. `real` is False for padding.

        Padded rows are positioned by their real tokens, wherever the padding lies.
        """
        vocabulary = num_known(self._model.module)
        check_tokens(int(tokens.max()), vocabulary, self.label)
        rows = max(1, BATCH_TOKENS // tokens.shape[1])
        with self._embedding(tokens):
            return [
                self._embedded(tokens[at : at + rows], None if real is None else real[at : at + rows])
                for at in range(0, len(tokens), rows)
            ]

    @contextmanager
    def layer(self, index: int) -> Iterator[Callable[[Batch, Tensor], Tensor]]:
        """Return a context with a layer's weights in memory: a function from a batch and its states to the next."""
        if index not in self._loaded:
            self._load(self._names[index], self._layers[index], drop=False)
            self._loaded.add(index)
        if index + 1 < self.depth and index + 1 not in self._loaded:
            self._weights.read_ahead(self._names[index + 1])
        module = self._layers[index]

        def apply(batch: Batch, hidden: Tensor) -> Tensor:
            args, kwargs = batch.calls[index].with_hidden(hidden)
            output = module(*args, **kwargs)
            states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
            return states

        try:
            yield apply
        finally:
            if not self._resident:
                empty(module)
                self._loaded.discard(index)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Return a context with a function from the states after the last layer, (..., D), to logits, (..., V)."""
        model = self._model.module
        if model.get_output_embeddings() is None:
            raise MeasureError(f"{self.label} has no language model head", hint="Perplexity needs one.")

        def apply(hidden: Tensor) -> Tensor:
            flat = hidden.reshape(1, -1, hidden.shape[-1])
            dummy = torch.zeros(flat.shape[:2], dtype=torch.long, device=self.device)
            with self._stubbed({self.depth - 1: flat}):
                logits: Tensor = model(input_ids=dummy, use_cache=False).logits
            return logits.view(*hidden.shape[:-1], -1)

        try:
            self._load(self._outer, model, drop=True)
            model.tie_weights()
            self._check_present(model)
            yield apply
        finally:
            self._empty_outer()

    # --- around the layers ------------------------------------------------------------------------------------

    @contextmanager
    def _embedding(self, tokens: Tensor) -> Iterator[None]:
        """Return a context with the weights used before the layers: of the token embedding only the rows needed."""
        family = self.anatomy.whole_family
        heads = {name for name in self._outer if family and self.anatomy.row(name)[0].kind == "head"}
        table = next((name for name in self._outer if family and self._is_token_embedding(name)), None)
        names = [name for name in self._outer if name not in heads and name != table]
        try:
            self._load(names, self._model.module, drop=True)
            with nullcontext() if table is None else self._needed_rows(table, _used(tokens)):
                self._check_present(self._model.module.base_model)
                yield
        finally:
            self._empty_outer()

    def _is_token_embedding(self, name: str) -> bool:
        row, _ = self.anatomy.row(name)
        return row.kind == "embedding" and axes_of(row.axes[0]) == {"vocab"}

    @contextmanager
    def _needed_rows(self, name: str, used: Tensor) -> Iterator[None]:
        """Return a context in which the token embedding holds only the rows of the tokens `used`, ascending."""
        module = self._model.module.get_input_embeddings()
        whole, padding = module.weight, module.padding_idx
        stored = self._weights.stored[name]
        rows = read_rows_as(stored, self._weights.parts([name])[stored.file], used.tolist(), whole.dtype)
        module._parameters["weight"] = nn.Parameter(rows.to(self.device), requires_grad=False)
        module.padding_idx = None  # it would number another row; it matters to gradients only
        places = used.to(self.device)
        hook = module.register_forward_pre_hook(lambda _, args: (torch.searchsorted(places, args[0]), *args[1:]))
        try:
            yield
        finally:
            hook.remove()
            module._parameters["weight"], module.padding_idx = whole, padding

    def _embedded(self, tokens: Tensor, real: Tensor | None) -> Batch:
        tokens = tokens.to(self.device)
        padded = real is not None and not bool(real.all())
        mask = real.to(self.device) if real is not None and padded else None
        base = self._model.module.base_model
        options: dict[str, Any] = {"use_cache": False}
        if mask is not None:
            options["attention_mask"] = mask.long()
            if self._model.takes_positions:
                options["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        seen: dict[int, tuple[Tensor, Call]] = {}
        with self._stubbed({}, seen=seen), torch.no_grad():
            base(input_ids=tokens, **options)
        if seen[0][0].shape[:-1] != tokens.shape:
            raise MeasureError(
                f"the layers of {self.label} pass on states of shape {list(seen[0][0].shape)}, not one per token",
                hint="Scores that read no text work: --score random, last or magnitude.",
            )
        calls = [seen[layer][1] for layer in range(self.depth)]
        if mask is None:  # rows of one shape mostly have equal masks: keep one set of them
            known = self._calls.setdefault(tokens.shape, calls)
            calls = [before if equal_calls(before, call) else call for before, call in zip(known, calls, strict=True)]
        return Batch(tokens, mask, seen[0][0], calls)

    @contextmanager
    def _stubbed(
        self, given: Mapping[int, Tensor], *, seen: dict[int, tuple[Tensor, Call]] | None = None
    ) -> Iterator[None]:
        """Make every layer a stub that returns its input, or the states `given` for it; record its calls in `seen`."""

        def stub(index: int) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                hidden, call = Call.split(args, kwargs)
                if seen is not None:
                    seen[index] = (hidden.as_subclass(Tensor), call)
                return given.get(index, hidden).as_subclass(StubOutput)

            return forward

        for index, layer in enumerate(self._layers):
            layer.forward = stub(index)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    # --- weights ----------------------------------------------------------------------------------------------

    def _load(self, names: Sequence[str], inside: nn.Module, *, drop: bool) -> None:
        """Fill parameters from the files, through transformers' own conversion of names and layouts."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        stored = self._weights.unread(names, self._model.dtype)
        config = LoadStateDictConfig(device_map={"": self.device}, weight_mapping=self._model.conversions)
        with quiet_transformers():
            report, _ = convert_and_load_state_dict_in_model(self._model.module, stored, config)
        for kind in ("mismatched_keys", "error_msgs", "conversion_errors"):
            if wrong := getattr(report, kind):
                raise MeasureError(
                    f"transformers cannot load {self.label}: {kind.replace('_', ' ')} {min(map(str, wrong))}",
                    hint="surgeon inspect shows what the checkpoint holds.",
                )
        if not drop:
            self._check_present(inside)

    def _check_present(self, inside: nn.Module) -> None:
        around = [] if any(inside is layer for layer in self._layers) else list(self._layers)
        elsewhere = {id(parameter) for layer in around for parameter in layer.parameters()}
        for name, parameter in inside.named_parameters():
            if parameter.is_meta and id(parameter) not in elsewhere:
                raise MeasureError(
                    f"{self.label} has no weights for {name!r}, which transformers would draw at random",
                    hint="surgeon inspect shows what the checkpoint holds.",
                )

    def _empty_outer(self) -> None:
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        for module in self._model.module.modules():
            if id(module) not in inside:
                empty_own(module)


def _used(tokens: Tensor) -> Tensor:
    """Return the ids that occur in a text, ascending."""
    ids: Tensor = tokens.unique()  # type: ignore[no-untyped-call]
    return ids
