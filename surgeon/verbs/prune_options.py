"""What was asked of a pruning: which score, how many layers, which sizes. Decides what has to be measured for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import PlanError
from surgeon.measure.record import Scores
from surgeon.surgery import open_source, parse_size
from surgeon.transforms.choose import Choice, choose_layers
from surgeon.transforms.layers import resolve_depth
from surgeon.transforms.scores import GREEDY_PROTECT, METHODS

if TYPE_CHECKING:
    from surgeon.measure.calibration import Calibration
    from surgeon.measure.scoring import Meter


@dataclass(frozen=True)
class Request:
    """The choice of layers that was asked for."""

    anatomy: Anatomy
    name: str
    contiguous: bool | None
    protect: tuple[int, int] | None
    greedy: bool
    all_tokens: bool
    seed: int

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise PlanError(f"unknown score {self.name!r}", hint=f"One of: {', '.join(METHODS)}.")
        if self.greedy and self.name != "perplexity":
            raise PlanError(f"{self.name} has no greedy form", hint="--greedy goes with --score perplexity.")
        if self.greedy and self.contiguous:
            raise PlanError(
                "a greedy removal chooses layers one by one, not as a block", hint="Leave out --contiguous."
            )
        if self.protect is not None and min(self.protect) < 0:
            raise PlanError(f"cannot protect {min(self.protect)} layers", hint="Write --protect 1,1.")

    @property
    def criterion(self) -> str:
        """What ranks the positions of an axis."""
        return METHODS[self.name].width

    @property
    def guard(self) -> tuple[int, int]:
        """How many first and last layers stay."""
        return (
            self.protect if self.protect is not None else GREEDY_PROTECT if self.greedy else METHODS[self.name].protect
        )

    @property
    def most_removable(self) -> int:
        """How many layers can go."""
        return max(0, min(self.anatomy.depth - sum(self.guard), self.anatomy.depth - 1))

    def most_chosen(self, scores: Scores | None) -> int:
        """Return how many layers the scores can choose: a greedy order ends somewhere."""
        if not self.greedy or scores is None or scores.greedy is None:
            return self.most_removable
        return min(self.most_removable, len(scores.greedy["order"]))

    def needs(self, *, removes: bool, narrows: bool) -> tuple[set[str], set[str]]:
        """Return the scores of layers and the criteria of widths that have to be measured."""
        wanted = {self.name} if removes and METHODS[self.name].measured else set()
        widths = {self.criterion} if narrows and self.criterion in ("activation", "magnitude") else set()
        return wanted, widths

    def reads_text(self, wanted: set[str], widths: set[str]) -> bool:
        """Return whether these scores are taken on a text."""
        return bool((wanted | widths) - {"magnitude"})

    def score(
        self,
        source: Source,
        wanted: set[str],
        widths: set[str],
        text: "Calibration | None",
        count: int | None,
        evaluate: bool,
        device: str,
        meter: "Meter | None",
    ) -> Scores:
        """Return the scores of the source."""
        from surgeon.measure.scoring import score
        from surgeon.models.device import compute_dtype

        if self.greedy and count is None:
            raise PlanError("a greedy removal wants to know how many layers go", hint="Give --layers.")
        return score(
            source,
            None if text is None else text.tokens,
            wanted,
            data=None if text is None else text.origin,
            all_tokens=self.all_tokens,
            widths=widths,
            rounds=count if self.greedy else None,
            protect=self.guard,
            evaluate=evaluate,
            device=device,
            dtype=compute_dtype(source, device),
            seed=self.seed,
            meter=meter,
        )

    def check_scored(self, scores: Scores | None) -> None:
        """Raises PlanError when a record does not hold the score that is asked for."""
        found = {} if scores is None else dict(scores.layers)
        if self.greedy and scores is not None and scores.greedy is None:
            raise PlanError("the scores hold no greedy order", hint="Score again: leave out --scores-from.")
        if self.greedy and scores is not None and scores.greedy and list(self.guard) != scores.greedy.get("protect"):
            raise PlanError(
                f"the greedy order was found with --protect {scores.greedy.get('protect')}, not {list(self.guard)}",
                hint="Score again: leave out --scores-from.",
            )
        if not self.greedy and self.name not in found:
            have = ", ".join(found) or "none"
            raise PlanError(f"there are no {self.name} scores (there are: {have})", hint="Leave out --scores-from.")
        taken = "last" if scores is None else scores.options.get("tokens", "last")
        asked = "all" if self.all_tokens else "last"
        if self.name == "angular" and taken != asked:
            raise PlanError(
                f"the scores were taken with --tokens {taken}, not {asked}", hint="Say so, or leave out --scores-from."
            )

    def choose(self, count: int, scores: Scores | None) -> Choice:
        """Return which `count` layers go."""
        return choose_layers(
            self.name,
            count,
            self.anatomy.depth,
            values=None if scores is None else scores.layers.get(self.name),
            order=scores.greedy["order"] if self.greedy and scores is not None and scores.greedy else None,
            contiguous=self.contiguous,
            protect=self.guard,
            seed=self.seed,
        )

    def any_choice(self, count: int) -> Choice:
        """Return some layers to show the sizes by, where no scores are known."""
        return choose_layers("last", count, self.anatomy.depth, protect=(0, 0))

    def step(self, choice: Choice, sizes: Mapping[str, int] | None, scores: Scores | None) -> dict[str, Any]:
        """Return what the receipt says: the cut itself, and the scores that decided it."""
        return {
            "score": self.name,
            "greedy": self.greedy,
            "dropped": list(choice.dropped),
            "value": choice.score,
            "protect": list(self.guard),
            "sizes": None if sizes is None else dict(sizes),
            "width_criterion": None if sizes is None else self.criterion,
            "seed": self.seed,
            "data": None if scores is None or scores.data is None else dict(scores.data),
        }


@dataclass(frozen=True)
class Budget:
    """What the result may have: parameters, or bytes of weights."""

    parameters: int | None
    nbytes: int | None

    @classmethod
    def of(cls, parameters: float | None, memory: int | str | None) -> "Budget":
        """Return the budget that a user wrote: 6.7e9, "12GB". Raises PlanError for what is no such number."""
        if parameters is not None and not 0 <= parameters < 1e18:
            raise PlanError(f"cannot read {parameters!r} as a number of parameters", hint="Write 6.7e9.")
        nbytes = None if memory is None else parse_size(memory)
        return cls(None if parameters is None else int(parameters), nbytes)


def count_removed(
    anatomy: Anatomy,
    layers: int | str | None,
    budget: Budget,
    sizes: Mapping[str, int] | None,
) -> int | None:
    """Return how many layers go, None where a budget decides it."""
    given = [layers is not None, budget.parameters is not None, budget.nbytes is not None]
    if sum(given) > 1:
        raise PlanError("the depth is asked for more than once", hint="Give one of --layers and the targets.")
    if not any(given):
        if sizes is None:
            raise PlanError("nothing to prune", hint="Give --layers, a size such as --intermediate-size, or a target.")
        return 0
    if layers is None:
        if sizes is not None:
            raise PlanError("a budget decides the depth, not the width", hint="Give --layers beside sizes.")
        return None
    count = anatomy.depth - resolve_depth(layers, anatomy.depth)
    if count < 0:
        raise PlanError(
            f"cannot prune {anatomy.depth} layers to {anatomy.depth - count}",
            hint="--layers is the depth of the result; to grow: surgeon grow.",
        )
    return count


def sizes_like(anatomy: Anatomy, like: str | os.PathLike[str]) -> tuple[int, dict[str, int | None], tuple[str, ...]]:
    """Return the depth and the sizes of another model, and what of it the result does not take over.

    Raises PlanError when it is larger in some axis, or has another vocabulary.
    """
    small = read_anatomy(spec_of(open_source(like)))
    anatomy.require_family()
    small.require_family()
    if small.sizes["vocab"] != anatomy.sizes["vocab"]:
        raise PlanError(
            f"{os.fspath(like)} has a vocabulary of {small.sizes['vocab']}, the model of {anatomy.sizes['vocab']}",
            hint="Weight selection needs models with one vocabulary.",
        )
    axes = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "experts")
    sizes: dict[str, int | None] = {
        axis: small.sizes[axis] for axis in axes if axis in anatomy.sizes and axis in small.sizes
    }
    key = "tie_word_embeddings"
    ties = [bool(spec.config.get(key)) for spec in (anatomy.spec, small.spec)]
    notes = (f"{key} stays {str(ties[0]).lower()}, though {os.fspath(like)} has {str(ties[1]).lower()}",)
    return small.depth, sizes, notes if ties[0] != ties[1] else ()
