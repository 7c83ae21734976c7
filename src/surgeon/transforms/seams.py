"""Where a cut can be repaired: the output maps that stand in front of what is missing, or have lost inputs.

A cut model's halves of layers are some of the source's. After each of them its states should be the source's states in
front of the next one that is kept. Where halves are missing in between, or the half has lost neurons or heads, its
output map is solved anew for that (`surgeon.measure.compensation`). What is missing in front of the first half has no
map in front of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgeon import text
from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.halves import HALVES, MLP, Half, place
from surgeon.anatomy.outputs import OutputMap, check_adds, halves_of, output_maps
from surgeon.errors import PlanError
from surgeon.plan.plan import FLOAT_DTYPES, Plan
from surgeon.transforms.kept import gathered

AT_START = "nothing stands in front of what is missing at the start, so that is not compensated"


@dataclass(frozen=True, slots=True)
class Site:
    """An output map of the result, and the halves of the source after which its states should be the source's.

    The source's halves are numbered through: 2 i is the attention of layer i, 2 i + 1 its MLP. `missing` are the
    numbers of those that are left out behind the map. `lost` says how many of its inputs the map has lost.
    """

    map: OutputMap
    end: int  # the number of the half in front of which the source's states are wanted
    missing: tuple[int, ...]
    lost: int

    @property
    def reason(self) -> str:
        """What is missing, for people: layers, halves of layers, inputs."""
        words = [f"in front of {_halves(self.missing)}"] if self.missing else []
        return ", ".join([*words, *([f"{self.lost} inputs fewer"] if self.lost else [])]) or "fewer channels"


@dataclass(frozen=True)
class Sites:
    """The output maps of a result that are to be solved, in order, and notes on what is not."""

    sites: tuple[Site, ...]
    hidden: tuple[int, ...] | None  # the positions of the hidden state that stay; None: all
    notes: tuple[str, ...]


def find_sites(anatomy: Anatomy, plan: Plan) -> Sites:
    """Return where the result of `plan`, a cut of the model of `anatomy`, is to be repaired.

    Raises PlanError where the family's layers have no such map.
    """
    check_adds(anatomy)
    if len(anatomy.stacks) > 1:
        raise PlanError("a model with an encoder and a decoder is not compensated", hint="Leave out --compensate.")
    result = read_anatomy(plan.result(anatomy.spec))
    halves = _sources(anatomy, result, plan)
    maps = output_maps(result)
    lost = {key: _lost(anatomy, plan, known) for key, known in maps.items()}
    order = sorted(halves, key=place)
    ends = [halves[key] for key in order[1:]] + [2 * anatomy.depth]
    hidden = plan.axes.get("hidden")
    is_narrower = hidden is not None and len(hidden) < anatomy.sizes["hidden"]
    sites = []
    for key, end in zip(order, ends, strict=True):
        missing = tuple(range(halves[key] + 1, end))
        if not (missing or lost.get(key) or (is_narrower and key in maps)):
            continue
        if key not in maps:
            raise PlanError(
                f"the {_word(key[1])} of layer {halves[key] // 2} stands in front of {_halves(missing)}, and has no "
                "one output map",
                hint="Leave out --compensate, or keep a layer with a dense MLP in front of what goes.",
            )
        _check_dtype(result, maps[key])
        sites.append(Site(maps[key], end, missing, lost[key]))
    notes = (AT_START,) if order and halves[order[0]] > 0 else ()
    return Sites(tuple(sites), tuple(hidden) if hidden is not None and is_narrower else None, notes)


def _sources(anatomy: Anatomy, result: Anatomy, plan: Plan) -> dict[tuple[int, Half], int]:
    """Return the number of the source's half that each half of the result is, by the result's layer and half."""
    halves: dict[tuple[int, Half], int] = {}
    for name, layer, half in halves_of(result):
        read, _ = gathered(plan.tensors[name])
        located = anatomy.locate(read) if read is not None else None
        if located is None:
            raise PlanError(f"{name!r} is not from one layer of the source", hint="Leave out --compensate.")
        halves[layer, half] = place((located[0], half))
    return halves


def _lost(anatomy: Anatomy, plan: Plan, known: OutputMap) -> int:
    """Return how many inputs an output map of the result has lost."""
    read, positions = gathered(plan.tensors[known.weight])
    assert read is not None, "an output map is made of one tensor"
    left = positions.get(known.reads)
    return 0 if left is None else anatomy.spec.tensors[read].shape[known.reads] - len(left)


def _check_dtype(result: Anatomy, known: OutputMap) -> None:
    dtype = result.spec.tensors[known.weight].dtype
    if dtype not in FLOAT_DTYPES:
        raise PlanError(f"{known.weight!r} is stored as {dtype}, and cannot be solved anew", hint="Dequantize first.")


def _halves(numbers: Sequence[int]) -> str:
    """Return the names of halves of the source for people: whole layers where both are there."""
    there = set(numbers)
    whole = sorted({number // 2 for number in there if {number, number ^ 1} <= there})
    halves: Mapping[int, list[int]] = {
        parity: sorted(number // 2 for number in there if number % 2 == parity and number // 2 not in whole)
        for parity in (0, 1)
    }
    words = [f"layers {text.layers(whole)}"] if whole else []
    words += [
        f"the {_word(HALVES[parity])} of layer {text.layers(layers)}" for parity, layers in halves.items() if layers
    ]
    return " and ".join(words)


def _word(half: Half) -> str:
    return "MLP" if half == MLP else half
