"""Where a cut can be repaired: the output maps that stand in front of what is missing, or have lost inputs.

A cut model's halves of layers are some of the source's. After each of them its states should be the source's states in
front of the next one that is kept. Where halves are missing in between, or the half has lost neurons or heads, its
output map is solved anew for that (`surgeon.measure.compensation`). What is missing in front of the first half has no
map in front of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon import text
from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.halves import ATTENTION, MLP, Half, place
from surgeon.anatomy.outputs import OutputMap, check_adds, halves_of, output_maps
from surgeon.errors import PlanError
from surgeon.plan.plan import FLOAT_DTYPES, Plan
from surgeon.transforms.kept import gathered

AT_START = "nothing stands in front of what is missing at the start, so that is not compensated"


@dataclass(frozen=True, slots=True)
class Site:
    """An output map of the result, and the halves of the source after which its states should be the source's.

    The source's halves are numbered through: 2 i is the attention of layer i, 2 i + 1 its MLP. `missing` are the
    numbers of those that are left out behind the map. `kept` are the inputs that it has left, of `inputs`; None: all.
    """

    map: OutputMap
    end: int  # the number of the half in front of which the source's states are wanted
    missing: tuple[int, ...]
    inputs: int
    kept: tuple[int, ...] | None
    is_ahead: bool = False  # the attention of the next layer runs between the map and what is missing

    @property
    def lost(self) -> int:
        """How many of its inputs the map has lost."""
        return 0 if self.kept is None else self.inputs - len(self.kept)

    @property
    def reason(self) -> str:
        """What is missing, for people: layers, halves of layers, inputs."""
        where = "two halves in front of" if self.is_ahead else "in front of"
        words = [f"{where} {_halves(self.missing)}"] if self.missing else []
        return ", ".join([*words, *([f"{self.lost} inputs fewer"] if self.lost else [])]) or "fewer channels"


@dataclass(frozen=True)
class Sites:
    """The output maps of a result that are to be solved, in order, and notes on what is not.

    `halves` are the numbers of the source's halves that the result is made of.
    """

    halves: tuple[int, ...]
    sites: tuple[Site, ...]
    hidden: tuple[int, ...] | None  # the positions of the hidden state that stay; None: all
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hash of the cut, as far as it decides what is solved: equal for equal cuts only."""
        maps = [(site.map.weight, site.map.bias, site.end, site.kept, site.is_ahead) for site in self.sites]
        return hashlib.sha256(repr((self.halves, self.hidden, maps)).encode()).hexdigest()


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
    inputs = {key: _inputs(anatomy, plan, known) for key, known in maps.items()}
    order = sorted(halves, key=place)
    ends = [halves[key] for key in order[1:]] + [2 * anatomy.depth]
    hidden = plan.axes.get("hidden")
    is_narrower = hidden is not None and len(hidden) < anatomy.sizes["hidden"]
    sites: list[Site] = []
    for key, end in zip(order, ends, strict=True):
        missing = tuple(range(halves[key] + 1, end))
        has_lost = key in maps and inputs[key][1] is not None
        if not (missing or has_lost or (is_narrower and key in maps)):
            continue
        layer, half = key
        if missing and half == ATTENTION and (known := maps.get((layer - 1, MLP))) is not None:
            # The attention alone has few inputs: the MLP in front of it is solved too, unless it stands at a seam.
            if halves[layer - 1, MLP] == halves[key] - 1:
                sites = [site for site in sites if site.map != known]
                sites.append(Site(known, end, missing, *inputs[layer - 1, MLP], is_ahead=True))
            if key not in maps:
                continue
        if key not in maps:
            raise PlanError(
                f"the {_word(half)} of layer {halves[key] // 2} stands in front of {_halves(missing)}, and has no "
                "one output map",
                hint="Leave out --compensate, or keep a layer with a dense MLP in front of what goes.",
            )
        _check_dtype(result, maps[key])
        sites.append(Site(maps[key], end, missing, *inputs[key]))
    notes = (AT_START,) if order and halves[order[0]] > 0 else ()
    channels = tuple(hidden) if hidden is not None and is_narrower else None
    return Sites(tuple(halves[key] for key in order), tuple(sites), channels, notes)


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


def _inputs(anatomy: Anatomy, plan: Plan, known: OutputMap) -> tuple[int, tuple[int, ...] | None]:
    """Return how many inputs an output map of the result had, and those that it has left; None where it has all."""
    read, positions = gathered(plan.tensors[known.weight])
    assert read is not None, "an output map is made of one tensor"
    before, left = anatomy.spec.tensors[read].shape[known.reads], positions.get(known.reads)
    return before, None if left is None or len(left) == before else left


def _check_dtype(result: Anatomy, known: OutputMap) -> None:
    dtype = result.spec.tensors[known.weight].dtype
    if dtype not in FLOAT_DTYPES:
        raise PlanError(f"{known.weight!r} is stored as {dtype}, and cannot be solved anew", hint="Dequantize first.")


def _halves(numbers: Sequence[int]) -> str:
    """Return the names of adjacent halves of the source for people, in order: whole layers where both are there."""
    inner = list(numbers)
    words, after = [], []
    if inner[0] % 2:
        words.append(f"the MLP of layer {inner.pop(0) // 2}")
    if inner and inner[-1] % 2 == 0:
        after.append(f"the attention of layer {inner.pop() // 2}")
    if whole := [number // 2 for number in inner if number % 2 == 0]:
        words.append(f"layer{'s' if len(whole) > 1 else ''} {text.layers(whole)}")
    return ", ".join([*words, *after])


def _word(half: Half) -> str:
    return "MLP" if half == MLP else half
