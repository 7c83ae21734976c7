"""Toys and logits in float64 throughout, so that a difference of logits is one of the function and not of rounding.

Loading a model in float64 is not enough: RMS norms, Cohere's layer norm, routers and eager attention go to float32
inside. Rounding alone leaves 1e-14 then, and 1e-6 without; what a wrong growth leaves is 1e-2 and more.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

EXACT = 1e-9  # largest |difference| of logits of order 1 in float64: rounding leaves 3e-14, a wrong frequency 1e-1
CLOSE = 1e-4  # the same in float32, relative to the largest logit: the acceptance of function-preserving growth
LENGTH = 40  # tokens: a wrong rotary frequency is invisible at position 0 and small at the next few
# Soft caps, attention sinks, slopes for positions: transformers computes them in its own code only.
EAGER = ("gemma2", "gpt_oss", "bloom", "codegen", "gpt_neo", "gptj", "mpt", "granite_swa", "vaultgemma")

# Hidden sizes that 8, 12 and 16 heads divide, and so does 1.25 times them by 8 and 1.5 times them by 12: for the
# families that insist. The toys' own 48 times 1.25 is no multiple of 8.
HIDDEN = {name: {"hidden_size": 96} for name in ("llama", "llama-tied", "llama-biases", "gemma2", "gemma3_text")}


class Exact64(TorchFunctionMode):
    """A context in which what is asked to take a float64 tensor to float32 leaves it in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


class WithoutEpsilon(Exact64):
    """The same, and layer norms add next to nothing under the root: for one whose epsilon is in the code."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.layer_norm:
            kwargs = {**(kwargs or {}), "eps": 1e-18}
            args = args[:4]
        return super().__torch_function__(func, types, args, kwargs)


def build64(name: str, directory: Path, **overrides: Any) -> Path:
    """Return `directory`, now holding the toy `name` in float64, its config changed by `overrides`."""
    return toys.build(name, directory, dtype="float64", **HIDDEN.get(name, {}) | overrides)


def load64(directory: Path) -> Any:
    """Return the model in a folder, loaded plainly in float64. Nothing may be missing, left over or mismatched."""
    # Eager attention goes to float32. So are the routers of some models, whatever is asked for.
    return _load(directory, dtype=torch.float64, attn_implementation="sdpa").double()


def logits64(directory: Path) -> Tensor:
    """Return the logits of the model in a folder, computed in float64 throughout."""
    with Exact64():
        return logits(load64(directory))


def logits32(directory: Path) -> Tensor:
    """Return the logits of the model in a folder as stock transformers computes them in float32."""
    return logits(_load(directory, dtype=torch.float32))


# The logits of toys, which never change.
original64 = cache(logits64)
original32 = cache(logits32)


def logits(model: Any) -> Tensor:
    """Return the logits for LENGTH tokens, the same for every model."""
    with torch.no_grad():
        return model(**toys.inputs(model, length=LENGTH), use_cache=False).logits


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference."""
    return (one - other).abs().max().item()


def _load(directory: Path, **options: Any) -> Any:
    if AutoConfig.from_pretrained(directory).model_type in EAGER:
        options["attn_implementation"] = "eager"
    model, report = toys.load(directory, **options)
    assert not any(report.values()), report
    return model
