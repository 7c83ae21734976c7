"""Where experts write to the hidden state: the maps that are solved anew when some of them go and the rest stay.

A token whose expert has gone is routed to the kept ones that its router likes next. So the router itself says which
experts stand in for which, token by token, and what they have to put out then is a least squares problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.families import Row, written_and_read
from surgeon.errors import PlanError

DROP_THEM = "Leave out --merge-experts: the rest of the experts stays as it is."


@dataclass(frozen=True, slots=True)
class ExpertOutputs:
    """The output maps of a layer's experts as the files hold them: a tensor for each expert, or one for all of them.

    `biases` are empty where there are none. `is_transposed` says that a map is stored as (neurons, hidden).
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    is_stacked: bool
    is_transposed: bool


def expert_outputs(anatomy: Anatomy) -> dict[int, ExpertOutputs]:
    """Return the output maps of the experts of each layer that has some."""
    weights: dict[int, list[str]] = {}
    biases: dict[int, list[str]] = {}
    rows: dict[int, Row] = {}
    for name, (row, part) in anatomy.rows.items():
        place = anatomy.locate(name)
        if place is None or part != "mlp":
            continue
        if row.kind in ("linear", "conv1d") and _is_output(name, row):
            weights.setdefault(place[0], []).append(name)
            rows[place[0]] = row
        elif row.kind == "bias" and len(row.axes) > 1 and axes_of(row.axes[-1]) == {"hidden"}:
            biases.setdefault(place[0], []).append(name)
    return {
        layer: ExpertOutputs(
            weights=tuple(sorted(names, key=_number)),
            biases=tuple(biases.get(layer, ())),
            is_stacked=len(rows[layer].axes) > 2,
            is_transposed=rows[layer].kind == "conv1d",
        )
        for layer, names in weights.items()
    }


def _is_output(name: str, row: Row) -> bool:
    """Return whether a tensor maps the neurons of an expert, or of all of them, to the hidden state."""
    if not EXPERT_NUMBER.search(name) and axes_of(row.axes[0]) != {"experts"}:
        return False
    write, read = written_and_read(row)
    assert write is not None
    assert read is not None
    return axes_of(row.axes[write]) == {"hidden"} and axes_of(row.axes[read]) <= {"ffn", "expert_ffn"}


def _number(name: str) -> int:
    match = EXPERT_NUMBER.search(name)
    return int(match[0]) if match else 0


def check_merges(anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Raises PlanError where experts of this model cannot be merged into those that stay."""
    family = anatomy.require_family(partial=True)
    if sizes.get("experts", 0) >= anatomy.sizes.get("experts", 0):
        raise PlanError("no expert goes, so there is nothing to merge", hint="Ask for fewer: --experts N.")
    if not expert_outputs(anatomy):
        raise PlanError(
            f"the table of {anatomy.model_type} does not name the output maps of its experts", hint=DROP_THEM
        )
    if family.branch_norms or anatomy.sums_normed:
        raise PlanError(
            f"a norm stands between the experts of {anatomy.model_type} and the state that they add to, so what they "
            "should put out is no least squares problem",
            hint=DROP_THEM,
        )
    if sizes["hidden"] != anatomy.sizes["hidden"]:
        raise PlanError(
            "experts are merged for the states of the source, and those of the result are narrower",
            hint="Leave out --hidden-size, or --merge-experts.",
        )
