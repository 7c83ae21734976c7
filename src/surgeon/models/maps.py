"""Attention maps of a model of transformers, shown one at a time and then freed.

transformers knows this attention by the name MAPS. It is the `eager_attention_forward` of the model's own file, so soft
caps, sinks in the softmax and grouped heads are the model's; the map that it returns is shown and dropped, and never
handed on. A map that is shown is the one that the output was computed with: it is multiplied with the values again.
Attention by code of its own (GPT-J, Falcon, BLOOM) is asked for its maps as transformers asks, layer by layer.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from surgeon.errors import MeasureError

MAPS = "surgeon_maps"
# What the order of a float32 sum may change, of the largest number; a wrong map changes the first digits.
SAME = 1e-4
HINT = "Scores of layers need no maps: surgeon prune MODEL --score block-influence."
Look = Callable[[nn.Module, Tensor], None]  # is shown an attention module and its map, shape (B, H, T, T)
_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)


@contextmanager
def looking(layer: nn.Module, look: Look) -> Iterator[None]:
    """Return a context in which `look` is shown each map of a layer, once the model attends by MAPS.

    Attention by code of its own is asked for the map that it returns beside its output.
    """
    token = _LOOK.set(look)
    handles = []
    for part in _innermost(layer):
        if "output_attentions" in inspect.signature(part.forward).parameters:
            handles.append(part.register_forward_pre_hook(_ask, with_kwargs=True))
        handles.append(part.register_forward_hook(_show))
    try:
        yield
    finally:
        _LOOK.reset(token)
        for handle in handles:
            handle.remove()


def _ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"output_attentions": True}


def _show(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
    """Show what is a causal map among the outputs of a module. Those of MAPS return none."""
    look = _LOOK.get()
    for maps in output[1:] if isinstance(output, tuple) else ():
        if look is not None and isinstance(maps, Tensor) and _is_causal_map(maps):
            look(module, maps)


def _is_causal_map(maps: Tensor) -> bool:
    """Return whether each row of a tensor, (B, H, T, T), is weights that sum to 1, none of them after the diagonal."""
    if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2] or not maps.is_floating_point():
        return False
    is_weights = bool((maps >= 0).all()) and not bool(maps.triu(1).any())
    return is_weights and float((maps.float().sum(-1) - 1).abs().max()) < SAME


def _innermost(layer: nn.Module) -> list[nn.Module]:
    """Return the parts of a layer that are attention and hold no other that is."""
    named = [part for name, part in layer.named_modules() if part is not layer and _is_attention(name, part)]
    return [part for part in named if not any(other in named for other in part.modules() if other is not part)]


def attention_with_map(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return the output of the model's own eager attention, (B, T, H, E), and no map: that is shown to `looking`.

    Raises MeasureError where the file of the module has no eager attention, or one whose map is not what it used.
    """
    file = sys.modules[type(module).forward.__module__]
    eager = getattr(file, "eager_attention_forward", None)
    if eager is None:
        raise MeasureError(f"{type(module).__name__} has no eager attention, whose maps could be seen", hint=HINT)
    output, maps = eager(module, query, key, value, attention_mask, **options)
    if (look := _LOOK.get()) is not None:
        _check(module, maps, value, output)
        look(module, maps)
    return output, None


def _check(module: nn.Module, maps: Tensor | None, value: Tensor, output: Tensor) -> None:
    """Raises MeasureError unless the maps, multiplied with the values, are the output."""
    name = type(module).__name__
    if maps is None or maps.ndim != 4 or maps.shape[1] % value.shape[1] or maps.shape[-1] != value.shape[-2]:
        shape = None if maps is None else list(maps.shape)
        raise MeasureError(f"{name} returns no map for each of its heads, but {shape}", hint=HINT)
    if not bool(output.isfinite().all()):
        raise MeasureError(f"{name} computes numbers that are not finite", hint="Are its weights? Convert it again.")
    values = value.repeat_interleave(maps.shape[1] // value.shape[1], 1)
    again = (maps.to(values.dtype) @ values).transpose(1, 2)
    is_alike = again.numel() == output.numel()
    if not is_alike or float((again.reshape(output.shape) - output).abs().max()) > SAME * float(output.abs().max()):
        raise MeasureError(f"the maps that {name} returns are not those that its output was computed with", hint=HINT)


def has_attention(layer: nn.Module) -> bool:
    """Return whether a part of a layer is attention, by its own name or that of its class."""
    return bool(_innermost(layer))


def adds_to_states(attention: nn.Module) -> bool:
    """Return whether an attention adds its output to the states itself (BLOOM's does), so that zeros would end them."""
    return "residual" in inspect.signature(attention.forward).parameters


def _is_attention(name: str, part: nn.Module) -> bool:
    kind = type(part).__name__.lower()
    return name.lower().endswith(("attn", "attention")) or "attn" in kind or "attention" in kind


AttentionInterface.register(MAPS, attention_with_map)
ALL_MASK_ATTENTION_FUNCTIONS.register(MAPS, eager_mask)
