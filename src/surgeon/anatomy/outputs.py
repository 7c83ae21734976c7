"""The maps by which a layer's attention and its MLP write to the hidden state: what a closed-form repair solves."""

from collections.abc import Iterator
from dataclasses import dataclass

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.anatomy.axes import Axis, axes_of
from surgeon.anatomy.families import Row, written_and_read
from surgeon.anatomy.halves import HALVES, MLP, Half
from surgeon.errors import PlanError


@dataclass(frozen=True, slots=True)
class OutputMap:
    """A linear map to the hidden state: its tensors in the files, and the name of its module inside the layer.

    `reads` is the dimension of the weight that its inputs have, 0 or 1. `bias` is None where the checkpoint has none.
    """

    layer: int
    half: Half
    module: str
    weight: str
    bias: str | None
    reads: int


def output_maps(anatomy: Anatomy) -> dict[tuple[int, Half], OutputMap]:
    """Return the output map of each half of a layer that has one, by layer and half ("attention" or "mlp").

    Of experts it is that of the expert that every token takes; one that a gate weighs is none.
    """
    found: dict[tuple[int, Half], OutputMap] = {}
    gated = {place[0] for name in anatomy.rows if (place := anatomy.locate(name)) and _is_gate(anatomy, name)}
    for name, (row, part) in anatomy.rows.items():
        place = anatomy.locate(name)
        if place is None or part not in HALVES or not _is_output(row, name):
            continue
        layer, inside = place
        if part == MLP and layer in gated:
            continue
        bias = name.removesuffix("weight") + "bias"
        reads = written_and_read(row)[1]
        assert reads is not None, "a linear map reads"
        has_bias = name.endswith("weight") and bias in anatomy.spec.tensors
        known = OutputMap(layer, part, inside.removesuffix(".weight"), name, bias if has_bias else None, reads)
        found.setdefault((layer, part), known)
    return found


def _is_output(row: Row, name: str) -> bool:
    """Return whether a tensor maps something inside a layer to the hidden state, for every token."""
    if row.kind not in ("linear", "conv1d") or len(row.axes) != 2 or EXPERT_NUMBER.search(name):
        return False
    write, read = written_and_read(row)
    assert write is not None
    assert read is not None
    return axes_of(row.axes[write]) == {"hidden"} and not axes_of(row.axes[read]) & {"hidden", "experts"}


def _is_gate(anatomy: Anatomy, name: str) -> bool:
    """Return whether a tensor makes one number for each token, by which what every token takes is multiplied."""
    row = anatomy.rows[name][0]
    return row.kind == "linear" and len(row.axes) == 2 and row.axes[0] == Axis("1")


def check_adds(anatomy: Anatomy) -> None:
    """Raises PlanError where a layer does not add to the hidden state just what its output maps put out."""
    family = anatomy.require_family(partial=True)
    if family.branch_norms or anatomy.sums_normed:
        where = family.branch_norms[0].removesuffix(".weight") if family.branch_norms else "a norm"
        raise PlanError(
            f"the layers of {anatomy.model_type} do not add what their output maps put out: {where} stands between",
            hint="Leave out --compensate, and heal the result by training: surgeon finetune.",
        )


def halves_of(anatomy: Anatomy) -> Iterator[tuple[str, int, Half]]:
    """Yield the name of each tensor that belongs to a half of a layer, with the layer and the half."""
    for name, (_, part) in anatomy.rows.items():
        if part in HALVES and (place := anatomy.locate(name)):
            yield name, place[0], part
