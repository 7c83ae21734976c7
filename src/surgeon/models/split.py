"""A language model of any family as a split model: a decoder that returns states, and a head that returns logits.

The head is the model's own forward pass around a stub of the decoder, so scales, caps and biases on the way to the
logits are the model's own, without a table of families. A head that is one matrix is used as one.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgeon.errors import PlanError
from surgeon.models.device import wide, without_autocast
from surgeon.models.skeleton import layer_list
from surgeon.models.varlen import attending_by, standing_in

LARGE = 1000.0  # the largest logit of the probe, far above any cap on logits (30 is usual, 50 is large)
ROUNDING = 4  # two ways to compute logits may differ by so many units in the last place of the largest


class SplitModel:
    """A generating model of transformers as decoder and head. Raises PlanError for a model without these two parts.

    The decoder of an encoder-decoder takes the encoder's states as options of `states`.
    """

    def __init__(self, model: Any) -> None:
        if model.get_output_embeddings() is None:
            raise PlanError(
                f"{type(model).__name__} is not a decoder with a language model head, and no other can be trained",
                hint="Models that write from left to right can be (GPT, Llama ...).",
            )
        self.model = model
        parameters = inspect.signature(self.decoder.forward).parameters
        self._names = frozenset(parameters)
        self._output: Callable[..., Any]
        self._linear_head: nn.Linear | None = None
        self.vocab = self._probe()

    @property
    def decoder(self) -> Any:
        """The part that computes the states that the head reads."""
        return self.model.get_decoder()

    @property
    def depth(self) -> int:
        """The number of layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of the model's class, also where the instance has another one."""
        return MethodType(type(self.model).forward, self.model)(*args, **kwargs)

    def states(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Return the states before the head, shape (B, S, D). Positions go to a decoder that takes them."""
        if position_ids is not None and "position_ids" in self._names:
            options["position_ids"] = position_ids
        states: Tensor = self.decoder(input_ids=input_ids, **{"use_cache": False, **options})[0]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of states, (N, D) to (N, V), as the model itself computes them; differentiable."""
        dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        with stubbed(self.decoder, lambda *args, **kwargs: self._output(last_hidden_state=hidden[None])):
            logits: Tensor = self._generated(dummy).logits
        return logits[0]

    def _generated(self, ids: Tensor) -> Any:
        """Run the model's own forward pass on the decoder's tokens; an encoder's output is replaced by a zero state."""
        if not self.model.config.is_encoder_decoder:
            return self.own_forward(input_ids=ids, use_cache=False)
        return self.own_forward(encoder_outputs=(self._zero_state(),), decoder_input_ids=ids, use_cache=False)

    def _zero_state(self) -> Tensor:
        return torch.zeros((1, 1, self.hidden_size), dtype=self.model.dtype, device=self.device)

    @property
    def linear_head(self) -> nn.Linear | None:
        """The head, where it only multiplies by its weight and adds its bias; None where it does more.

        A head with adapters, or a quantized one, does more.
        """
        return self._linear_head if self.model.get_output_embeddings() is self._linear_head else None

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters that the logits of given states may depend on."""
        head = self.model.get_output_embeddings()
        outside = {id(parameter): parameter for parameter in head.parameters()}
        stacks = [self.decoder] + ([self.model.get_encoder()] if self.model.config.is_encoder_decoder else [])
        inside = {id(parameter) for stack in stacks for parameter in stack.parameters()}
        outside |= {id(p): p for p in self.model.parameters() if id(p) not in inside}
        return [parameter for parameter in outside.values() if parameter.requires_grad]

    @contextmanager
    def watched(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Yield a dict that holds the states after these layers, (B, S, D), once the decoder has run."""
        seen: dict[int, Tensor] = {}
        modules = layer_list(self.decoder, "", self.depth) if layers else ()

        def see(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[index] = output[0] if isinstance(output, (tuple, list)) else output

            return hook

        handles = [modules[index].register_forward_hook(see(index)) for index in layers]
        try:
            yield seen
        finally:
            for handle in handles:  # before the backward pass, in which checkpointed layers run again
                handle.remove()

    @torch.no_grad()
    def _probe(self) -> int:
        """Find the decoder's output type and whether the head is linear; return the size of the vocabulary."""
        head = self.model.get_output_embeddings()
        device = head.weight.device
        tokens = torch.arange(4, device=device)[None]
        seen = {"encoder_hidden_states": self._zero_state()} if self.model.config.is_encoder_decoder else {}
        runs_here = standing_in(self.model.config._attn_implementation)  # the head is the same by any attention
        with in_mode(self.model, training=False), without_autocast(device.type), attending_by(self.model, runs_here):
            output = self.decoder(input_ids=tokens, use_cache=False, **seen)
            self._output, states = type(output), output[0]
            whole = self._generated(tokens).logits[0]
            if not _equal(self.logits(states[0]), whole):
                raise PlanError(
                    f"the logits of {type(self.model).__name__} do not follow from what its decoder returns",
                    hint="Such a model cannot be trained here; another architecture can.",
                )
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(8, states.shape[-1], generator=generator).to(states)
            if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
                raw = nn.functional.linear(noise, head.weight, head.bias)
                scaled = noise * (LARGE / raw.abs().max().clamp(min=torch.finfo(raw.dtype).tiny))
                if _equal(self.logits(scaled), nn.functional.linear(scaled, head.weight, head.bias)):
                    self._linear_head = head
        return int(whole.shape[-1])


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether logits are equal up to rounding."""
    allowed = ROUNDING * torch.finfo(other.dtype).eps * float(other.abs().max())
    return one.shape == other.shape and float((wide(one) - wide(other)).abs().max()) <= allowed


@contextmanager
def stubbed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Return a context in which a module's forward pass is replaced by a stub."""
    before: Mapping[str, Any] = {name: module.__dict__[name] for name in ("forward",) if name in module.__dict__}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        module.__dict__.update(before)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Return a context in which a model is in this mode; after it each module has its former one."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


Batch = Mapping[str, Any]  # of tensors: input_ids and position_ids, (B, S), and trained, (N,)
Plan = Mapping[str, Any]  # of tensors, and of plans


@dataclass(frozen=True)
class Plans:
    """What the contents of a batch decide for the loss of a model: for its own states, and for a teacher's."""

    layout: Callable[[Batch], Plan]
    teacher: Callable[[Batch], Plan] | None = None
    multiple: int = 1  # of widths that are chosen here

    def __call__(self, batch: Batch) -> Plan:
        """Return the plans of a batch by these names; empty where nothing is to be decided.

        They are made where batches are made, on the CPU: on a GPU each look at the contents would wait for it.
        """
        batch = {**batch, "multiple": self.multiple}
        plans = {"layout": self.layout(batch), "teacher": {} if self.teacher is None else self.teacher(batch)}
        return {name: plan for name, plan in plans.items() if plan}

    def untaught(self) -> "Plans":
        """Return the plans without a teacher's."""
        return Plans(self.layout, multiple=self.multiple)


class AttentionLayout(ABC):
    """Which tokens each token sees, and so how the states before the head are computed.

    `has_encoder`: it is for models with an encoder.
    """

    has_encoder: ClassVar[bool] = False

    def plan(self, batch: Batch) -> Plan:
        """Return what the contents of a batch decide: places, widths, masks; by default nothing."""
        return {}

    def states(
        self,
        split: SplitModel,
        input_ids: Tensor,
        position_ids: Tensor | None,
        trained: Tensor,
        *,
        plan: Plan | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D), at least of the tokens at `trained`, (N,).

        These are places along the rows: place s of row b is b · S + s. Without the batch's plan it is made here.
        """
        plan = plan or self.plan({"input_ids": input_ids, "position_ids": position_ids, "trained": trained})
        return self.computed(split, input_ids, position_ids, plan, **options)

    @abstractmethod
    def computed(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, plan: Plan, **options: Any
    ) -> Tensor:
        """Return the states of a batch by its plan."""

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context for the head; by default one that changes nothing."""
        return nullcontext()


class Causal(AttentionLayout):
    """Each token sees the earlier tokens of its document: the model's own attention."""

    def computed(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, plan: Plan, **options: Any
    ) -> Tensor:
        """Return the states of the model's own forward pass."""
        return split.states(input_ids, position_ids, **options)


def taken(values: Tensor, places: Tensor) -> Tensor:
    """Return the values, (B, S) or (B, S, D), at places that are counted along all rows, (N,): shape (N,) or (N, D).

    On a GPU this waits for nothing, as choosing by a mask would: how many a mask chooses is known on the GPU alone.
    """
    return values.flatten(0, 1).index_select(0, places)


def marked(places: Tensor, shape: torch.Size) -> Tensor:
    """Return whether each place of a batch of this shape is among `places`, which are counted along all rows."""
    assert places.dtype == torch.long, "places, not a mask"
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=places.device)
    return mask.index_fill(0, places, True).view(shape)


def document_numbers(position_ids: Tensor) -> Tensor:
    """Return the number of each token's document, shape (B, S): a document begins at each position 0."""
    return (position_ids == 0).cumsum(-1)


@dataclass(frozen=True, eq=False)
class LeftAligned:
    """The chosen tokens of each row, moved to its left: `ids`, `positions` and `mask`, shape (B, T); 0 for padding.

    `before` are the places of these tokens in the batch, `now` their places here, both counted along the rows.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    before: Tensor
    now: Tensor

    @classmethod
    def of(cls, batch: Batch, chosen: Tensor) -> "LeftAligned":
        """Return the tokens of a batch that are chosen, (B, S), at least as wide as it asks for. Waits for a GPU."""
        input_ids, position_ids = batch["input_ids"], batch["position_ids"]
        width = int(chosen.sum(1).max())
        width += -width % batch.get("multiple", 1)
        order = chosen.long().argsort(dim=1, stable=True, descending=True)[:, :width]
        mask = chosen.long().gather(1, order)
        ids, positions = (values.gather(1, order) * mask for values in (input_ids, position_ids))
        return cls(ids, positions, mask, *(each.flatten().nonzero()[:, 0] for each in (chosen, mask)))

    def padded(self, padding: int | None) -> Tensor:
        """Return `ids` with another id for padding; None: as they are."""
        return self.ids if padding is None else self.ids.masked_fill(self.mask == 0, padding)

    def spread(self, states: Tensor, shape: torch.Size) -> Tensor:
        """Return the states of its tokens, (B, T, D), at their places in a batch of shape (B, S), elsewhere zeros."""
        whole = states.new_zeros((shape.numel(), states.shape[-1]))
        return whole.index_put((self.before,), taken(states, self.now)).view(*shape, -1)


@dataclass(frozen=True)
class Seq2Seq(AttentionLayout):
    """The encoder reads a document up to the answer, the decoder writes the answer; a row holds one document."""

    has_encoder: ClassVar[bool] = True

    def plan(self, batch: Batch) -> Plan:
        """Return the tokens that the encoder reads and those that the decoder does, and what is seen of the former."""
        input_ids, position_ids = batch["input_ids"], batch["position_ids"]
        assert position_ids is not None, "positions tell padding from a document"
        chosen = marked(batch["trained"], input_ids.shape)
        is_document = document_numbers(position_ids) == 1  # padding is another document
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        # In a row whose answer was cut off nothing is trained: the decoder starts at its end.
        last = torch.where(chosen.any(1), chosen.long().argmax(1), is_document.sum(1) - 1)[:, None]
        read = LeftAligned.of(batch, is_document & (place <= last))
        written = LeftAligned.of(batch, is_document & (place >= last))
        return {"read": vars(read), "written": vars(written), **self.seen(read)}

    def computed(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, plan: Plan, **options: Any
    ) -> Tensor:
        """Return the decoder's states, shape (B, S, D), with zeros before the answer."""
        read, written = LeftAligned(**plan["read"]), LeftAligned(**plan["written"])
        start = torch.full_like(written.ids[:, :1], split.model.config.decoder_start_token_id)
        states = split.states(
            torch.cat([start, written.ids[:, 1:]], 1),
            attention_mask=written.mask,
            encoder_hidden_states=self.encoded(split.model, read, plan),
            encoder_attention_mask=plan["seen"],
            **options,
        )
        return written.spread(states, input_ids.shape)

    def seen(self, read: LeftAligned) -> Plan:
        """Return the decoder's mask over the encoder's states, (B, T), as `seen`, and what `encoded` needs besides."""
        return {"seen": read.mask}

    def encoded(self, model: Any, read: LeftAligned, plan: Plan) -> Tensor:
        """Return the encoder's states of each row, shape (B, T, D)."""
        states: Tensor = model.get_encoder()(input_ids=read.ids, attention_mask=read.mask)[0]
        return states


def check_layout(layout: AttentionLayout, split: SplitModel) -> None:
    """Raise PlanError for a model with an encoder in a layout without one, and the other way round."""
    if layout.has_encoder != bool(split.model.config.is_encoder_decoder):
        has, lacks = ("one stack of layers", "two") if layout.has_encoder else ("an encoder and a decoder", "one stack")
        raise PlanError(
            f"{type(split.model).__name__} has {has}; what is trained here has {lacks}",
            hint="Encoder-decoders are no teachers, and a decoder alone is none of theirs.",
        )
