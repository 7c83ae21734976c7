"""Where the numbers of stored tensors go in a model of transformers, as its own loader says.

Most parameters are a stored tensor. Others are made of several: the experts of a layer, stacked. Where names do not say
so, the loader is given tensors whose numbers are their own places, and puts them where it would put the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import PlanError
from surgeon.models.skeleton import Skeleton

MOST_PIECES = 4096  # of one parameter; of more, each number is looked up


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter as it is made of stored tensors: one of them, or pieces of several laid end to end.

    A piece is (name, start, stop) of a flattened tensor. `index`, of the shape, looks each number up among all
    `pieces` laid end to end.
    """

    shape: torch.Size
    pieces: tuple[tuple[str, int, int], ...]
    index: Tensor | None = None

    def made_of(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter."""
        (name, start, stop), *others = self.pieces
        if not others and stop - start == stored[name].numel() and self.index is None:
            return stored[name].view(self.shape)
        joined = torch.cat([stored[name].reshape(-1)[start:stop] for name, start, stop in self.pieces])
        return joined.view(self.shape) if self.index is None else joined[self.index.to(joined.device)]


def find_places(
    model: Any, stored: Mapping[str, Tensor], wanted: frozenset[str], build: Callable[[torch.dtype], Skeleton]
) -> dict[str, Place]:
    """Return the place of each parameter that is made of `wanted` tensors among the `stored` ones, by its first name.

    `model` holds the stored numbers. Raises PlanError where the loader computes with them instead of moving them.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    found: dict[str, Place] = {}
    unknown: dict[str, Tensor] = {}
    for names in aliases.values():
        parameter = model.get_parameter(names[0])
        if (same := _same(names, parameter, stored)) is not None:
            if same in wanted:
                found[names[0]] = Place(parameter.shape, ((same, 0, parameter.numel()),))
        else:
            unknown[names[0]] = parameter
    if unknown:
        known = {place.pieces[0][0] for place in found.values()}
        rest = {name: tensor for name, tensor in stored.items() if name not in known}
        found |= _by_loading(unknown, rest, wanted, build)
    return found


def _same(names: list[str], parameter: Tensor, stored: Mapping[str, Tensor]) -> str | None:
    """Return the stored tensor that a parameter is: one of its own names, perhaps without what stands before it."""
    for name in names:
        for other in (name, *(each for each in stored if each.endswith(f".{name}") or name.endswith(f".{each}"))):
            if other in stored and stored[other].shape == parameter.shape and torch.equal(stored[other], parameter):
                return other
    return None


def _by_loading(
    parameters: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    wanted: frozenset[str],
    build: Callable[[torch.dtype], Skeleton],
) -> dict[str, Place]:
    """Return the places of parameters in which the loader puts numbers that say where they come from."""
    ids, starts, end = {}, {}, 0
    for name, tensor in stored.items():
        ids[name] = torch.arange(end, end + tensor.numel(), dtype=torch.float64).view(tensor.shape)
        starts[name], end = end, end + tensor.numel()
    skeleton = build(torch.float64)
    skeleton.fill(ids, torch.device("cpu"))
    loaded = dict(skeleton.module.named_parameters())
    names, begins = list(starts), torch.tensor(list(starts.values()))
    places = {}
    for name, parameter in parameters.items():
        at = loaded[name].detach()
        if at.is_meta or not torch.equal(at, at.round()):
            raise PlanError(
                f"transformers computes {name!r} from several tensors, so what is learned cannot reach it",
                hint="Leave out --learn.",
            )
        place = _place(at.long(), names, begins)
        if not torch.equal(place.made_of(stored), parameter):
            raise AssertionError(f"{name} is not where the loader put it")
        if {piece[0] for piece in place.pieces} & wanted:
            places[name] = place
    return places


def _place(at: Tensor, names: list[str], begins: Tensor) -> Place:
    """Return the place of a parameter whose numbers come from the places `at` of all tensors laid end to end."""
    flat = at.flatten()
    owner = torch.searchsorted(begins, flat, right=True) - 1
    cuts = ((flat.diff() != 1) | (owner.diff() != 0)).nonzero()[:, 0] + 1
    if len(cuts) < MOST_PIECES:
        firsts = torch.cat([torch.zeros(1, dtype=torch.long), cuts])
        lasts = torch.cat([cuts, torch.tensor([len(flat)])]) - 1
        inside = flat - begins[owner]
        pieces = zip(owner[firsts].tolist(), inside[firsts].tolist(), inside[lasts].tolist(), strict=True)
        return Place(at.shape, tuple((names[number], start, stop + 1) for number, start, stop in pieces))
    owners = sorted(set(owner.tolist()))
    sizes = torch.cat([begins.diff(), flat.new_tensor([int(flat.max()) + 1 - int(begins[-1])])])
    shifts = torch.zeros(len(names), dtype=torch.long)
    total, pieces_of = 0, []
    for number in owners:
        size = int(sizes[number])
        shifts[number], total = total, total + size
        pieces_of.append((names[number], 0, size))
    index = (flat - begins[owner] + shifts[owner]).view(at.shape)
    return Place(at.shape, tuple(pieces_of), index)
