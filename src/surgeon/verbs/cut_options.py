"""The options of `prune`: how much goes, by which scores, and where the model is run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.anatomy.halves import Pairing
from surgeon.data.records import chosen_columns
from surgeon.options import (
    Checked,
    OptionError,
    Words,
    check_counts,
    check_seed,
    columns_option,
    count_in,
    device_option,
    flag_of,
    in_python,
    layer_numbers,
    numbers,
    option,
    progress_option,
    revision_option,
    seed_option,
    size_in_bytes,
    trust_option,
)
from surgeon.progress import Progress
from surgeon.search.budget import OVER
from surgeon.search.journal import FILE as SEARCH_FILE
from surgeon.transforms.layers import check_depth
from surgeon.transforms.scores import METHODS
from surgeon.verbs.search_options import SearchOptions

SEARCH = "search"  # in place of a score: cuts are measured, and the best is taken
_UNCHANGED = "Default: unchanged."
_SCORES = ", ".join(f"{name} ({method.help})" for name, method in METHODS.items())
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
class CutOptions(Checked):
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
    target_parameters: float | str | None = option(
        "The result has at most so many parameters: 100M, 6.7B. With a --score the fewest layers go that it takes.",
        None,
        metavar="N",
        group="how much goes",
    )
    target_memory: int | str | None = option(
        "The result has at most so many bytes of weights, with --context and of its cache: 12GB.",
        None,
        metavar="SIZE",
        group="how much goes",
    )
    target_latency: float | None = option(
        "A token of the result takes at most so many milliseconds on this device, as measured layer by layer.",
        None,
        metavar="MS",
        group="how much goes",
    )
    context: int | None = option(
        "Tokens of the cache that --target-memory counts, and that --target-latency is measured after.",
        None,
        metavar="N",
        group="how much goes",
    )
    over: str | None = option(
        f"What a search may change, with commas between: {', '.join(OVER)}. Default: all that the family can.",
        None,
        metavar="PARTS",
        choices=Words(tuple(OVER), many=True),
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
    point: int | None = option(
        "Make this cut of the search in the file of --scores-from; 1 is the one that it chose.",
        None,
        metavar="N",
        group="by which scores",
    )
    evaluate: bool = option(
        "Measure the perplexity on the text before and after.", True, names=("--evaluate/--no-evaluate",), group="text"
    )
    eval_data: Sequence[str] = option(
        "Text that neither scores, a search nor a compensation are fitted to: it judges all. Repeatable. Default: "
        "--data, of which a compensation leaves every eighth row.",
        (),
        metavar="DATA",
        reads=True,
        group="text",
    )
    compensate: bool | None = option(
        "Solve the output maps in front of what goes anew, by least squares on the text: no training. Default: off.",
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
            object.__setattr__(self, "score", SEARCH if self._asks_for_search else "angular")
        self._check_search()
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
        if budgets and narrows:
            raise OptionError("", "a budget decides the depth, not the width", hint="Give --layers beside sizes.")
        if not (budgets or depths or narrows or self.score == SEARCH):
            raise OptionError(
                "", "nothing to prune", hint="Give --layers, a size such as --intermediate-size, or a target."
            )

    @property
    def _asks_for_search(self) -> bool:
        """Whether a search decides where no score is named: for a target, unless scores were taken already."""
        if self.scores_from is not None:
            return self.point is not None or Path(self.scores_from).name == SEARCH_FILE
        return self._targets

    def _check_search(self) -> None:
        """Raises OptionError for what only a search can do where there is none, and for what none can do."""
        if self.score != SEARCH:
            names = ("target_latency", "context", "over", "point")
            if (only := next((name for name in names if getattr(self, name) is not None), None)) is not None:
                hint = f"Leave out --score {self.score}."
                raise OptionError(
                    only, f"{flag_of(only)} is for a search, and --score {self.score} makes none", hint=hint
                )
            return
        ruled = {"greedy": self.greedy, "contiguous": self.contiguous is not None, "keep_pattern": self.keep_pattern}
        ruled |= {"like": self.like is not None, "keep": self.keep is not None}
        ruled |= {name: True for name in (self.dropped_by,) if name is not None}
        if (rule := next((name for name, is_given in ruled.items() if is_given), None)) is not None:
            raise OptionError(
                rule, f"a search chooses what goes, and {flag_of(rule)} does too", hint="Give one of them."
            )
        check_counts(self, "context", "point")
        if self.context is not None and self.target_memory is None and self.target_latency is None:
            hint = "Give --target-memory or --target-latency."
            raise OptionError("context", "--context counts towards no target here", hint=hint)
        if self.target_latency is not None and not 0 < self.target_latency < 1e9:
            hint = "Write milliseconds, such as 12.5."
            raise OptionError("target_latency", f"cannot read {self.target_latency!r} as a time", hint=hint)
        if self.point is not None and self.scores_from is None:
            raise OptionError("point", "--point is of a search that was made", hint="Give --scores-from search.json.")
        if self.scores_from is None and self.layers is None and not self._targets:
            hint = "Give --layers, --target-parameters, --target-memory or --target-latency."
            raise OptionError("score", "a search needs to know how small the result is to be", hint=hint)

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
    def _targets(self) -> bool:
        return any(target is not None for target in (self.target_parameters, self.target_memory, self.target_latency))

    @property
    def compensates(self) -> bool:
        """Whether output maps are solved anew, or taken from a file."""
        return bool(self.compensate) or self.repairs_from is not None

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
    def parameters(self) -> int | None:
        """The most parameters that the result may have. Raises OptionError for infinity and NaN."""
        if self.target_parameters is None:
            return None
        count = count_in(self.target_parameters)
        if count is None:
            raise OptionError(
                "target_parameters",
                f"cannot read {self.target_parameters!r} as a number of parameters",
                hint="Write 100M, 6.7B or 6.7e9.",
            )
        return count

    @property
    def nbytes(self) -> int | None:
        """The most bytes of weights that the result may have. Raises OptionError for text that is no size."""
        return None if self.target_memory is None else size_in_bytes(self.target_memory, "target_memory")

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
