"""The operator of a learned growth as a module of torch: the larger model, its weights computed in each forward pass.

What is computed is the plan's own expressions, the very ones from which the result is written. So the file holds the
function that was trained. What no learned tensor enters is computed once, by the plan's arithmetic.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from surgeon.checkpoint.header import TensorSpec
from surgeon.checkpoint.source import Source, ranges_by_file
from surgeon.growth.places import Place, find_places
from surgeon.models.skeleton import Skeleton
from surgeon.plan.arithmetic import Arithmetic
from surgeon.plan.expressions import Add, Affine, Cast, Expr, Gather, Mapped, Normal, Read, Rounded, Weighted
from surgeon.plan.plan import Plan, children, reads
from surgeon.transforms.learned import Learned

FIXED = "model."  # what the names of the larger model's own parameters begin with, which are not trained


class Operator(nn.Module):
    """A larger model of transformers whose weights are a function of the learned tensors, its only parameters.

    `prefix` is what the plan puts before their names, `exact` the plan of the exact growth of `source`. The state of
    this module are the learned tensors alone, so a checkpoint of a run is as small as they are.
    """

    def __init__(
        self,
        source: Source,
        exact: Plan,
        learned: Learned,
        prefix: str,
        build: Callable[[torch.dtype], Skeleton],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._prefix, self._dtype = prefix, dtype
        names = {name for expr in exact.tensors.values() for name in reads(expr)}
        names |= {name for expr in learned.plan.tensors.values() for name in reads(expr) if not name.startswith(prefix)}
        self._arithmetic: Arithmetic | None = Arithmetic(
            source.tensors, source.parts(ranges_by_file(source.tensors, names))
        )
        whole = {name: self._constant(expr) for name, expr in exact.tensors.items()}
        skeleton = build(dtype)
        skeleton.fill({name: tensor.clone() for name, tensor in whole.items()}, torch.device("cpu"))
        self.model = skeleton.module
        self.model.tie_weights()
        skeleton.check_present(self.model, ())
        self.model.requires_grad_(False)
        self.learned = nn.ParameterDict()
        for name, start in learned.starts.items():
            begin = whole[start.like].clone() if start.like else self._random(name, start.shape, start.std, seed)
            self.learned[_key(name)] = nn.Parameter(begin.to(dtype).view(start.shape))
        self._tensors = {
            name: expr for name, expr in learned.plan.tensors.items() if any(r.startswith(prefix) for r in reads(expr))
        }
        self._places: Mapping[str, Place] = find_places(self.model, whole, frozenset(self._tensors), build)
        self.constants = nn.Module()
        self._numbers: dict[Expr | tuple[Expr, ...], str] = {}  # of the constants: the names of their buffers
        self._at: dict[int, str] = {}  # the same by the identity of an expression, or of what is mixed
        self._seen: dict[int, bool] = {}  # by identity: whether a learned tensor enters
        self._moves: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        for expr in self._tensors.values():
            self._prepare(expr)
        self._arithmetic, self._numbers = None, {}  # with the former the source's files are let go

    def tensors(self) -> dict[str, Tensor]:
        """Return the learned tensors by their names in the plan, in float32 on the CPU."""
        return {_name(key): value.detach().float().cpu() for key, value in self.learned.items()}

    def forward(self, **batch: Any) -> Any:
        """Return what the larger model returns with the weights that the learned tensors make."""
        return functional_call(self.model, self.weights(), (), batch)

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters of the larger model that depend on learned tensors; of tied ones the first name."""
        known: dict[int, Tensor] = {}
        stored = {name: self._value(expr, known) for name, expr in self._tensors.items()}
        return {name: place.made_of(stored) for name, place in self._places.items()}

    # --- the state of the module: the learned tensors alone ------------------------------------------------------

    def state_dict(self, *args: Any, **options: Any) -> Any:
        whole = super().state_dict(*args, **options)
        return {name: value for name, value in whole.items() if not name.startswith(FIXED)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        fixed = {name: value for name, value in super().state_dict().items() if name.startswith(FIXED)}
        return super().load_state_dict({**fixed, **state_dict}, strict, assign)

    # --- expressions ----------------------------------------------------------------------------------------------

    def _is_learned(self, expr: Expr) -> bool:
        if id(expr) not in self._seen:
            is_own = isinstance(expr, Read) and expr.name.startswith(self._prefix)
            self._seen[id(expr)] = is_own or any(self._is_learned(child) for child in children(expr))
        return self._seen[id(expr)]

    def _constant(self, expr: Expr) -> Tensor:
        assert self._arithmetic is not None, "the module is being made"
        return self._arithmetic.tensor(expr).to(self._dtype)

    def _random(self, name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
        if not std:
            return torch.zeros(shape)
        return self._constant(Normal(TensorSpec("F32", shape), std, seed, f"{self._prefix}{name}"))

    def _prepare(self, expr: Expr) -> None:
        """Compute once what an expression needs and no learned tensor enters."""
        if id(expr) in self._at or id(expr) in self._moves:
            return
        if not self._is_learned(expr):
            self._keep(expr, expr, lambda: self._constant(expr))
            return
        if isinstance(expr, Weighted):
            parts = expr.parts
            self._keep(parts, expr, lambda: torch.stack([self._constant(part) for part in parts]))
            return
        if isinstance(expr, Gather):
            is_new = torch.tensor([i < 0 for i in expr.index]) if expr.index.has_new else None
            scale = None if expr.scale.factors <= {1.0} else torch.tensor(tuple(expr.scale), dtype=self._dtype)
            index = torch.tensor(tuple(expr.index)).clamp(min=0)
            self._moves[id(expr)] = index, scale, is_new
        for child in children(expr):
            self._prepare(child)

    def _keep(self, key: Expr | tuple[Expr, ...], expr: Expr, make: Callable[[], Tensor]) -> None:
        """Keep what `key` makes, once for all equal ones, for the expression that needs it."""
        if key not in self._numbers:
            name = self._numbers[key] = f"c{len(self._numbers)}"
            self.constants.register_buffer(name, make(), persistent=False)
        self._at[id(expr)] = self._numbers[key]

    def _kept(self, expr: Expr) -> Tensor:
        return self.constants.get_buffer(self._at[id(expr)])

    def _value(self, expr: Expr, known: dict[int, Tensor]) -> Tensor:
        """Return the tensor that an expression makes, differentiable. `known` are those of this forward pass."""
        if id(expr) not in known:
            known[id(expr)] = self._made(expr, known)
        return known[id(expr)]

    def _made(self, expr: Expr, known: dict[int, Tensor]) -> Tensor:
        if not self._is_learned(expr):
            return self._kept(expr)
        match expr:
            case Read(name):
                learned: Tensor = self.learned[_key(name.removeprefix(self._prefix))]
                return learned
            case Cast(source) | Rounded(source):  # the file rounds where it must; what is trained does not
                return self._value(source, known)
            case Affine(source, factor, offset):
                return self._value(source, known) * factor + offset
            case Add((first, *others)):
                total = self._value(first, known)
                for other in others:
                    total = total + self._value(other, known)
                return total
            case Weighted(_, weights, row):
                mixed: Tensor = torch.tensordot(self._value(weights, known)[row], self._kept(expr), 1)
                return mixed
            case Mapped(source, matrix, dim, inner):
                return mapped(self._value(source, known), self._value(matrix, known), dim, inner)
            case Gather():
                return self._moved(expr, self._value(expr.source, known))
        raise AssertionError(f"no learned tensor enters {type(expr).__name__}")

    def _moved(self, expr: Gather, value: Tensor) -> Tensor:
        index, scale, is_new = self._moves[id(expr)]
        if index.device != value.device:
            index, scale, is_new = self._moves[id(expr)] = (
                index.to(value.device),
                None if scale is None else scale.to(value.device),
                None if is_new is None else is_new.to(value.device),
            )
        moved = value.index_select(expr.dim, index)
        along = [-1 if dim == expr.dim else 1 for dim in range(value.dim())]
        if scale is not None:
            moved = moved * scale.view(along)
        if is_new is None:
            return moved
        new = value.mean(expr.dim, keepdim=True) * expr.mean + expr.fill if expr.mean else moved.new_tensor(expr.fill)
        return torch.where(is_new.view(along), new, moved)


def mapped(value: Tensor, matrix: Tensor, dim: int, inner: int) -> Tensor:
    """Return `value` mapped along `dim`, as `surgeon.plan.products.mapped` does, differentiable."""
    old = matrix.shape[1]
    before, after = value.shape[:dim], value.shape[dim + 1 :]
    size = inner * after.numel()
    if size == 1:
        return (value.reshape(-1, old) @ matrix.t()).view(*before, -1)
    return (matrix @ value.reshape(-1, old, size)).view(*before, -1, *after)


def _key(name: str) -> str:
    """Return a name as that of a parameter, in which torch wants no dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
