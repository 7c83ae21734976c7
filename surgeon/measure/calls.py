"""What a model hands to its layers, and what it gets back from a layer that stands still."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253


@dataclass(frozen=True)
class Call:
    """What the model hands to one of its layers beside the hidden states: masks, positions."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def noted(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "tuple[Tensor, Call]":
        """Return the hidden states of a call, and the rest of it."""
        if args:
            return args[0], cls((None, *args[1:]), kwargs)
        return kwargs["hidden_states"], cls((), {key: value for key, value in kwargs.items() if key != "hidden_states"})

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of this call for other states, by position and by name."""
        if self.args:
            return (hidden, *self.args[1:]), dict(self.kwargs)
        return (), {"hidden_states": hidden, **self.kwargs}


def alike(one: object, other: object) -> bool:
    """Return whether two calls hand over the same: tensors (some depend on the tokens), flags, and tuples of them."""
    match one, other:
        case Tensor(), Tensor():
            return one.shape == other.shape and torch.equal(one, other)
        case Call(), Call():
            return alike(one.args, other.args) and alike(one.kwargs, other.kwargs)
        case (tuple() | list(), tuple() | list()):
            return len(one) == len(other) and all(map(alike, one, other))
        case Mapping(), Mapping():
            return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
        case _:
            return one is other or (type(one) is type(other) and isinstance(one, (int, float, str)) and one == other)


class StandIn(Tensor):
    """A tensor that is also the first of several outputs: some models take a layer's output, some its item 0."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what is computed from it is a plain tensor

    def __getitem__(self, key: Any) -> Tensor:
        return self if isinstance(key, int) and key == 0 else super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))
