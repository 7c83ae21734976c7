"""Independent judges of a result: what transformers itself loads and computes, with the source beside it.

Nothing here reads a plan's expressions or a family's table. A verdict is "exact" where equality is asked for and holds,
"within" where the difference is within the tolerance of the claim, or a sentence that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import every_type
import torch
from exact64 import Exact64
from safetensors import safe_open
from torch import Tensor, nn

EXACT, WITHIN = "exact", "within"
CLOSE = 1e-4  # of the largest logit, in float32: the acceptance of function-preserving growth
EXACT64 = 1e-9  # the same in float64
_Layers = nn.ModuleList | nn.Sequential


class Wrong(Exception):  # noqa: N818  # a verdict, not an error
    """A result that is not what it claims to be."""


def loaded(directory: Path, **kwargs: Any) -> Any:
    """Return the model in a directory. Raises Wrong where a tensor is missing, left over or misshapen."""
    model, report = every_type.load(directory, **kwargs)
    for what, names in report.items():
        if names:
            raise Wrong(f"loads with {len(names)} {what}, such as {min(map(str, names))}")
    return model


def judge_depth(source: Any, result: Path, layer_map: Sequence[int]) -> str:
    """Return the verdict on a result whose layer i is layer layer_map[i] of `source`.

    Layers that lie in one ascending run are compared together: the result with all others bypassed is the source with
    all others bypassed. Raises Wrong where they differ.
    """
    model = loaded(result)
    depth = len(layer_map)
    pairs = _stacks(source, model, depth)
    if not pairs:
        raise Wrong(f"no list of layers has become {depth} long")
    verdict = EXACT
    for run in _runs(layer_map):
        with bypassed([ours for _, ours in pairs], [i for i in range(depth) if i not in run]):
            got = every_type.logits(model)
        kept = [layer_map[i] for i in run]
        with bypassed([theirs for theirs, _ in pairs], [i for i in range(len(pairs[0][0])) if i not in kept]):
            expected = every_type.logits(source)
        if not torch.equal(got, expected):
            verdict = _close(got, expected, CLOSE)
    return verdict


def judge_growth(source: Path, result: Path) -> str:
    """Return the verdict on a result that must compute what its source computes. Raises Wrong where it does not.

    A wider model without a head gives states, not logits: the source's, repeated.
    """

    def pair(dtype: torch.dtype) -> Iterable[Tensor]:
        model = loaded(result, dtype=dtype)
        got, expected = every_type.logits(model), every_type.logits(loaded(source, dtype=dtype))
        is_wider = model.get_output_embeddings() is None and got.shape[-1] % expected.shape[-1] == 0
        return got, expected.repeat(1, 1, got.shape[-1] // expected.shape[-1]) if is_wider else expected

    return _judged(pair)


def _judged(pair: Callable[[torch.dtype], Iterable[Tensor]]) -> str:
    """Return the verdict on two logits, in float64, or where a difference of dtypes is left inside, in float32."""
    try:
        with Exact64():
            got, expected = pair(torch.float64)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        got, expected = pair(torch.float32)
    if got.shape == expected.shape and got.dtype == torch.float64:
        if (got - expected).abs().max().item() <= EXACT64 * max(1.0, expected.abs().max().item()):
            return EXACT
        got, expected = pair(torch.float32)
    return EXACT if torch.equal(got, expected) else _close(got, expected, CLOSE)


def judge_removal(source: Path, result: Path) -> str:
    """Return the verdict on a result of which some rows and columns were removed.

    Each tensor must be the source's without some slices, and the result must compute what the source does with these
    slices zeroed. Raises Wrong otherwise.
    """
    before, after = _tensors(source), _tensors(result)
    zeroed = {}
    for name, tensor in after.items():
        if name not in before:
            raise Wrong(f"{name} is not in the source")
        if tensor.shape != before[name].shape:
            zeroed[name] = _without_removed(name, before[name], tensor)
        elif not torch.equal(tensor, before[name]):
            raise Wrong(f"{name} has changed")
    if not zeroed:
        raise Wrong("no tensor has become smaller")

    def pair(dtype: torch.dtype) -> Iterable[Tensor]:
        yield every_type.logits(loaded(result, dtype=dtype))
        yield every_type.logits(_with(source, before | zeroed, dtype))

    return _judged(pair)


def judge_loading(result: Path) -> str:
    """Return "within" for a result that loads whole and computes numbers, where no more is claimed."""
    if not torch.isfinite(every_type.logits(loaded(result))).all():
        raise Wrong("logits are not finite")
    return WITHIN


def judge_new_tokens(source: Any, result: Path, new: Sequence[int]) -> str:
    """Return the verdict on a result with new tokens, whose other tokens must mean what they meant."""
    got, expected = every_type.logits(loaded(result)), every_type.logits(source)
    width = expected.shape[-1]
    if got.shape[-1] < width:
        raise Wrong(f"{got.shape[-1]} outputs for {width}")
    old = [token for token in range(width) if token not in new]
    got, expected = got[..., old], expected[..., old]
    return EXACT if torch.equal(got, expected) else _close(got, expected, CLOSE)


def _close(got: Tensor, expected: Tensor, tolerance: float) -> str:
    if got.shape != expected.shape:
        raise Wrong(f"logits of shape {list(got.shape)} for {list(expected.shape)}")
    difference, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= tolerance * max(largest, 1.0):
        raise Wrong(f"logits differ by {difference:.2g} of {largest:.2g}")
    return WITHIN


def _runs(layer_map: Sequence[int]) -> list[list[int]]:
    """Return the places of the result, cut where the source's numbers do not ascend."""
    runs: list[list[int]] = []
    for place, layer in enumerate(layer_map):
        if place and layer > layer_map[place - 1]:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _stacks(source: Any, result: Any, depth: int) -> list[tuple[_Layers, _Layers]]:
    """Return the lists of layers that have another length in the result, there `depth`, with the source's."""
    before = dict(_lists(source))
    return [
        (before[name], layers)
        for name, layers in _lists(result)
        if name in before and len(layers) == depth != len(before[name])
    ]


def _lists(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, _Layers]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield prefix + name, child
        if not isinstance(child, nn.ModuleList):
            yield from _lists(child, f"{prefix}{name}.")


@contextmanager
def bypassed(stacks: Sequence[_Layers], dropped: Sequence[int]) -> Iterator[None]:
    """Return a context in which these layers of every stack leave the hidden state as it was; they still run."""

    def wrapped(forward: Any) -> Any:
        return lambda *args, **kwargs: _restored(args, kwargs, forward(*args, **kwargs))

    layers = [stack[i] for stack in stacks for i in dropped]
    for layer in layers:
        layer.forward = wrapped(layer.forward)  # no hook: SqueezeBERT calls forward itself
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _restored(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return the output of a layer with the hidden states that went in."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if isinstance(output, dict):  # SqueezeBERT's
        return {**output, next(iter(output)): hidden}
    if hasattr(output, "_replace"):  # Reformer's, with two streams
        passed = {name: kwargs[f"prev_{name}"] for name in output._fields if f"prev_{name}" in kwargs}
        return output._replace(hidden_states=hidden, **passed)
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden


def _tensors(directory: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _without_removed(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Return `before` with zeros where `after` has nothing. Raises Wrong where `after` has others."""
    dims = [dim for dim in range(before.ndim) if before.shape[dim] != after.shape[dim]]
    if len(dims) != 1:
        raise Wrong(f"{name} lost slices of {len(dims)} dimensions")
    dim = dims[0]
    old, new = (tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1) for tensor in (before, after))
    places = {row.numpy().tobytes(): i for i, row in enumerate(old)}
    kept = [places.get(row.numpy().tobytes()) for row in new]
    if None in kept or len(set(kept)) != len(kept):
        raise Wrong(f"{name} holds slices that its source does not have")
    mask = torch.zeros(before.shape[dim], dtype=torch.bool)
    mask[kept] = True
    shape = [-1 if i == dim else 1 for i in range(before.ndim)]
    return before * mask.view(shape)


def _with(source: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the model of `source` with other numbers, which transformers loads from a copy of its files."""
    import shutil
    import tempfile

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        for path in source.iterdir():
            if path.suffix == ".json":
                shutil.copy(path, folder)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "model.safetensors.index.json").unlink(missing_ok=True)
        return loaded(Path(folder), dtype=dtype)


def loss(model: Any, tokens: Sequence[int], length: int) -> float:
    """Return the mean loss of rows of `length` tokens, each by what transformers predicts of it."""
    rows = torch.tensor(tokens).view(-1, length)
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
