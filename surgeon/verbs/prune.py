"""The verb `prune`: measure, choose, plan. Scores are kept, so that another cut takes the time of a copy."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import SCORES, Source, spec_of
from surgeon.errors import PlanError
from surgeon.measure.record import Scores, check_model, read_scores
from surgeon.options import Verb
from surgeon.surgery import Surgery, open_model, open_source
from surgeon.transforms.choose import Choice, check_criterion, choose_layers
from surgeon.transforms.prune import prune as plan_prune
from surgeon.transforms.prune import pruned_sizes, resolve_count
from surgeon.verbs.prune_options import Budget, Request, count_removed, sizes_like

if TYPE_CHECKING:
    from surgeon.measure.calibration import Calibration
    from surgeon.measure.scoring import Meter

VERB = Verb(counts_layers=True)
SAMPLES, SEQUENCE_LENGTH = 32, 256
UNSCORED = "scores decide which parts go, and none were taken; layers, parameters and bytes are those of any choice"
SELF_SAMPLED = "the calibration text was written by the model itself; give --data for a text of your own"
HEAVY = "more than a quarter of the layers goes: expect a broken model until it is healed (finetuned)"


@dataclass(frozen=True, kw_only=True)
class Pruning(Surgery):
    """A surgery that scores decided.

    `choice` is None where none was chosen yet, `text` where none was read. removable(n) says which
    layers go when n do, of which `most_removable` is the most.
    """

    score: str
    scores: Scores | None
    choice: Choice | None
    text: "Calibration | None"
    removable: Callable[[int], Choice]
    most_removable: int
    device: str

    def evaluate(self, result: str | os.PathLike[str], *, meter: "Meter | None" = None) -> tuple[float, float] | None:
        """Return the perplexity of the source and of the written result on the text, None where none was read."""
        if self.text is None:
            return None
        from surgeon.measure.removal import perplexities
        from surgeon.measure.scoring import perplexity

        scored_on = None if self.scores is None or self.scores.data is None else self.scores.data.get("sha256")
        if self.scores is not None and self.scores.loss is not None and scored_on == self.text.origin["sha256"]:
            before = perplexities([self.scores.loss])[0]
        else:
            before = perplexity(self.source, self.text.tokens, device=self.device, meter=meter)
        return before, perplexity(open_source(result), self.text.tokens, device=self.device, meter=meter)

    def curve(self, most: int | None = None, *, meter: "Meter | None" = None) -> list[float] | None:
        """Return the perplexity with 0, 1, 2 ... `most` layers removed as the scores say, None without a text.

        All in one streamed pass over the source; `most` is half its depth by default, or what the scores say of. Widths
        are those of the source.
        """
        if self.text is None:
            return None
        from surgeon.measure.scoring import removal_curve

        half = read_anatomy(spec_of(self.source)).depth // 2
        last = min(half if most is None else most, self.most_removable)
        choices = [self.removable(count).dropped for count in range(last + 1)]
        return removal_curve(self.source, self.text.tokens, choices, device=self.device, meter=meter)


def prune(
    model: "str | os.PathLike[str] | Surgery",
    *,
    score: str = "angular",
    layers: int | str | None = None,
    target_parameters: float | None = None,
    target_memory: int | str | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    attention_heads: int | None = None,
    key_value_heads: int | None = None,
    experts: int | None = None,
    like: str | os.PathLike[str] | None = None,
    contiguous: bool | None = None,
    protect: tuple[int, int] | None = None,
    greedy: bool = False,
    all_tokens: bool = False,
    data: Sequence[str] = (),
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    scores_from: str | os.PathLike[str] | None = None,
    measure: bool = True,
    evaluate: bool = True,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    meter: "Meter | None" = None,
) -> Pruning:
    """Return the surgery that removes the layers, neurons, heads, channels and experts that matter least.

    `layers` is the depth of the result; or it follows from a budget, `target_parameters` or `target_memory` (bytes of
    weights, "12GB"). `score` ranks layers and, where sizes are given, what is cut in width: by magnitude, uniformly or
    at random as it says, else by activation (Minitron) and, for experts, by REAP. `like` takes all sizes from another
    model. `protect` is how many first and last layers stay, `contiguous` whether one block goes: by default what the
    method's authors do.

    Scores are taken in one streamed pass over the first `samples` rows of `sequence_length` tokens of `data`; without
    it over a text that the model writes. With `scores_from`, a scores.json, nothing is run. With `measure` false
    nothing but headers is read: the plan then shows sizes, and `choice` is None. With `evaluate`, the perplexity of
    the source is taken with the scores.

    Raises PlanError when the result cannot be, MeasureError and DataError when scores cannot be taken.

        surgeon.prune("meta-llama/Llama-3.1-8B", layers=26, data=["c4.jsonl"]).save("llama-26")
    """
    begun = open_model(model, revision=revision)
    anatomy = begun.anatomy
    request = Request(anatomy, score, contiguous, protect, greedy, all_tokens, seed)
    asked = {
        "hidden": hidden_size,
        "ffn": intermediate_size,
        "heads": attention_heads,
        "kv_heads": key_value_heads,
        "experts": experts,
    }
    notes: tuple[str, ...] = ()
    if like is not None:
        if layers is not None or any(size is not None for size in asked.values()):
            raise PlanError("sizes are given beside a model to take them from", hint="Give --like, or sizes.")
        layers, asked, notes = sizes_like(anatomy, like)
    sizes = pruned_sizes(anatomy, asked)
    budget = Budget.of(target_parameters, target_memory)
    count = count_removed(anatomy, layers, budget, sizes)
    if count:
        choose_layers("last", count, anatomy.depth, protect=request.guard)  # refuses what no score could choose
    if sizes is not None:  # whatever is chosen, the result has these sizes: refuse them before an hour of scoring
        check_criterion(anatomy, sizes, request.criterion)
        plan_prune(anatomy, sizes=sizes, criterion="uniform")
    narrows = sizes is not None and any(size != anatomy.sizes[axis] for axis, size in sizes.items())
    wanted, widths = request.needs(removes=count != 0, narrows=narrows)

    measured = _Measured(None, None, device)
    if scores_from is not None:
        _check_unbegun(begun)
        measured = replace(measured, scores=_read(scores_from, begun.source))
    if measure and (data or (measured.scores is None and (wanted or widths))):
        _check_unbegun(begun)
        text_asked = _TextAsked(tuple(data), samples, sequence_length)
        measured = _measure(begun.source, request, wanted, widths, measured, text_asked, count, evaluate, meter)
        notes += () if data or measured.text is None else (SELF_SAMPLED,)
    scores = measured.scores

    known = scores is not None or not (wanted or widths)
    if wanted and known:
        request.check_scored(scores)

    def removable(number: int) -> Choice:
        return request.choose(number, scores)

    pick = removable if known else request.any_choice
    if count is None:
        choices = [pick(number).dropped for number in range(request.most_chosen(scores) + 1)]
        count = resolve_count(anatomy, choices, parameters=budget.parameters, nbytes=budget.nbytes)
    choice = pick(count)
    plan = plan_prune(
        anatomy,
        dropped=choice.dropped,
        sizes=sizes,
        criterion=request.criterion if known else "uniform",
        values=None if scores is None else scores.widths.get(request.criterion),
        seed=seed,
    )
    notes += (UNSCORED,) if not known else (HEAVY,) if 4 * count > anatomy.depth else ()
    step = request.step(choice, sizes, scores) if known else {"score": score}
    plan = replace(plan, steps=({"prune": step},), notes=(*plan.notes, *notes))
    return Pruning(
        source=begun.source,
        plan=begun.plan.then(plan),
        attachments={**begun.attachments, **({} if scores is None else {SCORES: scores.to_bytes()})},
        score=score,
        scores=scores,
        choice=choice if known or not count else None,
        text=measured.text,
        removable=removable,
        most_removable=request.most_chosen(scores),
        device=measured.device,
    )


@dataclass(frozen=True)
class _Measured:
    """The scores and the text, as far as they are there, and where it was computed."""

    scores: Scores | None
    text: "Calibration | None"
    device: str


@dataclass(frozen=True)
class _TextAsked:
    """The text that scores are to be taken on; without `data` the model's own."""

    data: tuple[str, ...]
    samples: int
    sequence_length: int


def _measure(
    source: Source,
    request: Request,
    wanted: set[str],
    widths: set[str],
    before: _Measured,
    asked: _TextAsked,
    count: int | None,
    evaluate: bool,
    meter: "Meter | None",
) -> _Measured:
    """Return the text, and the scores unless they are there already."""
    from surgeon.measure.calibration import read_calibration, sample_calibration
    from surgeon.models.device import resolve_device
    from surgeon.models.streaming import check_runs

    device = resolve_device(before.device)
    if asked.data or request.reads_text(wanted, widths):
        check_runs(source)
    shape = {"samples": asked.samples, "sequence_length": asked.sequence_length}
    text: Calibration | None = None
    if asked.data:
        text = read_calibration(source, asked.data, **shape)
    elif request.reads_text(wanted, widths):
        text = sample_calibration(source, **shape, device=device, seed=request.seed)
    scores = before.scores
    if scores is None:
        scores = request.score(source, wanted, widths, text, count, evaluate, device, meter)
    return _Measured(scores, text, device)


def _read(path: str | os.PathLike[str], source: Source) -> Scores:
    """Return the scores in a file, or in the scores.json of a directory, after checking that they are of `source`."""
    found = Path(path)
    scores = read_scores(found / SCORES if found.is_dir() else found)
    check_model(scores, source.provenance(), source.label)
    return scores


def _check_unbegun(surgery: Surgery) -> None:
    """Refuse to score what is not on the disk yet."""
    if surgery.plan.steps:
        done = ", then ".join(next(iter(step)) for step in surgery.plan.steps)
        raise PlanError(
            f"scores are taken from a checkpoint, and this one is still to be made ({done})",
            hint="Save it, and prune what was saved.",
        )
