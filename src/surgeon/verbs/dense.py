"""Experts that become one wide MLP: neurons and gates measured on a text, output maps solved on it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.halves import MLP
from surgeon.anatomy.outputs import output_maps
from surgeon.checkpoint.source import Source
from surgeon.measure.record import Scores
from surgeon.plan.plan import Plan
from surgeon.progress import meter
from surgeon.transforms.dense import Mixture, dense_forms, mixtures_of, neurons_there, to_dense, to_widths
from surgeon.transforms.seams import Site, Sites
from surgeon.verbs.compensating import Texts, entry_of, with_solved
from surgeon.verbs.merging import Merging

if TYPE_CHECKING:
    from surgeon.measure.calibration import Calibration

CRITERION = "dense"  # of Scores.widths


def placeholder(anatomy: Anatomy, width: int | None) -> Plan:
    """Return a plan with the sizes of the dense model, before anything is measured.

    `width` is by default what a token takes: its experts' neurons, and those that every token takes. Raises PlanError
    where this model can have no dense layers in place of experts.
    """
    dense_forms(anatomy)
    kept = neurons_there(anatomy, width)
    gates = (1.0,) * anatomy.sizes["experts"]
    return to_dense(anatomy, dict.fromkeys(sorted(anatomy.layers_by_axis["experts"]), Mixture(kept, gates)))


def measured_plan(
    source: Source, anatomy: Anatomy, width: int, text: "Calibration", *, known: Scores | None, device: str, seed: int
) -> tuple[Plan, Scores]:
    """Return the plan of the dense model by the use of neurons on a text, and the record of that.

    Where `known` scores have such a record, of as many neurons, it is taken.
    """
    if known is not None and len(known.widths.get(CRITERION, {}).get("neurons", [[]])[0]) == width:
        return to_dense(anatomy, mixtures_of(anatomy, known.widths[CRITERION])), known
    from surgeon.measure.mixture import mixtures
    from surgeon.measure.scoring import streamed_model

    model = streamed_model(source, device, resident=False)
    found = mixtures(model, text.tokens, width, progress=meter("scoring", text.tokens.numel(), model.depth))
    widths = {CRITERION: to_widths(anatomy, found)}
    scores = Scores(
        model=source.provenance(),
        depth=anatomy.depth,
        data=text.origin,
        tokens=text.tokens.numel(),
        seed=seed,
        options={"device": device},
        widths=widths,
    )
    return to_dense(anatomy, found), scores


def planned_dense(anatomy: Anatomy, plan: Plan) -> Merging:
    """Return what would be solved in a dense model."""
    width = read_anatomy(plan.result(anatomy.spec)).sizes["ffn"]
    return Merging((anatomy.sizes["experts"], 1), len(anatomy.layers_by_axis["experts"]), width=width)


def refitted(
    source: Source, begun: Plan, plan: Plan, anatomy: Anatomy, texts: Texts, *, device: str
) -> tuple[Source, Plan, Merging]:
    """Return the source and the plan of a dense model whose output maps are solved for what experts put out."""
    from surgeon.measure.compensation import compensate, num_passes
    from surgeon.measure.scoring import streamed_model
    from surgeon.plan.planned import PlannedSource

    whole, rows, merging = begun.then(plan), texts.rows(), planned_dense(anatomy, plan)
    theirs = streamed_model(source, device, resident=False)
    ours = streamed_model(PlannedSource(source, whole), device, resident=False)
    maps = output_maps(ours.anatomy)
    layers = sorted(anatomy.layers_by_axis["experts"])
    outputs = (maps[layer, MLP] for layer in layers)
    sites = tuple(Site(known, 2 * known.layer + 2, (), merging.width or 0, None) for known in outputs)
    every = Sites(tuple(range(2 * anatomy.depth)), sites, None, ())
    progress = meter("solving", rows.tokens.numel(), num_passes(every))
    solved = compensate(theirs, ours, rows, every, progress=progress)
    found = (
        ({**entry_of(site, repair), "reason": f"layer {site.map.layer}"}, repair.tensors) for site, repair in solved
    )
    source, whole, record = with_solved(source, whole, texts, ours, found)
    return source, whole, replace(merging, record=record)
