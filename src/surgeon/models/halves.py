"""Half layers of a streamed model: the attention of a layer without its MLP, and the MLP without its attention.

What a half adds to the states is left out by not running the part that computes it: zeros take its place. That this is
what the model's own layer is made of is not assumed but checked, bit by bit: the MLP after the attention must give what
the whole layer gives.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.halves import ATTENTION, HALVES, MLP, Half
from surgeon.errors import MeasureError
from surgeon.models.maps import adds_to_states
from surgeon.models.passage import Batch
from surgeon.models.streaming import StreamedModel

ApplyHalf = Callable[[Half, Batch, Tensor], Tensor]  # returns the states after a half, from those before it
LAYERS_HINT = "Whole layers can be left out of it: --over layers."


class HalfLayers:
    """Runs the halves of a streamed model's layers.

    Raises MeasureError where no table says which part of a layer is its attention and which its MLP.
    """

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self._paths = [_paths(model, layer) for layer in range(model.depth)]
        self._outputs: dict[tuple[int, str], _Output] = {}
        self._checked: set[int] = set()
        self.shares = [_shares(model, layer) for layer in range(model.depth)]

    @contextmanager
    def layer(self, index: int) -> Iterator[ApplyHalf]:
        """Return a context with a layer's weights in memory: a function from a half, a batch and states to the next.

        Raises MeasureError for a layer that is no attention followed by an MLP, each of which adds to the states.
        """
        module = self.model.module(index)
        with self.model.layer(index) as apply:

            def half(name: Half, batch: Batch, states: Tensor) -> Tensor:
                if index not in self._checked:
                    self._check(index, apply, batch, states)
                with self._without(index, module, MLP if name == ATTENTION else ATTENTION):
                    return apply(batch, states)

            yield half

    def _check(self, index: int, apply: Callable[[Batch, Tensor], Tensor], batch: Batch, states: Tensor) -> None:
        module = self.model.module(index)
        with ExitStack() as stack:
            for path in {path for half in HALVES for path in self._paths[index][half]}:
                part = module.get_submodule(path)
                stack.callback(part.register_forward_hook(self._seen(index, path)).remove)
            whole = apply(batch, states)
        after = states
        for other in (MLP, ATTENTION):
            with self._without(index, module, other):
                after = apply(batch, after)
        if not torch.equal(whole, after):
            far = float((whole - after).abs().max())
            raise MeasureError(
                f"layer {index} of {self.model.label} is no attention followed by an MLP: they differ by {far:.2g}",
                hint=LAYERS_HINT,
            )
        self._checked.add(index)

    def _seen(self, index: int, path: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self._outputs[index, path] = _Output.of(output)

        return hook

    @contextmanager
    def _without(self, index: int, module: nn.Module, half: Half) -> Iterator[None]:
        """Return a context in which the parts of a half are not run, and put out zeros."""
        with ExitStack() as stack:
            for path in self._paths[index][half]:
                part = module.get_submodule(path)
                output = self._outputs.get((index, path))
                if output is not None:
                    part.forward = output.zeros
                    stack.callback(part.__dict__.pop, "forward")
            yield


@dataclass(frozen=True)
class _Output:
    """The form of what a part of a layer puts out: the width of its states, and how many other outputs follow."""

    width: int
    others: int | None  # None: the states alone, and no tuple

    @classmethod
    def of(cls, output: Any) -> "_Output":
        states = output if isinstance(output, Tensor) else output[0]
        return cls(states.shape[-1], None if isinstance(output, Tensor) else len(output) - 1)

    def zeros(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the part would, with zeros for its states."""
        given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        states = given.new_zeros(*given.shape[:-1], self.width)
        return states if self.others is None else (states, *[None] * self.others)


def _paths(model: StreamedModel, layer: int) -> Mapping[Half, tuple[str, ...]]:
    """Return the paths of the parts in a layer that compute each half."""
    anatomy, module = model.anatomy, model.module(layer)
    if anatomy.whole_family is None:
        raise MeasureError(
            f"surgeon has no table of {anatomy.model_type} that tells attention and MLP apart", hint=LAYERS_HINT
        )
    paths: dict[Half, dict[str, None]] = {ATTENTION: {}, MLP: {}}
    for name, rest in _inside(model, layer):
        row, part = anatomy.row(name)
        if part in HALVES and row.kind in ("linear", "conv1d") and "." in rest:
            paths[part][rest.split(".")[0]] = None
    children = dict(module.named_children())
    files_name = {half: {path: None for path in found if path in children} for half, found in paths.items()}
    for half, other in ((ATTENTION, MLP), (MLP, ATTENTION)):
        # The files may call a part otherwise than transformers does: it is the one that is left.
        left = [name for name, child in children.items() if name not in files_name[other] and _has_matrix(child)]
        paths[half] = files_name[half] or dict.fromkeys(left if paths[half] else ())
        own = [children[path] for path in paths[half]]
        if any(isinstance(child, nn.Linear) for child in own) or any(map(adds_to_states, own)):
            paths[half] = dict.fromkeys(_writers(model, layer, half))
    if not all(paths.values()) or set(paths[ATTENTION]) & set(paths[MLP]):
        raise MeasureError(
            f"layer {layer} of {model.label} does not have its attention and its MLP in parts of its own",
            hint=LAYERS_HINT,
        )
    return {half: tuple(found) for half, found in paths.items()}


def parts_of(model: StreamedModel, layer: int, half: Half) -> list[nn.Module]:
    """Return the parts of a layer that compute a half."""
    return [model.module(layer).get_submodule(path) for path in _paths(model, layer)[half]]


def _inside(model: StreamedModel, layer: int) -> Iterator[tuple[str, str]]:
    """Yield the names of a layer's tensors, in the files and inside the layer."""
    for name in model.names(layer):
        located = model.anatomy.stacks[0].locate(name)
        assert located is not None, "it is of a layer"
        yield name, located[1]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _writers(model: StreamedModel, layer: int, half: Half) -> list[str]:
    """Return the paths of the linear maps of a half that write the hidden state."""
    anatomy = model.anatomy
    modules = {path for path, _ in model.module(layer).named_modules()}
    found = []
    for name, rest in _inside(model, layer):
        row, part = anatomy.row(name)
        out = {"linear": 0, "conv1d": -1}.get(row.kind)
        path = rest.rpartition(".")[0]
        if part == half and out is not None and axes_of(row.axes[out]) == {"hidden"} and path in modules:
            found.append(path)
    return found


def _shares(model: StreamedModel, layer: int) -> Mapping[Half, float]:
    """Return the share of a layer's parameters that each half has, norms left out: what it costs to run it."""
    anatomy = model.anatomy
    sizes: dict[Half, int] = {ATTENTION: 0, MLP: 0}
    for name, _ in _inside(model, layer):
        if (part := anatomy.row(name)[1]) in HALVES:
            sizes[part] += anatomy.spec.tensors[name].num_parameters
    return {half: size / max(1, sum(sizes.values())) for half, size in sizes.items()}
