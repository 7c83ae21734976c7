"""The table of scores: how each is taken, and how it chooses the layers that go.

A score is one file in `src/surgeon/measure/` and one row here. The command line, the record in scores.json, the choice
of layers and the pictures read the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CONTRIBUTION = "contribution"  # the ranking of positions in width where none is named


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """A removal that scores the model anew after each layer that goes.

    `by` is a function (model, tokens, count, protect=, meter=) that returns the order in which layers go and the
    perplexity after each. `protect` is the number of first and last layers that its authors keep.
    """

    by: str
    protect: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a score is taken and used. `help` describes it in one line.

    One of three names, "module:name", says how it is taken; a method with none measures nothing:
    `observer` is a `surgeon.models.streaming.Observer` on the streamed pass that all such scores share, made of the
    depth (and `all_tokens`, where `token_choice` lets the user decide which tokens count); its method `result` returns
    the values. `function` is one (model, tokens, meter=) that runs the streamed model itself. `weights` is a
    function of the source and reads no text.

    Values are a number per layer, or of a `matrix` one per block: entry [s][e] for layers s to e - 1. The lower, the
    less the removal is thought to change. `label` names the values in a picture.

    `block` removes one block of layers, not any; `protect` is how many first and last layers stay: both the choice of
    the method's authors. `chosen` says which layers go. `width` ranks neurons, heads, channels and experts.
    """

    help: str
    observer: str = ""
    result: str = "result"
    function: str = ""
    weights: str = ""
    token_choice: bool = False
    matrix: bool = False
    label: str = ""
    block: bool = False
    protect: tuple[int, int] = (0, 0)
    chosen: Literal["lowest", "deepest", "random"] = "lowest"
    width: str = CONTRIBUTION
    greedy: Greedy | None = None


METHODS: Mapping[str, Method] = {
    "angular": Method(
        help="angle between the states before and after a block",
        observer="surgeon.measure.residual:Angular",
        token_choice=True,
        matrix=True,
        label="angular distance / π",
        block=True,
    ),
    "block-influence": Method(
        help="1 - cosine of a layer's input and output",
        observer="surgeon.measure.residual:Influence",
        result="block_influence",
    ),
    "relative-magnitude": Method(
        help="size of a layer's update relative to its output",
        observer="surgeon.measure.residual:Influence",
        result="relative_magnitude",
    ),
    "perplexity": Method(
        help="perplexity without the layer",
        function="surgeon.measure.removal:one_by_one",
        greedy=Greedy(by="surgeon.measure.removal:greedy", protect=(1, 1)),  # SLEB
    ),
    "taylor": Method(
        help="sum of |weight x gradient|",
        function="surgeon.measure.taylor:taylor",
        protect=(4, 2),
    ),
    "magnitude": Method(
        help="sum of |weight|",
        weights="surgeon.measure.magnitude:layer_magnitudes",
        protect=(4, 2),
        width="magnitude",
    ),
    "random": Method(help="drawn from the seed", chosen="random", width="random"),
    "last": Method(help="the deepest layers but the final one", block=True, protect=(0, 1), chosen="deepest"),
    "uniform": Method(
        help="the deepest layers; widths keep evenly spaced positions", block=True, chosen="deepest", width="uniform"
    ),
}


@dataclass(frozen=True, slots=True)
class Ranking:
    """How positions in width (neurons, heads, channels, experts) are ranked, and from what; `help` is a few words."""

    input: Literal["text", "weights", "nothing"]
    help: str


WIDTHS: Mapping[str, Ranking] = {
    CONTRIBUTION: Ranking("text", "activation times weight: what it adds"),
    "activation": Ranking("text", "mean |activation|, Minitron's"),
    "magnitude": Ranking("weights", "sum of |weight|"),
    "uniform": Ranking("nothing", "evenly spaced"),
    "random": Ranking("nothing", "drawn from the seed"),
}
