"""The verb `prune`: measure, choose, plan. Scores are kept, so that another cut takes the time of a copy."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.halves import Pairing
from surgeon.checkpoint.source import SCORES, Source, spec_of
from surgeon.data.documents import check_there
from surgeon.errors import MeasureError, PlanError
from surgeon.measure.record import Scores, check_ranking, read_scores_of
from surgeon.models.loading import runs
from surgeon.options import OptionError, Verb, reads_of, takes
from surgeon.plan.plan import FLOAT_DTYPES, Plan
from surgeon.plan.solved import RepairsFile, open_repairs
from surgeon.surgery import Surgery, open_model, open_source
from surgeon.transforms.choose import Choice
from surgeon.transforms.merging import check_merges
from surgeon.transforms.prune import (
    Cut,
    halves_without,
    named_layers,
    pruned_sizes,
    removed_count,
    repeating_period,
    resolve_count,
    sizes_like,
    without_halves,
)
from surgeon.transforms.scores import METHODS
from surgeon.transforms.seams import find_sites
from surgeon.verbs.compensating import Compensation, Texts, can_always_be, check_possible, compensated, unfit
from surgeon.verbs.cut_options import PruneOptions
from surgeon.verbs.dense import measured_plan, placeholder, planned_dense, refitted
from surgeon.verbs.merging import Merging, merged, planned_merging
from surgeon.verbs.pruning import Pruning
from surgeon.verbs.search_options import SEARCH

if TYPE_CHECKING:
    from surgeon.measure.calibration import Calibration
    from surgeon.verbs.searching import Found

VERB = Verb(counts_layers=True, plans="prune", begins=True, then="finetune {output} {data} --teacher {source}")
UNSCORED = "No scores yet: counts and sizes are exact, what goes is not decided."
HEAVY = "more than a quarter of the layers goes: expect a broken model until it is healed (finetuned)"


@takes(PruneOptions)
def prune(model: "str | os.PathLike[str] | Surgery", options: PruneOptions) -> Pruning:
    """Return the surgery that removes the layers, neurons, heads, channels and experts that matter least.

    The depth of the result is `layers`, or a budget decides it: `target_parameters`, `target_memory`, `target_latency`.
    A budget without a `score`, or score="search", searches: cuts of layers, of halves of layers and in width are
    measured, and the best is made. Any other `score` ranks layers and, where sizes are given, positions in width: by
    `width_score`, which by default is the score where it ranks positions, else by what they add to the state, and
    experts by REAP.

    Scores are taken in one streamed pass over the first `samples` sequences of `data`. `scores_from` replaces the pass.

    Raises PlanError for a result that is impossible, MeasureError and DataError when scores cannot be taken.

        surgeon.prune("gpt2-large", layers=30, data=["text.txt"], samples=8).save("gpt2-large-pruned")
    """
    return plan_pruning(open_model(model, revision=options.revision), options)


def plan_pruning(begun: Surgery, options: PruneOptions) -> Pruning:
    """Return the surgery that `prune` returns, of a model that is open: measure, choose, plan."""
    if options.score != SEARCH:
        return _planned(begun, options)
    from surgeon.verbs.searching import plan_search

    if options.compensates_by_default:  # a search judges cuts by what they are worth when they are repaired
        options = replace(options, compensate=can_always_be(begun.anatomy))
    return plan_search(begun, options, _planned)


def _planned(begun: Surgery, options: PruneOptions, found: "Found | None" = None) -> Pruning:
    """Return the surgery of a cut by scores, or of one that was `found` by a search."""
    cut, notes = _cut(begun.anatomy, options)
    by_default = options.compensates_by_default and can_always_be(begun.anatomy)
    if by_default:
        options = replace(options, compensate=True)
    elif options.compensates:
        check_possible(begun.anatomy, in_depth=cut.count != 0)
    if options.merge_experts:
        check_merges(begun.anatomy, cut.sizes or {})
    dense = placeholder(begun.anatomy, options.intermediate_size) if options.dense else None
    with runs(begun.source.label, trust_remote_code=options.trust_remote_code):
        if found is None or (found.text is None and options.data):  # a cut of an earlier search, on a text given now
            known = None if found is None else found.scores
            measured = _measure(begun, cut, options, needs_fit=not by_default, known=known)
        else:
            measured = _taken(found)
    if measured.bare_because is not None:
        options, notes = replace(options, compensate=False), (*notes, f"not compensated: {measured.bare_because}")
    scores = measured.scores
    is_scored = scores is not None or not cut.needs_scores
    removable, most_removable = _ranking(cut, options, scores)
    pick = removable if is_scored else cut.placeholder
    count = cut.count
    if count is None:
        choices = [pick(number).dropped for number in range(0, most_removable + 1, cut.period)]
        count = resolve_count(cut.anatomy, choices, parameters=options.parameters, nbytes=options.nbytes)
    choice = pick(count)
    notes += () if measured.text is None else measured.text.notes
    notes += (UNSCORED,) if not is_scored else (HEAVY,) if 4 * count > cut.anatomy.depth else ()
    measures = bool(options.data) and (options.evaluate or options.solves)
    is_measured = is_scored and (options.measure or not measures)
    criterion = cut.criterion if is_scored else "uniform"
    plan = cut.plan(choice, criterion, values=None if scores is None else scores.widths.get(criterion))
    if dense is not None:
        plan, scores = _dense(begun, dense, options, measured)
    step: dict[str, Any] = _step(cut, options, choice, scores) if is_scored else {"score": options.score}
    step |= {} if dense is None else {"score": None, "dense": True}
    if found is not None:
        step |= found.step
    plan = replace(plan, steps=({"prune": step},), notes=(*plan.notes, *notes))
    with runs(begun.source.label, trust_remote_code=options.trust_remote_code):
        merging = None
        try:
            source, whole, compensation = _compensated(begun, plan, cut, options, measured, is_decided=is_scored)
        except (MeasureError, PlanError) as error:
            if not by_default:
                raise
            bare = replace(plan, notes=(*plan.notes, f"not compensated: {error}"))
            source, whole, compensation = begun.source, begun.plan.then(bare), None
        if options.merge_experts:
            source, whole, merging = _merged(begun, plan, cut, measured, is_decided=is_scored)
        elif dense is not None:
            source, whole, merging = _refitted(begun, plan, measured)
    return Pruning(
        source=source,
        plan=whole,
        reads={**begun.reads, **reads_of(options)},
        attachments={**begun.attachments, **({} if scores is None else {SCORES: scores.to_bytes()})},
        score=step["score"],
        scores=scores,
        choice=choice if is_scored or not count or cut.named else None,
        text=measured.text,
        judged=measured.judged,
        compensation=compensation,
        merging=merging,
        removable=removable,
        most_removable=most_removable,
        device=measured.device,
        trust_remote_code=options.trust_remote_code,
        is_named=cut.named is not None,
        also_read=() if is_measured else [n for n, x in begun.source.tensors.items() if x.spec.dtype in FLOAT_DTYPES],
    )


def _ranking(cut: Cut, options: PruneOptions, scores: Scores | None) -> tuple[Callable[[int], Choice], int]:
    """Return the choice of any number of layers by the scores, and the most layers that they can choose.

    Raises PlanError for scores that do not rank layers as they should.
    """
    order: list[int] | None = None
    if scores is not None and cut.ranks_layers:
        protect = cut.protect if options.greedy else None
        check_ranking(scores, options.score, all_tokens=options.measures_all_tokens, greedy_protect=protect)
    if scores is not None and options.greedy and scores.greedy is not None:
        order = scores.greedy["order"]
    values = None if scores is None else scores.layers.get(options.score)
    most = cut.most_removable if order is None else min(cut.most_removable, len(order))
    return partial(cut.choose, values=values, order=order), most


def _step(cut: Cut, options: PruneOptions, choice: Choice, scores: Scores | None) -> dict[str, Any]:
    """Return the entry of the receipt: the cut, and the scores that decided it."""
    is_unasked = cut.named is not None and not cut.ranks_widths and scores is None
    return {
        "score": None if is_unasked else options.score,
        "greedy": options.greedy,
        "dropped": list(choice.dropped),
        **({} if choice.pairing is None else {"pairing": choice.pairing.to_dict()}),
        "value": choice.score,
        "protect": list(cut.protect),
        "sizes": None if cut.sizes is None else dict(cut.sizes),
        "width_criterion": None if cut.sizes is None else cut.criterion,
        "seed": options.seed,
        "data": None if scores is None or scores.data is None else dict(scores.data),
        **({"trust_remote_code": True} if options.trust_remote_code else {}),
    }


def _compensated(
    begun: Surgery, plan: Plan, cut: Cut, options: PruneOptions, measured: "_Measured", *, is_decided: bool
) -> tuple[Source, Plan, Compensation | None]:
    """Return the source and the plan of the cut, compensated where that is asked for, and what was solved."""
    whole = begun.plan.then(plan)
    if not options.compensates or not is_decided:
        return begun.source, whole, None
    if options.repairs_from is not None:
        begun.check_saved()
        texts: Texts | RepairsFile | None = open_repairs(Path(options.repairs_from))
    else:
        texts = measured.texts
    if texts is None:  # nothing is measured yet
        planned = Compensation(find_sites(cut.anatomy, plan))
        return begun.source, replace(whole, notes=(*whole.notes, *planned.notes)), planned
    source, whole, done = compensated(begun.source, begun.plan, plan, cut.anatomy, texts, device=measured.device)
    step = {**plan.steps[-1]["prune"], "compensation": done.record}
    return source, replace(whole, steps=(*begun.plan.steps, {"prune": step}), notes=(*whole.notes, *done.notes)), done


def _merged(
    begun: Surgery, plan: Plan, cut: Cut, measured: "_Measured", *, is_decided: bool
) -> tuple[Source, Plan, Merging]:
    """Return the source and the plan of the cut with its experts merged, and what was solved."""
    assert cut.sizes is not None, "experts go"
    merging = planned_merging(cut.anatomy, cut.sizes["experts"])
    if measured.texts is None or not is_decided:
        return begun.source, begun.plan.then(plan), merging
    source, whole, done = merged(begun.source, begun.plan, plan, merging, measured.texts, device=measured.device)
    step = {**plan.steps[-1]["prune"], "merging": done.record}
    return source, replace(whole, steps=(*begun.plan.steps, {"prune": step}), notes=(*whole.notes, *done.notes)), done


def _dense(begun: Surgery, planned: Plan, options: PruneOptions, measured: "_Measured") -> tuple[Plan, Scores | None]:
    """Return the plan of a dense model, and the record of what was measured for it; without a text its placeholder."""
    if measured.text is None:
        return replace(planned, notes=(*planned.notes, UNSCORED)), measured.scores
    width = planned_dense(begun.anatomy, planned).width
    assert width is not None, "a dense model has one"
    how: dict[str, Any] = {"known": measured.scores, "device": measured.device, "seed": options.seed}
    with runs(begun.source.label, trust_remote_code=options.trust_remote_code):
        return measured_plan(begun.source, begun.anatomy, width, measured.text, **how)


def _refitted(begun: Surgery, plan: Plan, measured: "_Measured") -> tuple[Source, Plan, Merging]:
    """Return the source and the plan of a dense model with its output maps solved, and what was solved."""
    if measured.texts is None:
        return begun.source, begun.plan.then(plan), planned_dense(begun.anatomy, plan)
    source, whole, done = refitted(
        begun.source, begun.plan, plan, begun.anatomy, measured.texts, device=measured.device
    )
    step = {**plan.steps[-1]["prune"], "merging": done.record}
    return source, replace(whole, steps=(*begun.plan.steps, {"prune": step}), notes=(*whole.notes, *done.notes)), done


# --- the cut --------------------------------------------------------------------------------------------------


def _cut(anatomy: Anatomy, options: PruneOptions) -> tuple[Cut, tuple[str, ...]]:
    """Return the cut that the options ask for, and notes. Raises PlanError for an impossible one: nothing is scored."""
    notes: tuple[str, ...] = ()
    layers, given = options.layers, {} if options.dense else options.sizes
    named, pairing = _named(anatomy, options)
    if options.like is not None:
        small = read_anatomy(spec_of(open_source(options.like)))
        layers = small.depth
        given, notes = sizes_like(anatomy, small, os.fspath(options.like))
    sizes = pruned_sizes(anatomy, given)
    has_budget = options.target_parameters is not None or options.target_memory is not None
    count = None if has_budget else 0 if layers is None else removed_count(anatomy, layers)
    if named is not None:
        count = len(named) if pairing is None else anatomy.depth - len(pairing.attention)
    method = METHODS[options.score]
    greedy = method.greedy if options.greedy else None
    default = (0, 0) if named is not None else method.protect if greedy is None else greedy.protect
    cut = Cut(
        anatomy=anatomy,
        score=options.score,
        count=count,
        sizes=sizes,
        contiguous=options.contiguous,
        protect=default if options.protect is None else options.protect,
        seed=options.seed,
        period=repeating_period(anatomy) if options.keep_pattern else 1,
        width_score=options.width_score,
        named=named,
        pairing=pairing,
    )
    cut.check()
    return cut, notes


def _named(anatomy: Anatomy, options: PruneOptions) -> tuple[tuple[int, ...] | None, Pairing | None]:
    """Return the layers that are named to go, None where none are, and the halves that stay where layers lose one."""
    if options.pairing is None and not options.names_halves:
        return named_layers(anatomy, drop=options.drop, keep=options.keep), None
    going = {"drop": options.drop or (), "attention": options.drop_attention or (), "mlp": options.drop_mlp or ()}
    pairing = options.pairing or halves_without(anatomy, **going)
    return without_halves(anatomy, pairing), None if pairing.is_of_layers else pairing


# --- the scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """The scores and the text, None where there are none, the text that judges, and the device that computed."""

    scores: Scores | None
    text: "Calibration | None"
    device: str
    judged: "Calibration | None" = None
    texts: "Texts | None" = None
    bare_because: str | None = None  # why a cut that would be compensated by default is not


def _taken(found: "Found") -> _Measured:
    """Return what a search has measured. Its rows that judge are the text: those that it fitted to judge nothing."""
    return _Measured(found.scores, found.text, found.device, found.text, found.texts)


def _measure(begun: Surgery, cut: Cut, options: PruneOptions, *, needs_fit: bool, known: Scores | None) -> _Measured:
    """Return the scores, read or taken, and the text, as far as the options ask for them.

    Unless the text `needs_fit`, it is not fitted to where it has a single row, which leaves none to judge a fit by, or
    where the fit would take most of the memory. Scores that are `known` are not taken.
    """
    source = begun.source
    scores = known
    if options.scores_from is not None:
        begun.check_saved()
        scores = read_scores_of(options.scores_from, source)
    takes_scores = scores is None and cut.needs_scores
    if not options.measure or not (options.data or options.eval_data or takes_scores or options.solves):
        return _Measured(scores, None, options.device)
    begun.check_saved()
    check_there([*options.data, *options.eval_data])
    from surgeon.models.device import resolve_device

    device = resolve_device(options.device)
    text = _text(source, cut, options, device)
    judged = _calibrated(source, options, options.eval_data, device) if options.eval_data else None
    texts, because = Texts(text, judged) if text is not None and options.solves else None, None
    if texts is not None and not needs_fit:
        because = unfit(texts, cut.anatomy, device)
        texts = texts if because is None else None
    if scores is None:
        scores = _score(source, cut, options, text, device)
    return _Measured(scores, text, device, texts.held if texts is not None else judged or text, texts, because)


def _text(source: Source, cut: Cut, options: PruneOptions, device: str) -> "Calibration | None":
    """Return the text to measure on: the user's, else one that the model writes where a measurement needs it."""
    if not options.data and not cut.reads_text and not options.solves:
        return None
    return _calibrated(source, options, options.data, device)


def _calibrated(source: Source, options: PruneOptions, data: Sequence[str], device: str) -> "Calibration":
    from surgeon.measure.calibration import calibrate

    names = ("samples", "sequence_length", "seed", "columns")
    return calibrate(source, data, device=device, **{name: getattr(options, name) for name in names})


def _score(source: Source, cut: Cut, options: PruneOptions, text: "Calibration | None", device: str) -> Scores:
    """Return the scores of the source."""
    from surgeon.measure.scoring import ScoreRequest, score

    if options.greedy and cut.count is None:
        raise OptionError("greedy", "a greedy removal needs the number of layers that go", hint="Give --layers.")
    request = ScoreRequest(
        layers=[options.score] if cut.ranks_layers else [],
        widths=[cut.criterion] if cut.ranks_widths else [],
        all_tokens=options.measures_all_tokens,
        rounds=cut.count if options.greedy else None,
        protect=cut.protect,
        evaluate=options.evaluate,
        device=device,
        seed=options.seed,
    )
    tokens, origin = (None, None) if text is None else (text.tokens, text.origin)
    return score(source, tokens, request, data=origin)
