"""The options of `prune`: how much goes, by which scores, and where the model is run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.anatomy.halves import Pairing
from surgeon.data.records import chosen_columns
from surgeon.options import (
    Checked,
    OptionError,
    check_counts,
    check_seed,
    columns_option,
    device_option,
    flag_of,
    in_python,
    layer_numbers,
    numbers,
    option,
    progress_option,
    revision_option,
    seed_option,
    trust_option,
)
from surgeon.progress import Progress
from surgeon.transforms.layers import check_depth
from surgeon.transforms.scores import CONTRIBUTION, METHODS
from surgeon.transforms.scores import WIDTHS as RANKINGS
from surgeon.verbs.search_options import SEARCH, SearchOptions, TargetOptions

_UNCHANGED = "Default: unchanged."
_SCORES = ", ".join(f"{name} ({method.help})" for name, method in METHODS.items())
_RANKINGS = ", ".join(f"{name} ({ranking.help})" for name, ranking in RANKINGS.items())
_BLOCK = ", ".join(name for name, method in METHODS.items() if method.block)
_GREEDY = " or ".join(name for name, method in METHODS.items() if method.greedy)
_TOKENS = " or ".join(name for name, method in METHODS.items() if method.token_choice)
_PROTECT = ", ".join(
    f"{first},{last} for {name}" for name, method in METHODS.items() for first, last in [method.protect] if first + last
)


WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "expert_intermediate_size",
    "attention_heads",
    "key_value_heads",
    "experts",
)


def _first_and_last(text: str) -> tuple[int, int]:
    """Return the two numbers in "1,1". Raises ValueError for anything else."""
    counts = numbers(text)
    if len(counts) != 2:
        raise ValueError(f"{text!r} is not two numbers such as 1,1")
    return counts[0], counts[1]


@dataclass(frozen=True, kw_only=True)
class CutOptions(TargetOptions):
    """The options that say how much goes, and by which scores."""

    score: str = option(
        f"What decides what goes: {SEARCH} (cuts are measured; with a target the default), or a score: {_SCORES}. "
        "Default: angular.",
        None,
        metavar="SCORE",
        choices=(SEARCH, *METHODS),
        group="by which scores",
    )
    layers: int | str | None = option(
        "Layers of the result: 24, or 75% of the source's. Default: unchanged, where a width is given.",
        None,
        metavar="N",
        group="how much goes",
    )
    drop: Sequence[int] | None = option(
        "Remove these layers, in place of a choice by scores: 3,7,11-13.",
        None,
        metavar="LAYERS",
        parse=layer_numbers,
        group="how much goes",
    )
    keep: Sequence[int] | None = option(
        "Keep these layers and remove all others: 0-20,25-29.",
        None,
        metavar="LAYERS",
        parse=layer_numbers,
        group="how much goes",
    )
    drop_attention: Sequence[int] | None = option(
        "Remove the attentions of these layers and keep their MLPs; as many go of each: --drop-mlp.",
        None,
        metavar="LAYERS",
        parse=layer_numbers,
        group="how much goes",
    )
    drop_mlp: Sequence[int] | None = option(
        "Remove the MLPs of these layers and keep their attentions; with --drop-attention, and --drop if you like.",
        None,
        metavar="LAYERS",
        parse=layer_numbers,
        group="how much goes",
    )
    pairing: Pairing | None = in_python("The halves of layers that stay, in place of a choice of layers.")
    hidden_size: int | None = option(
        f"Hidden size of the result. {_UNCHANGED}", None, metavar="N", group="how much goes"
    )
    intermediate_size: int | None = option(
        f"Neurons of each MLP of the result. {_UNCHANGED}", None, metavar="N", group="how much goes"
    )
    expert_intermediate_size: int | None = option(
        f"Neurons of each expert. {_UNCHANGED}", None, metavar="N", group="how much goes"
    )
    attention_heads: int | None = option(
        f"Attention heads of the result. {_UNCHANGED}", None, metavar="N", group="how much goes"
    )
    key_value_heads: int | None = option(
        f"Key-value heads of the result; each is removed with its group of heads. {_UNCHANGED}",
        None,
        metavar="N",
        group="how much goes",
    )
    experts: int | None = option(
        f"Experts per layer of the result. {_UNCHANGED}", None, metavar="N", group="how much goes"
    )
    merge_experts: bool = option(
        "Merge the experts that go into those that stay: their output maps are solved anew on the text.",
        False,
        group="how much goes",
    )
    dense: bool = option(
        "Make one MLP of --intermediate-size neurons of each layer's experts. Default size: what a token takes.",
        False,
        group="how much goes",
    )
    like: str | os.PathLike[str] | None = option(
        "Take the depth and all sizes from this smaller model; goes with --score uniform.",
        None,
        metavar="SMALL",
        reads=True,
        group="how much goes",
    )
    contiguous: bool | None = option(
        f"Remove one block of adjacent layers, or any layers. Default: one block for {_BLOCK}; else any.",
        None,
        names=("--contiguous/--free",),
        group="how much goes",
    )
    protect: tuple[int, int] | None = option(
        f"How many first and last layers to keep. Default: {_PROTECT}, 1,1 with --greedy; else 0,0.",
        None,
        metavar="FIRST,LAST",
        parse=_first_and_last,
        group="how much goes",
    )
    keep_pattern: bool = option(
        "Remove whole periods of a pattern such as 5 sliding layers, 1 full: llama.cpp counts on it.",
        False,
        group="how much goes",
    )
    width_score: str | None = option(
        f"What ranks neurons, heads, channels: {_RANKINGS}. Default: {CONTRIBUTION}, or the score of that name.",
        None,
        metavar="SCORE",
        choices=tuple(RANKINGS),
        group="by which scores",
    )
    greedy: bool = option(
        f"With --score {_GREEDY}: score the model again after each removed layer (SLEB).",
        False,
        group="by which scores",
    )
    tokens: str = option(
        f"With --score {_TOKENS}: measure at the last token of each sequence, or at all tokens.",
        "last",
        metavar="WHICH",
        choices=("last", "all"),
        group="by which scores",
    )
    data: Sequence[str] = option(
        "Text to measure on: .txt, .jsonl, .csv, .parquet, Hub dataset ... Repeatable. Default: the model writes one.",
        (),
        metavar="DATA",
        reads=True,
        group="text",
    )
    columns: str | None = columns_option(group="text")
    samples: int = option("Number of sequences taken from the text.", 32, metavar="N", group="text")
    sequence_length: int = option("Tokens per sequence.", 256, metavar="T", group="text")
    scores_from: str | os.PathLike[str] | None = option(
        "Choose by the scores in this scores.json instead of running the model.",
        None,
        metavar="FILE",
        reads=True,
        group="by which scores",
    )
    evaluate: bool = option(
        "Measure the perplexity on the text before and after.", True, names=("--evaluate/--no-evaluate",), group="text"
    )
    eval_data: Sequence[str] = option(
        "Text that neither scores, a search nor a compensation are fitted to: it judges all. Repeatable. Default: "
        "--data, of which a compensation leaves one row in eight.",
        (),
        metavar="DATA",
        reads=True,
        group="text",
    )
    compensate: bool | None = option(
        "Solve the output maps in front of what goes anew, by least squares on the text: no training. "
        "Default: with --data, where the family can and no heads go.",
        None,
        names=("--compensate/--no-compensate",),
        group="compensation",
    )
    repairs_from: str | os.PathLike[str] | None = option(
        "Take the solved maps from this repairs.safetensors, or from that of a compensated result.",
        None,
        metavar="FILE",
        reads=True,
        group="compensation",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen_columns(self.columns)
        if self.score is None:
            object.__setattr__(self, "score", SEARCH if self.asks_for_search(self.scores_from) else "angular")
        others = {"greedy": self.greedy, "contiguous": self.contiguous is not None, "like": self.like is not None}
        others |= {"keep_pattern": self.keep_pattern, "keep": self.keep is not None, "dense": self.dense}
        rule = next((name for name, is_given in others.items() if is_given), self.dropped_by)
        has_depth, has_record = self.layers is not None, self.scores_from is not None
        self.check_search(self.score, rule=rule, has_depth=has_depth, has_record=has_record)
        if self.greedy and METHODS[self.score].greedy is None:
            raise OptionError(
                "greedy", f"--greedy: {self.score} has no greedy form", hint=f"--greedy goes with --score {_GREEDY}."
            )
        if self.greedy and self.contiguous:
            hint = "Leave out --contiguous."
            raise OptionError("greedy", "a greedy removal chooses layers one by one, not as a block", hint=hint)
        if self.greedy and self.keep_pattern:
            hint = "Leave out --greedy."
            raise OptionError("greedy", "a greedy removal chooses layers one by one, not in whole periods", hint=hint)
        if self.repairs_from is not None and self.compensate is False:
            hint = "Leave out one of them."
            raise OptionError("repairs_from", "repairs are given, and none is to be made", hint=hint)
        if self.protect is not None and min(self.protect) < 0:
            raise OptionError("protect", f"cannot protect {min(self.protect)} layers", hint="Write --protect 1,1.")
        if self.layers is not None:
            check_depth(self.layers)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raises OptionError where the size of the result is missing, unreadable, or given more than once."""
        check_counts(self, *WIDTHS, "samples")
        check_counts(self, "sequence_length", least=2)
        narrows = any(size is not None for size in self.sizes.values())
        if self.like is not None and (self.layers is not None or narrows):
            raise OptionError("like", "sizes are given beside a model to take them from", hint="Give --like, or sizes.")
        targets = (self.parameters, self.nbytes, self.target_latency)
        budgets = [target for target in targets if target is not None]
        depths: list[object] = [given for given in (self.layers, self.like, self.keep) if given is not None]
        depths += [True] * (self.dropped_by is not None)
        if (len(budgets) > 1 and self.score != SEARCH) or len(depths) + bool(budgets) > 1:
            hint = "Give one of --layers, --drop (or halves), --keep and the targets."
            raise OptionError("", "the depth is asked for more than once", hint=hint)
        self._check_named()
        if self.merge_experts and self.experts is None:
            hint = "Give --experts N beside it."
            raise OptionError("merge_experts", "--merge-experts merges experts that go, and none do", hint=hint)
        if self.merge_experts and self.compensates:
            hint = "Merge experts, and compensate the saved result."
            raise OptionError("merge_experts", "one cut is merged or compensated, not both", hint=hint)
        if self.dense:
            self._check_dense(budgets or depths)
        if budgets and narrows:
            raise OptionError("", "a budget decides the depth, not the width", hint="Give --layers beside sizes.")
        if not (budgets or depths or narrows or self.dense or self.score == SEARCH):
            raise OptionError(
                "", "nothing to prune", hint="Give --layers, a size such as --intermediate-size, or a target."
            )

    def _check_dense(self, depth: object) -> None:
        """Raises OptionError for what a dense model is not made with in one step."""
        others = [axis for axis, size in self.sizes.items() if size is not None and axis != "ffn"]
        if depth or others or self.compensates or self.merge_experts:
            hint = "Give --intermediate-size alone beside it, and cut the saved result."
            raise OptionError("dense", "--dense makes experts dense, and cuts nothing else", hint=hint)

    def _check_named(self) -> None:
        """Raises OptionError where layers are named, and something else would choose them too."""
        if not self.names_layers:
            return
        choosing = {"greedy": self.greedy, "contiguous": self.contiguous is not None}
        choosing |= {"protect": self.protect is not None, "keep_pattern": self.keep_pattern}
        if also := next((name for name, is_given in choosing.items() if is_given), None):
            named = flag_of(self.dropped_by or "keep")
            raise OptionError(also, f"{flag_of(also)} chooses layers, and {named} names them", hint="Give one of them.")
        if self.keep is not None and list(self.keep) != sorted(set(self.keep)):
            raise OptionError(
                "keep", "--keep must be in order: no layer moves, and none is repeated", hint="Such as --keep 0-5,8."
            )

    @property
    def compensates(self) -> bool:
        """Whether output maps are solved anew, or taken from a file."""
        return bool(self.compensate) or self.repairs_from is not None

    @property
    def compensates_by_default(self) -> bool:
        """Whether nothing is said of it, and there is a text to solve output maps on.

        Not where heads go: text of another kind than the fit's was worse for it (docs/benchmarks.md, Compensation).
        """
        is_open = self.compensate is None and self.repairs_from is None and bool(self.data)
        cuts_heads = any(given is not None for given in (self.attention_heads, self.key_value_heads, self.like))
        return is_open and not (self.dense or self.merge_experts or cuts_heads)

    @property
    def width_ranking(self) -> str:
        """The ranking of positions in width of a search, by its name in WIDTHS."""
        return self.width_score or CONTRIBUTION

    @property
    def solves(self) -> bool:
        """Whether output maps are solved on the text."""
        return (self.compensates and self.repairs_from is None) or self.merge_experts or self.dense

    @property
    def names_layers(self) -> bool:
        """Whether the layers that go are named, and not chosen by scores."""
        return self.dropped_by is not None or self.keep is not None

    @property
    def names_halves(self) -> bool:
        """Whether halves of layers are named that go."""
        return self.drop_attention is not None or self.drop_mlp is not None

    @property
    def dropped_by(self) -> str | None:
        """The first option that names layers, or halves of them, that go; None where there is none."""
        naming = ("drop", "drop_attention", "drop_mlp", "pairing")
        return next((name for name in naming if getattr(self, name) is not None), None)

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
class RunOptions(Checked):
    """The options that say where the model is run, from which seed, and which of its revisions."""

    device: str = device_option()
    seed: int = seed_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()


@dataclass(frozen=True, kw_only=True)
class PruneOptions(RunOptions, SearchOptions, CutOptions):
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
