"""A forward pass that streams: layer by layer, with the weights of one layer in memory.

Every batch goes through a layer before the next one is read, so that a model larger than memory runs from the disk.
The rest (embeddings, positions, masks, the final norm, the head) is computed by the model's own forward pass. It is
paused before each layer (`start`), so that all that a layer hands on arrives. Where layers run on states of the
caller's choice (`embed`), they are stubs in it; then it is checked that they take no more than the states from each
other. So this file knows nothing of any family.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.checkpoint.header import is_quantized
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import MeasureError
from surgeon.models.device import head_tokens, states_bytes
from surgeon.models.loading import check_tokens, libraries_fail, num_known
from surgeon.models.passage import (
    AROUND,
    RUN,
    Batch,
    Call,
    LayerCall,
    Passage,
    StubOutput,
    answering,
    differs,
    equal_calls,
    first_of,
    pause_at,
    states_of,
)
from surgeon.models.skeleton import Weights, build_skeleton, empty, layer_list, needed_rows

NO_TEXT = "Scores that read no text work: --score random, last or magnitude."
WHOLE = "Scores of the whole model work: --score angular or block-influence."
PROBE = ((0, 0, 0, 0), (0, 0, 0, 1))  # rows of tokens that differ in the last one
# What rounding may differ by, of the largest number, by bytes of the dtype. A token's effect is far larger.
SAME = {4: 1e-3, 2: 5e-2}
BATCH_TOKENS = 2048  # tokens that go through a layer at once; more make no matrix product faster on a CPU
BATCH_TOKENS_GPU = 16384
Progress = Callable[[int], None]  # is called with the number of tokens that just went through a layer


def check_runs(source: Source) -> None:
    """Raises MeasureError for a model whose layers cannot be run one by one on a text. Reads the config only."""
    if source.config.get("is_encoder_decoder"):
        raise MeasureError(
            f"{source.label} has an encoder and a decoder; layers are scored in a model with one stack",
            hint=NO_TEXT,
        )
    if is_quantized(source.config):
        raise MeasureError(
            f"{source.label} is quantized; scores are taken from unquantized weights",
            hint="Prune the unquantized checkpoint, then quantize the result.",
        )


class StreamedModel:
    """A checkpoint that computes from its files. With `resident`, layers stay in memory once they are read.

    Where it `reads_ahead`, by default on a GPU, the next layer is copied to the device while one computes.
    """

    def __init__(
        self,
        source: Source,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: bool = False,
        reads_ahead: bool | None = None,
    ) -> None:
        spec = spec_of(source)
        anatomy = read_anatomy(spec)
        check_runs(source)
        self.anatomy, self.depth = anatomy, anatomy.depth
        self.device, self._resident = torch.device(device), resident
        is_ahead = self.device.type == "cuda" if reads_ahead is None else reads_ahead
        self.weights = Weights(source, ahead=self.device if is_ahead else None)
        self._model = build_skeleton(source, dtype).to_device(self.device)
        self._layers = layer_list(self._model.module, anatomy.stacks[0].prefix, self.depth)
        self._model.find_base(self._layers)
        pause_at(self._layers, self._model.bases)
        self._names: list[list[str]] = [[] for _ in range(self.depth)]
        self._outer: list[str] = []
        for name in self.weights.stored:
            place = anatomy.stacks[0].locate(name)
            (self._names[place[0]] if place else self._outer).append(name)
        self._calls: dict[Any, list[Call]] = {}
        self._loaded: set[int] = set()
        self._probe: Batch | None = None
        self._predicts = False  # whether it is known to predict the next token
        self._output: Any = None  # what the forward pass before the head returns, for its type

    @property
    def label(self) -> str:
        """The checkpoint as the user named it."""
        return self._model.label

    @property
    def whole(self) -> Any:
        """The model of transformers; its parts have weights while they compute."""
        return self._model.module

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self._model.module.config.get_text_config().hidden_size)

    @property
    def batch_tokens(self) -> int:
        """How many tokens go through a layer at once, or one row of more."""
        return BATCH_TOKENS_GPU if self.device.type == "cuda" else BATCH_TOKENS

    @property
    def states_bytes(self) -> int:
        """How many bytes the states of all rows may take that go through the layers together."""
        return states_bytes(str(self.device))

    def module(self, layer: int) -> nn.Module:
        """Return the module of a layer; its weights are there inside `layer`."""
        return self._layers[layer]

    def names(self, layer: int) -> Sequence[str]:
        """Return the names of the tensors of a layer, in the files."""
        return self._names[layer]

    def embed(self, tokens: Tensor, real: Tensor | None = None) -> list[Batch]:
        """Return the rows, shape (R, T), as batches whose layers can be run on any states. `real` is False for padding.

        Padded rows are positioned by their real tokens, wherever the padding lies.
        """
        if self._probe is None:
            self._probe = self.start(torch.tensor(PROBE))[0]
            self._probe.calls = self._batches(torch.tensor(PROBE), None, self._embedded)[0].calls
        return self._batches(tokens, real, self._embedded)

    def start(self, tokens: Tensor, real: Tensor | None = None) -> list[Batch]:
        """Return the rows, shape (R, T), as batches that go through each layer once, in order, from their own states.

        Each is a forward pass of the model, which waits before its first layer. See `embed` for the rest.
        """
        return self._batches(tokens, real, self._started)

    def _batches(
        self, tokens: Tensor, real: Tensor | None, begin: Callable[[Tensor, Tensor | None], Batch]
    ) -> list[Batch]:
        check_tokens(int(tokens.max()), num_known(self._model.module), self.label)
        rows = max(1, self.batch_tokens // tokens.shape[1])
        with self._embedding(tokens):
            return [
                begin(tokens[at : at + rows], None if real is None else real[at : at + rows])
                for at in range(0, len(tokens), rows)
            ]

    def run(self, batches: Sequence[Batch], *, progress: Progress | None = None) -> None:
        """Take started batches through all layers: every batch goes through one before the next one is read."""
        for index in range(self.depth):
            with self.layer(index) as apply:
                for batch in batches:
                    apply(batch, batch.hidden)
                    if progress:
                        progress(batch.tokens.numel())

    @contextmanager
    def layer(self, index: int) -> Iterator[Callable[[Batch, Tensor], Tensor]]:
        """Return a context with a layer's weights in memory: a function from a batch and its states to the next.

        Raises MeasureError where a batch of `embed` goes through a layer that takes more than states from earlier ones.
        """
        if index not in self._loaded:
            self._fill(self._names[index])
            self._model.check_present(self._layers[index], ())
            self._loaded.add(index)
        if index + 1 < self.depth and index + 1 not in self._loaded:
            self.weights.read_ahead(self._names[index + 1], self._model.dtype)
        module = self._layers[index]
        self._check_alone(index)

        def apply(batch: Batch, hidden: Tensor) -> Tensor:
            if batch.passage is not None:
                return self._step(index, batch)
            args, kwargs = batch.calls[index].with_hidden(hidden)
            return first_of(module(*args, **kwargs))

        try:
            yield apply
        finally:
            if not self._resident:
                empty(module)
                self._loaded.discard(index)

    def _check_alone(self, index: int) -> None:
        """Raises MeasureError where a layer takes more from earlier ones than states. Each is checked once."""
        probe = self._probe
        if probe is None or probe.passage is None or probe.output is not None:
            return
        while probe.passage.call is not None and probe.passage.call.index < index:  # layers that no choice keeps
            probe.passage.go_on(states_of(probe.passage.call).as_subclass(StubOutput))
        call = probe.passage.call
        if call is None or call.index != index:
            return
        if (name := differs(self._layers[index], call, probe.calls[index])) is not None:
            raise MeasureError(
                f"layer {index} of {self.label} takes {name} from the layers before it, so it cannot run without them",
                hint=WHOLE,
            )
        with torch.no_grad():
            self._step(index, probe)

    def _check_head_alone(self, head: Callable[[Tensor], Tensor]) -> None:
        """Raises MeasureError where the logits depend on more than the states after the last layer."""
        probe = self._probe
        if probe is None or probe.passage is None or probe.output is None:
            return
        last = probe.hidden
        with torch.no_grad():
            self._end(probe)
            whole, alone = self._logits(probe.hidden).float(), head(last).float()
        probe.passage = None
        allowed = SAME[self._model.dtype.itemsize] * float(whole.abs().max())
        if float((whole - alone).abs().max()) > allowed:
            raise MeasureError(
                f"the logits of {self.label} depend on more than its last layer's states, so no layer can be left out",
                hint=WHOLE,
            )

    def check_predicts(self) -> None:
        """Raises MeasureError where a token sees those after it: such a model does not predict the next token."""
        if self._predicts:
            return
        with torch.no_grad():
            batch = self.start(torch.tensor(PROBE))[0]
            with self.layer(0) as apply:
                states = apply(batch, batch.hidden)
        if states.ndim == 4 and states.shape[1:3] == batch.tokens.shape:  # several streams, one after the other
            states = states.movedim(0, 2)
        self.check_per_token(states[..., 0] if states.ndim > 3 else states, batch.tokens)
        check_causal(states, self.label)
        self._predicts = True

    def _step(self, index: int, batch: Batch) -> Tensor:
        """Run the layer before which a batch's forward pass waits; return its states, and let the pass go on."""
        passage = batch.passage
        assert passage is not None, "the batch was started"
        call = passage.call
        if call is None or call.index != index:
            raise MeasureError(f"{self.label} does not run its layers once each, in their order", hint=NO_TEXT)
        output = self._layers[index].forward(*call.args, **call.kwargs)
        batch.hidden = after = first_of(output)
        if index == self.depth - 1:  # what comes next has no weights yet
            batch.output = output
            return after
        passage.go_on(output)
        if passage.call is not None:
            batch.hidden = states_of(passage.call)
        return after

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Return a context with a function from the states after the last layer, (..., D), to logits, (..., V)."""
        model = self._model.module

        def apply(hidden: Tensor) -> Tensor:
            flat = hidden.reshape(1, -1, hidden.shape[-1])
            dummy = torch.zeros(flat.shape[:2], dtype=torch.long, device=self.device)
            with self._stubbed({self.depth - 1: flat}):
                logits: Tensor = model(input_ids=dummy, use_cache=False).logits
            return logits.view(*hidden.shape[:-1], -1)

        with self._around():
            self._check_head_alone(apply)
            yield apply

    @contextmanager
    def finish(self, batches: Sequence[Batch]) -> Iterator[Callable[[Tensor], Tensor]]:
        """End the passes of started batches: `hidden`, shape (B, T, D), is what the head reads now.

        Return a context with a function from such states, (..., D), to logits, (..., V).
        """
        with self._around():
            for batch in batches:
                self._end(batch)
            yield self._logits

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of states that the head reads."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        calls: list[LayerCall] = []

        def stub(call: LayerCall) -> Any:
            calls.append(call)
            kind = type(self._output)
            return (flat,) if kind is tuple else kind(last_hidden_state=flat)

        dummy = torch.zeros(flat.shape[:2], dtype=torch.long, device=self.device)
        with answering(stub):
            logits: Tensor = self._model.module(input_ids=dummy, use_cache=False).logits
        if not calls or logits.shape[:-1] != dummy.shape:
            raise MeasureError(f"the logits of {self.label} are not computed from one state per token", hint=NO_TEXT)
        return logits.view(*hidden.shape[:-1], -1)

    def _end(self, batch: Batch) -> None:
        """Let the forward pass of a batch run from its last layer to the states before the head."""
        passage = batch.passage
        assert passage is not None, "the batch was started"
        passage.go_on(batch.output)
        if passage.call is not None:
            raise MeasureError(f"{self.label} runs its layers more than once", hint=NO_TEXT)
        self._output, batch.output = passage.result, None
        batch.hidden = first_of(self._output)
        self.check_per_token(batch.hidden, batch.tokens)

    def check_head(self) -> None:
        """Raises MeasureError for a model without a language model head, or without its weights."""
        with self._around():
            pass

    # --- around the layers ------------------------------------------------------------------------------------

    @contextmanager
    def _embedding(self, tokens: Tensor) -> Iterator[None]:
        """Return a context with the weights used before the layers: of the token embedding only the rows needed."""
        family = self.anatomy.whole_family
        heads = {name for name in self._outer if family and self.anatomy.row(name)[0].kind == "head"}
        table = next((name for name in self._outer if family and self._is_token_embedding(name)), None)
        names = [name for name in self._outer if name not in heads and name != table]
        try:
            self._fill(names)
            model = self._model.module
            used: Tensor = tokens.unique()  # type: ignore[no-untyped-call]  # the ids that occur, ascending
            with nullcontext() if table is None else needed_rows(model, self.weights, table, used, self.device):
                self._model.check_present(self._model.base, self._layers)
                yield
        finally:
            self._model.empty_around(self._layers)

    @contextmanager
    def _around(self) -> Iterator[None]:
        """Return a context with the weights of the head and all else around the layers."""
        model = self._model.module
        if model.get_output_embeddings() is None:
            raise MeasureError(f"{self.label} has no language model head", hint="Perplexity needs one.")
        try:
            self._fill(self._outer)
            model.tie_weights()
            self._model.check_present(model, self._layers)
            yield
        finally:
            self._model.empty_around(self._layers)

    def _fill(self, names: Sequence[str]) -> None:
        self._model.fill(self.weights.unread(names, self._model.dtype), self.device)

    def _is_token_embedding(self, name: str) -> bool:
        row, _ = self.anatomy.row(name)
        return row.kind == "embedding" and axes_of(row.axes[0]) == {"vocab"}

    def _inputs(self, tokens: Tensor, real: Tensor | None) -> tuple[dict[str, Any], Tensor | None]:
        """Return the arguments of the forward pass for rows, and what is real; a mask only where there is padding."""
        inputs: dict[str, Any] = {"input_ids": tokens.to(self.device), "use_cache": False}
        if real is not None and not bool(real.all()):
            mask = real.to(self.device).long()
            inputs["attention_mask"] = mask
            if self._model.takes_positions and not bool(real[:, 0].all()):  # else tokens stand at their own places
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            return inputs, mask.bool()
        return inputs, None

    def _started(self, tokens: Tensor, real: Tensor | None) -> Batch:
        inputs, mask = self._inputs(tokens, real)
        passage = Passage(partial(self._model.base, **inputs))
        if passage.call is None or passage.call.index != 0:
            raise MeasureError(f"{self.label} does not run its layers once each, in their order", hint=NO_TEXT)
        return Batch(inputs["input_ids"], mask, states_of(passage.call), passage=passage)

    def _embedded(self, tokens: Tensor, real: Tensor | None) -> Batch:
        inputs, mask = self._inputs(tokens, real)
        seen: dict[int, tuple[Tensor, Call]] = {}
        alone = libraries_fail(f"the layers of {self.label} do not run alone", hint=WHOLE)
        with alone, self._stubbed({}, seen=seen), torch.no_grad():
            self._model.base(**inputs)
        self.check_per_token(seen[0][0], tokens)
        calls = [seen[layer][1] for layer in range(self.depth)]
        if mask is None:  # rows of one shape mostly have equal masks: keep one set of them
            known = self._calls.setdefault(tokens.shape, calls)
            calls = [before if equal_calls(before, call) else call for before, call in zip(known, calls, strict=True)]
        return Batch(inputs["input_ids"], mask, seen[0][0], calls)

    def check_per_token(self, states: Tensor, tokens: Tensor) -> None:
        """Raises MeasureError for states that are not one per token."""
        if states.shape[:-1] != tokens.shape:
            shape = list(states.shape)
            message = f"the layers of {self.label} pass on states of shape {shape}, not one per token"
            raise MeasureError(message, hint=NO_TEXT)

    @contextmanager
    def _stubbed(
        self, given: Mapping[int, Tensor], *, seen: dict[int, tuple[Tensor, Call]] | None = None
    ) -> Iterator[None]:
        """Make every layer a stub that returns its input, or the states `given` for it; record its calls in `seen`."""

        def stub(call: LayerCall) -> Any:
            if call.index == AROUND:
                return RUN
            hidden, others = Call.split(call.args, call.kwargs)
            if seen is not None:
                seen[call.index] = (hidden.as_subclass(Tensor), others)
            return given.get(call.index, hidden).as_subclass(StubOutput)

        with answering(stub):
            yield


def check_causal(states: Tensor, label: str) -> None:
    """Raises MeasureError where states or logits on PROBE, shape (2, 4, ...), show that a token sees later ones."""
    one, other = states[:, :-1].float()
    same = SAME.get(states.dtype.itemsize, SAME[4])
    if float((one - other).abs().max()) > same * float(one.abs().max()):
        raise MeasureError(
            f"in {label} a token sees those after it, so it cannot predict them",
            hint="Use a model that writes from left to right (GPT, Llama ...).",
        )


def row_sums(head: Callable[[Tensor], Tensor], batch: Batch, states: Tensor, counted: Tensor) -> Tensor:
    """Return the sum of each row's losses over the targets `counted`, (B, T - 1): shape (B,), float64, on the CPU."""
    chosen = counted.to(states.device)
    flat, targets = states[:, :-1][chosen], batch.tokens[:, 1:][chosen]
    size = min(head_tokens(states.device), batch.tokens.shape[1])  # no more than the model has positions for
    rows, sums = counted.cpu().nonzero()[:, 0], torch.zeros(len(counted), dtype=torch.float64)
    for at in range(0, len(flat), size):
        logits, few = head(flat[at : at + size]).float(), slice(at, at + size)
        losses = nn.functional.cross_entropy(logits, targets[few], reduction="none")
        sums.index_add_(0, rows[few], losses.cpu().double())
    return sums
