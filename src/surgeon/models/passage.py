"""A model's own forward pass, paused at each layer: whoever drives it gives the layer's output.

The pass runs in a thread of its own, so that its local variables stay where they are until the layer has run.
"""

import atexit
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import wraps
from queue import SimpleQueue
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_THREAD = threading.local()  # `answer`: who gives the outputs of paused modules in this thread
RUN = object()  # the answer that lets a module run as it is
PATIENCE = 30.0  # seconds that threads inside of torch have to end before the process does
AROUND = -1  # the index of a module around the layers


# What tells each thread that runs torch to end soon. Python ends daemon threads as it shuts down, wherever they are,
# and one inside of torch aborts the process: "terminate called without an active exception", SIGABRT.
_RUNNING: "WeakKeyDictionary[Thread, Callable[[], None]]" = WeakKeyDictionary()
_LOCK = threading.Lock()
_ENDING = threading.Event()


def await_at_exit(stop: Callable[[], None]) -> None:
    """Let the process wait for this thread, which is about to run torch, before it ends; `stop` asks it to end soon.

    Ends the thread where the process is ending already.
    """
    with _LOCK:
        if _ENDING.is_set():
            raise SystemExit
        _RUNNING[threading.current_thread()] = stop


@atexit.register
def _end_threads() -> None:
    with _LOCK:
        _ENDING.set()
        running = list(_RUNNING.items())
    try:
        for _, stop in running:
            stop()
        deadline = time.monotonic() + PATIENCE
        for thread, _ in running:
            thread.join(max(0.0, deadline - time.monotonic()))
    except KeyboardInterrupt:
        os._exit(130)  # Ctrl-C once more: at once


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

    def stop(self) -> None:
        """Let the forward pass end at its next layer."""
        self.outputs.put(_StoppedError())

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
        self._line.stop()

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
    await_at_exit(line.stop)
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


@dataclass
class Batch:
    """Rows on their way through the layers. `hidden`, shape (B, T, D), is the input of the next layer.

    `real`, shape (B, T), is False for padding; None where there is none. A batch has either the calls of its layers, or
    the forward pass that makes them.
    """

    tokens: Tensor
    real: Tensor | None
    hidden: Tensor
    calls: Sequence[Call] = ()
    passage: Passage | None = None
    output: Any = None  # of the last layer, until the forward pass goes on with it

    def chosen(self, states: Tensor) -> Tensor:
        """Return the states of the tokens that are no padding, shape (N, D)."""
        return states.flatten(0, 1) if self.real is None else states[self.real]


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


@contextmanager
def silenced(part: nn.Module) -> Iterator[None]:
    """Return a context in which the output of a module, or the first of its outputs, is zeros."""

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return type(output)((torch.zeros_like(output[0]), *output[1:]))

    handle = part.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
