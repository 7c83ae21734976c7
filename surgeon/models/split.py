"""A language model split in two, of any family: a decoder that gives states, and a head that gives logits.

The head is the model's own forward pass around a decoder that stands still, so scales, caps and biases on the way to
the logits are its own, and nothing is known of any family. Where that comes to one matrix it is used as one.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgeon.errors import PlanError
from surgeon.models.skeleton import layer_list

LOUD = 1000.0  # the largest logit of the probe: any cap on logits (30 is usual, 50 is large) would show there
ROUNDING = 4  # units in the last place of the largest logit that two ways to compute it may differ by
# By how much of its length rounding may move a state. Measured: 1e-7 in float64 in families that attend in float32,
# 1e-6 in float32; another document in sight moves some state by its own length. 16 bits have units of 2^-8.
APART = {torch.float64: 1e-5, torch.float32: 1e-4}
APART_HALF = 0.1
PROBE_LENGTHS = (5, 7)  # of the two documents that are packed


class SplitModel:
    """A model of transformers that writes, as its decoder and its head. Raises PlanError for one that is not the two.

    Of an encoder-decoder the decoder is given what it sees of the encoder, as options of `states`.
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
        """The part that gives the states that the head reads."""
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
        """Where the model computes."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass as its class defines it, whatever its instance has in its place."""
        return MethodType(type(self.model).forward, self.model)(*args, **kwargs)

    def states(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Return the states in front of the head, shape (B, S, D). Positions go to a decoder that takes them."""
        if position_ids is not None and "position_ids" in self._names:
            options["position_ids"] = position_ids
        found: Tensor = self.decoder(input_ids=input_ids, **{"use_cache": False, **options})[0]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of states, (N, D) to (N, V), as the model itself computes them; differentiable."""
        dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        with stubbed(self.decoder, lambda *args, **kwargs: self._output(last_hidden_state=hidden[None])):
            logits: Tensor = self._written(dummy).logits
        return logits[0]

    def _written(self, ids: Tensor) -> Any:
        """Run the model's own forward pass on what its decoder reads; an encoder has said nothing, which is a zero."""
        if not self.model.config.is_encoder_decoder:
            return self.own_forward(input_ids=ids, use_cache=False)
        return self.own_forward(encoder_outputs=(self._silence(),), decoder_input_ids=ids, use_cache=False)

    def _silence(self) -> Tensor:
        return torch.zeros((1, 1, self.hidden_size), dtype=self.model.dtype, device=self.device)

    @property
    def linear_head(self) -> nn.Linear | None:
        """The head, where all it does is to multiply by its weight and to add its bias; None where it does more.

        Adapters around it, or a quantized one in its place, are more.
        """
        return self._linear_head if self.model.get_output_embeddings() is self._linear_head else None

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that logits may depend on once the states are given, those to be trained."""
        head = self.model.get_output_embeddings()
        mine = {id(parameter): parameter for parameter in head.parameters()}
        stacks = [self.decoder] + ([self.model.get_encoder()] if self.model.config.is_encoder_decoder else [])
        inside = {id(parameter) for stack in stacks for parameter in stack.parameters()}
        mine |= {id(p): p for p in self.model.parameters() if id(p) not in inside}
        return [parameter for parameter in mine.values() if parameter.requires_grad]

    @contextmanager
    def watched(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Yield a dict that holds the states behind these layers, (B, S, D), once the decoder has run."""
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
        """Learn what the decoder returns and whether the head is linear; return the size of the vocabulary."""
        head = self.model.get_output_embeddings()
        device = head.weight.device
        tokens = torch.arange(4, device=device)[None]
        seen = {"encoder_hidden_states": self._silence()} if self.model.config.is_encoder_decoder else {}
        with _evaluated(self.model), torch.autocast(device.type, enabled=False):
            output = self.decoder(input_ids=tokens, use_cache=False, **seen)
            self._output, states = type(output), output[0]
            whole = self._written(tokens).logits[0]
            if not _equal(self.logits(states[0]), whole):
                raise PlanError(
                    f"the logits of {type(self.model).__name__} do not follow from what its decoder returns",
                    hint="Such a model cannot be trained here; another architecture can.",
                )
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(8, states.shape[-1], generator=generator).to(states)
            if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
                raw = nn.functional.linear(noise, head.weight, head.bias)
                loud = noise * (LOUD / raw.abs().max().clamp(min=torch.finfo(raw.dtype).tiny))
                if _equal(self.logits(loud), nn.functional.linear(loud, head.weight, head.bias)):
                    self._linear_head = head
        return int(whole.shape[-1])


def keeps_documents_apart(model: Any) -> bool:
    """Return whether documents that share a row, told apart by positions that restart, do not see each other.

    Measured on the model itself: the states of two documents of random tokens, in a row and each in one of its own.
    """
    decoder = model.get_decoder()
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return False
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    total = sum(PROBE_LENGTHS)
    tokens = torch.randint(0, embedding.shape[0], (1, total), generator=generator).to(embedding.device)
    parts = [torch.arange(length, device=embedding.device)[None] for length in PROBE_LENGTHS]
    with torch.no_grad(), _evaluated(model), torch.autocast(embedding.device.type, enabled=False):
        packed = decoder(input_ids=tokens, position_ids=torch.cat(parts, 1), use_cache=False)[0]
        pieces = zip(torch.split(tokens, list(PROBE_LENGTHS), 1), parts, strict=True)
        alone = [decoder(input_ids=ids, position_ids=places, use_cache=False)[0] for ids, places in pieces]
    apart = torch.cat(alone, 1)
    moved = (packed - apart).double().norm(dim=-1) / apart.double().norm(dim=-1)
    return float(moved.max()) <= APART.get(packed.dtype, APART_HALF)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether logits are the same but for rounding."""
    allowed = ROUNDING * torch.finfo(other.dtype).eps * float(other.abs().max())
    return one.shape == other.shape and float((one.double() - other.double()).abs().max()) <= allowed


@contextmanager
def stubbed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Return a context in which a module does something else, and behind which it is as it was."""
    before: Mapping[str, Any] = {name: module.__dict__[name] for name in ("forward",) if name in module.__dict__}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        module.__dict__.update(before)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Return a context in which a model drops nothing, and behind which each of its modules is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class AttentionLayout:
    """How the states in front of the head are computed. `has_encoder`: of a model that has one."""

    has_encoder: ClassVar[bool] = False

    def states(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D), at least of the tokens `chosen`, (B, S): those trained."""
        raise NotImplementedError

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the head reads them; one that changes nothing, unless a layout says otherwise."""
        return nullcontext()


class Causal(AttentionLayout):
    """Every token sees those of its document before it, as the model itself has it."""

    def states(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the states of the model's own forward pass."""
        return split.states(input_ids, position_ids, **options)


def check_layout(layout: AttentionLayout, split: SplitModel) -> None:
    """Raises PlanError for a model with an encoder in a layout without one, and the other way round."""
    if layout.has_encoder != bool(split.model.config.is_encoder_decoder):
        has, lacks = ("one stack of layers", "two") if layout.has_encoder else ("an encoder and a decoder", "one stack")
        raise PlanError(
            f"{type(split.model).__name__} has {has}; what is trained here has {lacks}",
            hint="Encoder-decoders are trained with --gist, and are no teachers.",
        )
