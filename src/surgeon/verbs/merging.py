"""Experts that are merged into those that stay: solved on a text, and joined to the plan of the cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.checkpoint.source import Source
from surgeon.plan.plan import Plan
from surgeon.progress import meter
from surgeon.transforms.merging import expert_outputs
from surgeon.verbs.compensating import Texts, with_solved

if TYPE_CHECKING:
    from surgeon.measure.merging import MergedLayer
    from surgeon.transforms.merging import ExpertOutputs

BOUND = (
    "one expert in the place of two has one gate where they had two: what the router chose between them, token by "
    "token, is lost; so judge it by its loss and by texts that it writes, never by multiple choice alone "
    "(arXiv:2510.13999)"
)


@dataclass(frozen=True)
class Merging:
    """The layers of a result whose experts are merged. `record` is what was solved, None where nothing is measured."""

    experts: tuple[int, int]  # of each layer, before and after
    layers: int
    record: Mapping[str, Any] | None = None
    width: int | None = None  # of the one MLP that they become, None where experts are left

    @property
    def notes(self) -> tuple[str, ...]:
        """What was merged and what it changed, in sentences for the card."""
        if self.record is None:
            return ()
        return (self._told, BOUND) if self.width is None else (self._told,)

    @property
    def _told(self) -> str:
        (old, new), (taken, before, after) = self.experts, self._found
        one = "" if self.width is None else f"one MLP of {self.width} neurons"
        return (
            f"merged: {old} experts of each of {self.layers} layers into {one or new}; {taken} output maps are solved; "
            f"the states' relative error on held-out rows is {after:.3f} on average, {before:.3f} without"
        )

    @property
    def _found(self) -> tuple[int, float, float]:
        """How many output maps were solved, and the mean error of the states before and after, on held-out rows."""
        assert self.record is not None, "it was measured"
        maps: Sequence[Mapping[str, Any]] = self.record["maps"]
        before, after = (sum(each["held_out"][i] for each in maps) / len(maps) for i in (0, 1))
        taken = sum(len(each["experts"]) if "experts" in each else each["taken"] for each in maps)
        return taken, before, after

    def rows(self) -> list[tuple[str, str]]:
        """Return what was merged, or would be, as rows for people."""
        many = f"of {self.experts[1]} experts in {self.layers} layers"
        many = many if self.width is None else f"of {self.layers} MLPs of {self.width} neurons"
        if self.record is None:
            return [("merging", f"the output maps {many} would be solved")]
        taken, before, after = self._found
        errors = f"error of the states {before:.3f} → {after:.3f} on held-out rows"
        return [("merging", f"{taken} output maps {many} solved: {errors}")]

    def to_dict(self) -> dict[str, Any]:
        """Return what was solved as `--json` prints it."""
        return {} if self.record is None else dict(self.record)


def planned_merging(anatomy: Anatomy, experts: int) -> Merging:
    """Return what would be merged in a cut to so many experts."""
    return Merging((anatomy.sizes["experts"], experts), len(expert_outputs(anatomy)))


def merged(
    source: Source, begun: Plan, plan: Plan, merging: Merging, texts: Texts, *, device: str
) -> tuple[Source, Plan, Merging]:
    """Return the source and the plan of a cut whose experts are merged, and what was solved.

    `plan` is the cut of the model that `begun` makes of the source.
    """
    from surgeon.measure.merging import merge_experts
    from surgeon.measure.scoring import streamed_model
    from surgeon.plan.planned import PlannedSource

    rows, whole = texts.rows(), begun.then(plan)
    theirs = streamed_model(source, device, resident=False)
    ours = streamed_model(PlannedSource(source, whole), device, resident=False)
    layers = [layer for layer in plan.mlp_layers if layer is not None]
    progress = meter("merging experts", rows.tokens.numel(), len(layers) + max(layers) + 1)
    solved = merge_experts(theirs, ours, rows, layers, progress=progress)
    found = ((_entry(layer, expert_outputs(ours.anatomy)[layer.layer]), layer.tensors) for layer in solved)
    source, whole, record = with_solved(source, whole, texts, ours, found)
    return source, whole, Merging(merging.experts, merging.layers, record)


def _entry(layer: "MergedLayer", outputs: "ExpertOutputs") -> dict[str, Any]:
    """Return the record of a layer's maps."""
    return {
        "tensors": [*outputs.weights, *outputs.biases],
        "reason": f"layer {layer.layer}",
        "experts": list(layer.ridges),
        "ridge": max(layer.ridges.values(), default=0.0),
        "fit": list(layer.fit),
        "held_out": list(layer.held),
        "tokens": list(layer.num_tokens),
        "taken": bool(layer.ridges),
    }
