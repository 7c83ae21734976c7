"""The verb `prune`: measure, choose, plan. Scores are kept, so that another cut takes the time of a copy."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.source import SCORES, Source, spec_of
from surgeon.errors import PlanError
from surgeon.measure.record import Scores, check_ranking, read_scores_of
from surgeon.models.loading import runs
from surgeon.options import (
    OptionError,
    Verb,
    check_seed,
    device_option,
    flag_of,
    in_python,
    layer_numbers,
    numbers,
    option,
    progress_option,
    reads_of,
    revision_option,
    seed_option,
    takes,
    trust_option,
)
from surgeon.plan.plan import FLOAT_DTYPES
from surgeon.progress import Progress
from surgeon.surgery import Surgery, open_model, open_source, parse_size
from surgeon.transforms.choose import Choice
from surgeon.transforms.prune import (
    Cut,
    named_layers,
    pruned_sizes,
    removed_count,
    repeating_period,
    resolve_count,
    sizes_like,
)
from surgeon.transforms.scores import METHODS
from surgeon.verbs.pruning import Pruning

if TYPE_CHECKING:
    from surgeon.measure.calibration import Calibration

VERB = Verb(counts_layers=True, plans="prune", begins=True, then="finetune {output} --data {data} --teacher {source}")
UNSCORED = "No scores yet: counts and sizes are exact, what goes is not decided."
SELF_SAMPLED = "the calibration text was written by the model itself; give --data for a text of your own"
HEAVY = "more than a quarter of the layers goes: expect a broken model until it is healed (finetuned)"
_UNCHANGED = "Default: unchanged."
_SCORES = ", ".join(f"{name} ({method.help})" for name, method in METHODS.items())
_BLOCK = ", ".join(name for name, method in METHODS.items() if method.block)
_GREEDY = " or ".join(name for name, method in METHODS.items() if method.greedy)
_TOKENS = " or ".join(name for name, method in METHODS.items() if method.token_choice)
_PROTECT = ", ".join(
    f"{first},{last} for {name}" for name, method in METHODS.items() for first, last in [method.protect] if first + last
)


def _first_and_last(text: str) -> tuple[int, int]:
    """Return the two numbers in "1,1". Raises ValueError for anything else."""
    counts = numbers(text)
    if len(counts) != 2:
        raise ValueError(f"{text!r} is not two numbers such as 1,1")
    return counts[0], counts[1]


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """The options that say how much goes, and by which scores."""

    score: str = option(f"The score that decides what goes: {_SCORES}.", "angular", metavar="SCORE")
    layers: int | str | None = option("Layers of the result: 24, or 75% of the source's.", None, metavar="N")
    target_parameters: float | None = option(
        "Remove the fewest layers that leave at most so many parameters: 6.7e9.", None, metavar="N"
    )
    target_memory: int | str | None = option(
        "Remove the fewest layers that leave at most so many bytes of weights: 12GB.", None, metavar="SIZE"
    )
    drop: Sequence[int] | None = option(
        "Remove these layers, in place of a choice by scores: 3,7,11-13.", None, metavar="LAYERS", parse=layer_numbers
    )
    keep: Sequence[int] | None = option(
        "Keep these layers and remove all others: 0-20,25-29.", None, metavar="LAYERS", parse=layer_numbers
    )
    hidden_size: int | None = option(f"Hidden size of the result. {_UNCHANGED}", None, metavar="N")
    intermediate_size: int | None = option(f"Neurons of each MLP of the result. {_UNCHANGED}", None, metavar="N")
    expert_intermediate_size: int | None = option(f"Neurons of each expert. {_UNCHANGED}", None, metavar="N")
    attention_heads: int | None = option(f"Attention heads of the result. {_UNCHANGED}", None, metavar="N")
    key_value_heads: int | None = option(
        f"Key-value heads of the result; each is removed with its group of heads. {_UNCHANGED}", None, metavar="N"
    )
    experts: int | None = option(f"Experts per layer of the result. {_UNCHANGED}", None, metavar="N")
    like: str | os.PathLike[str] | None = option(
        "Take the depth and all sizes from this smaller model; goes with --score uniform.",
        None,
        metavar="SMALL",
        reads=True,
    )
    contiguous: bool | None = option(
        f"Remove one block of adjacent layers, or any layers. Default: one block for {_BLOCK}; else any.",
        None,
        names=("--contiguous/--free",),
    )
    protect: tuple[int, int] | None = option(
        f"How many first and last layers to keep. Default: {_PROTECT}, 1,1 with --greedy; else 0,0.",
        None,
        metavar="FIRST,LAST",
        parse=_first_and_last,
    )
    keep_pattern: bool = option(
        "Remove whole periods of a pattern such as 5 sliding layers, 1 full: llama.cpp counts on it.",
        False,
    )
    greedy: bool = option(f"With --score {_GREEDY}: score the model again after each removed layer (SLEB).", False)
    tokens: str = option(
        f"With --score {_TOKENS}: measure at the last token of each sequence, or at all tokens.",
        "last",
        metavar="last|all",
    )
    data: Sequence[str] = option(
        "Text to measure on: .txt, .json, .jsonl, .parquet, Hub dataset. Repeatable. Default: the model writes one.",
        (),
        metavar="DATA",
        reads=True,
    )
    samples: int = option("Number of sequences taken from the text.", 32, metavar="N")
    sequence_length: int = option("Tokens per sequence.", 256, metavar="T")
    scores_from: str | os.PathLike[str] | None = option(
        "Choose by the scores in this scores.json instead of running the model.", None, metavar="FILE", reads=True
    )
    evaluate: bool = option(
        "Measure the perplexity on the text before and after.", True, names=("--evaluate/--no-evaluate",)
    )

    def __post_init__(self) -> None:
        if self.tokens not in ("last", "all"):
            raise OptionError("tokens", f"{self.tokens!r} is neither last nor all")
        if self.score not in METHODS:
            raise PlanError(f"unknown score {self.score!r}", hint=f"One of: {', '.join(METHODS)}.")
        if self.greedy and METHODS[self.score].greedy is None:
            raise PlanError(f"{self.score} has no greedy form", hint=f"--greedy goes with --score {_GREEDY}.")
        if self.greedy and self.contiguous:
            hint = "Leave out --contiguous."
            raise PlanError("a greedy removal chooses layers one by one, not as a block", hint=hint)
        if self.greedy and self.keep_pattern:
            hint = "Leave out --greedy."
            raise PlanError("a greedy removal chooses layers one by one, not in whole periods", hint=hint)
        if self.protect is not None and min(self.protect) < 0:
            raise PlanError(f"cannot protect {min(self.protect)} layers", hint="Write --protect 1,1.")
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raises PlanError where the size of the result is missing, unreadable, or given more than once."""
        narrows = any(size is not None for size in self.sizes.values())
        if self.like is not None and (self.layers is not None or narrows):
            raise PlanError("sizes are given beside a model to take them from", hint="Give --like, or sizes.")
        budgets = [target for target in (self.parameters, self.nbytes) if target is not None]
        depths = [depth for depth in (self.layers, self.like, self.drop, self.keep) if depth is not None]
        if len(budgets) + len(depths) > 1:
            hint = "Give one of --layers, --drop, --keep and the targets."
            raise PlanError("the depth is asked for more than once", hint=hint)
        self._check_named()
        if budgets and narrows:
            raise PlanError("a budget decides the depth, not the width", hint="Give --layers beside sizes.")
        if not (budgets or depths or narrows):
            raise PlanError("nothing to prune", hint="Give --layers, a size such as --intermediate-size, or a target.")

    def _check_named(self) -> None:
        """Raises OptionError where layers are named, and something else would choose them too."""
        if not self.names_layers:
            return
        choosing = {"greedy": self.greedy, "contiguous": self.contiguous is not None}
        choosing |= {"protect": self.protect is not None, "keep_pattern": self.keep_pattern}
        if also := next((name for name, is_given in choosing.items() if is_given), None):
            named = "--drop" if self.keep is None else "--keep"
            raise OptionError(also, f"{flag_of(also)} chooses layers, and {named} names them", hint="Give one of them.")
        if self.keep is not None and list(self.keep) != sorted(set(self.keep)):
            raise OptionError(
                "keep", "--keep must be in order: no layer moves, and none is repeated", hint="Such as --keep 0-5,8."
            )

    @property
    def names_layers(self) -> bool:
        """Whether the layers that go are named, and not chosen by scores."""
        return self.drop is not None or self.keep is not None

    @property
    def parameters(self) -> int | None:
        """The most parameters that the result may have. Raises PlanError for infinity and NaN."""
        if self.target_parameters is None:
            return None
        if not 0 <= self.target_parameters < 1e18:
            raise PlanError(f"cannot read {self.target_parameters!r} as a number of parameters", hint="Write 6.7e9.")
        return int(self.target_parameters)

    @property
    def nbytes(self) -> int | None:
        """The most bytes of weights that the result may have. Raises PlanError for text that is no size."""
        return None if self.target_memory is None else parse_size(self.target_memory)

    @property
    def sizes(self) -> dict[str, int | None]:
        """The sizes that were given, by axis."""
        return {
            "hidden": self.hidden_size,
            "ffn": self.intermediate_size,
            "expert_ffn": self.expert_intermediate_size,
            "heads": self.attention_heads,
            "kv_heads": self.key_value_heads,
            "experts": self.experts,
        }


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that say where the model is run, from which seed, and which of its revisions."""

    device: str = device_option()
    seed: int = seed_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()


@dataclass(frozen=True, kw_only=True)
class PruneOptions(RunOptions, CutOptions):
    """The options of `prune`."""

    all_tokens: bool = in_python('The same as tokens="all".', False)
    measure: bool = in_python("False: read headers only; the plan then has exact sizes, and `choice` is None.", True)
    progress: Progress | bool | None = progress_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    @property
    def measures_all_tokens(self) -> bool:
        """Whether the score is taken at all tokens of a sequence."""
        return self.all_tokens or self.tokens == "all"


@takes(PruneOptions)
def prune(model: "str | os.PathLike[str] | Surgery", options: PruneOptions) -> Pruning:
    """Return the surgery that removes the layers, neurons, heads, channels and experts that matter least.

    The depth of the result is `layers`, or follows from a budget: `target_parameters` or `target_memory`. `score` ranks
    layers and, where sizes are given, positions in width: by magnitude, evenly or at random with the scores of that
    name, else by activation (Minitron) and, for experts, by REAP.

    Scores are taken in one streamed pass over the first `samples` sequences of `data`. `scores_from` replaces the pass.

    Raises PlanError for a result that is impossible, MeasureError and DataError when scores cannot be taken.

        surgeon.prune("gpt2-large", layers=30, data=["text.txt"], samples=8).save("gpt2-large-pruned")
    """
    return plan_pruning(open_model(model, revision=options.revision), options)


def plan_pruning(begun: Surgery, options: PruneOptions) -> Pruning:
    """Return the surgery that `prune` returns, of a model that is open: measure, choose, plan."""
    cut, notes = _cut(begun.anatomy, options)
    with runs(begun.source.label, trust_remote_code=options.trust_remote_code):
        measured = _measure(begun, cut, options)
    scores = measured.scores
    is_scored = scores is not None or not cut.needs_scores
    removable, most_removable = _ranking(cut, options, scores)
    pick = removable if is_scored else cut.placeholder
    count = cut.count
    if count is None:
        choices = [pick(number).dropped for number in range(0, most_removable + 1, cut.period)]
        count = resolve_count(cut.anatomy, choices, parameters=options.parameters, nbytes=options.nbytes)
    choice = pick(count)
    notes += (SELF_SAMPLED,) if measured.text is not None and not options.data else ()
    notes += (UNSCORED,) if not is_scored else (HEAVY,) if 4 * count > cut.anatomy.depth else ()
    is_measured = is_scored and (options.measure or not (options.data and options.evaluate))
    criterion = cut.criterion if is_scored else "uniform"
    plan = cut.plan(choice, criterion, values=None if scores is None else scores.widths.get(criterion))
    step = _step(cut, options, choice, scores) if is_scored else {"score": options.score}
    plan = replace(plan, steps=({"prune": step},), notes=(*plan.notes, *notes))
    return Pruning(
        source=begun.source,
        plan=begun.plan.then(plan),
        reads={**begun.reads, **reads_of(options)},
        attachments={**begun.attachments, **({} if scores is None else {SCORES: scores.to_bytes()})},
        score=step["score"],
        scores=scores,
        choice=choice if is_scored or not count or cut.named else None,
        text=measured.text,
        removable=removable,
        most_removable=most_removable,
        device=measured.device,
        trust_remote_code=options.trust_remote_code,
        is_named=cut.named is not None,
        also_read=() if is_measured else _floating(begun.source),
    )


def _floating(source: Source) -> list[str]:
    """Return the tensors that scores and perplexities are taken from."""
    return [name for name, item in source.tensors.items() if item.spec.dtype in FLOAT_DTYPES]


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
        "value": choice.score,
        "protect": list(cut.protect),
        "sizes": None if cut.sizes is None else dict(cut.sizes),
        "width_criterion": None if cut.sizes is None else cut.criterion,
        "seed": options.seed,
        "data": None if scores is None or scores.data is None else dict(scores.data),
        **({"trust_remote_code": True} if options.trust_remote_code else {}),
    }


# --- the cut --------------------------------------------------------------------------------------------------


def _cut(anatomy: Anatomy, options: PruneOptions) -> tuple[Cut, tuple[str, ...]]:
    """Return the cut that the options ask for, and notes. Raises PlanError for an impossible one: nothing is scored."""
    notes: tuple[str, ...] = ()
    layers, given = options.layers, options.sizes
    named = named_layers(anatomy, drop=options.drop, keep=options.keep)
    if options.like is not None:
        small = read_anatomy(spec_of(open_source(options.like)))
        layers = small.depth
        given, notes = sizes_like(anatomy, small, os.fspath(options.like))
    sizes = pruned_sizes(anatomy, given)
    has_budget = options.target_parameters is not None or options.target_memory is not None
    count = None if has_budget else 0 if layers is None else removed_count(anatomy, layers)
    count = count if named is None else len(named)
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
        named=named,
    )
    cut.check()
    return cut, notes


# --- the scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """The scores and the text, None where there are none, and the device that computed."""

    scores: Scores | None
    text: "Calibration | None"
    device: str


def _measure(begun: Surgery, cut: Cut, options: PruneOptions) -> _Measured:
    """Return the scores, read or taken, and the text, as far as the options ask for them."""
    source = begun.source
    scores: Scores | None = None
    if options.scores_from is not None:
        begun.check_saved()
        scores = read_scores_of(options.scores_from, source)
    takes_scores = scores is None and cut.needs_scores
    if not options.measure or not (options.data or takes_scores):
        return _Measured(scores, None, options.device)
    begun.check_saved()
    from surgeon.models.device import resolve_device

    device = resolve_device(options.device)
    text = _text(source, cut, options, device)
    if scores is None:
        scores = _score(source, cut, options, text, device)
    return _Measured(scores, text, device)


def _text(source: Source, cut: Cut, options: PruneOptions, device: str) -> "Calibration | None":
    """Return the text to measure on: the user's, else one that the model writes where scores need it."""
    if not options.data and not cut.reads_text:
        return None
    from surgeon.measure.calibration import calibrate

    shape = {"samples": options.samples, "sequence_length": options.sequence_length}
    return calibrate(source, options.data, **shape, device=device, seed=options.seed)


def _score(source: Source, cut: Cut, options: PruneOptions, text: "Calibration | None", device: str) -> Scores:
    """Return the scores of the source."""
    from surgeon.measure.scoring import ScoreRequest, score

    if options.greedy and cut.count is None:
        raise PlanError("a greedy removal needs the number of layers that go", hint="Give --layers.")
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
