"""A surgery that scores decided, and what it costs in perplexity on their text."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.halves import ATTENTION, MLP, Half
from surgeon.checkpoint.derived import alone
from surgeon.checkpoint.source import spec_of
from surgeon.measure.record import Scores, perplexities
from surgeon.models.loading import runs
from surgeon.surgery import Surgery, open_source
from surgeon.transforms.choose import Choice
from surgeon.verbs.compensating import Compensation
from surgeon.verbs.merging import Merging

if TYPE_CHECKING:
    from surgeon.measure.calibration import Calibration
    from surgeon.plots.pruning import Removed


@dataclass(frozen=True, kw_only=True, repr=False)
class Pruning(Surgery):
    """A surgery that scores decided, or the names of layers.

    `score` is None where the layers were named and no score was asked. `choice` is None where no scores are there yet,
    `text` where none was read. `judged` is the text that perplexities are measured on, `compensation` what was solved
    anew and `merging` which experts were merged, None where that was not asked for. removable(n) returns the layers
    that go when n do; it works for n up to `most_removable`, with `keep_pattern` for whole periods.

        pruning = surgeon.prune("gpt2-large", score="block-influence", layers=30, data=["text.txt"], samples=4)
        print(pruning.choice.dropped, pruning.perplexity())
        pruning.draw(curve=pruning.curve(most=4)).savefig("scores.png")
    """

    score: str | None
    scores: Scores | None
    choice: Choice | None
    text: "Calibration | None"
    removable: Callable[[int], Choice]
    most_removable: int
    device: str
    trust_remote_code: bool = False
    is_named: bool = False
    judged: "Calibration | None" = None
    compensation: Compensation | None = None
    merging: Merging | None = None

    @property
    def headline(self) -> str:
        """The source, the score, and what goes."""
        gone = "not chosen yet" if self.choice is None else f"without {self.choice.words}"
        return f"{super().headline}, {'as named' if self.score is None else f'by {self.score}'}, {gone}"

    def evaluate(self, result: str | os.PathLike[str], *, before: float | None = None) -> tuple[float, float] | None:
        """Return the perplexity of the source (`before` if known) and of the written result; None without one."""
        if (known := self.perplexity() if before is None else before) is None or self.judged is None:
            return None
        from surgeon.measure.scoring import perplexity

        with runs(self.source.label, trust_remote_code=self.trust_remote_code):
            return known, perplexity(open_source(result), self.judged.tokens, device=self.device)

    def perplexity(self) -> float | None:
        """Return the perplexity of the source on the text that judges; None without one, and for an encoder."""
        if self.judged is None:
            return None
        from surgeon.measure.scoring import perplexity
        from surgeon.models.skeleton import predicts_next

        source = alone(self.source)
        if not predicts_next(source):
            return None
        scored_on = None if self.scores is None or self.scores.data is None else self.scores.data.get("sha256")
        if self.scores is not None and self.scores.loss is not None and scored_on == self.judged.origin["sha256"]:
            return perplexities([self.scores.loss])[0]
        with runs(source.label, trust_remote_code=self.trust_remote_code):
            return perplexity(source, self.judged.tokens, device=self.device)

    def curve(self, most: int | None = None) -> list[float] | None:
        """Return the perplexity with 0, 1, 2 ... `most` layers removed by the scores, None without a text.

        One streamed pass over the source, in its full width. `most` is half its depth by default, and never more than
        `most_removable`.
        """
        if self.text is None:
            return None
        from surgeon.measure.scoring import removal_curve

        source = alone(self.source)
        half = read_anatomy(spec_of(source)).depth // 2
        last = min(half if most is None else most, self.most_removable)
        choices = [self.removable(count).dropped for count in range(last + 1)]
        with runs(self.source.label, trust_remote_code=self.trust_remote_code):
            return removal_curve(source, self.text.tokens, choices, device=self.device)

    def draw(self, *, curve: Sequence[float] | None = None) -> Any:
        """Return a figure of matplotlib: the scores, a map of what goes, and the perplexities of `curve`, if given.

        Raises PlanError where nothing goes and nothing was scored.
        """
        from surgeon.plots.pruning import draw_pruning

        return draw_pruning(self.score, self.scores, self.removed, title=self._title(), curve=curve)

    def picture(self, *, curve: Sequence[float] | None = None) -> Any:
        """Return the figure that tells most of how the cut was decided."""
        return self.draw(curve=curve)

    def searched(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what a search found, as rows for people and as entries for JSON; nothing where none decided."""
        return [], {}

    @property
    def removed(self) -> "Removed":
        """The layers of the source that go, and of each narrowed axis what stays in each layer."""
        from surgeon.plots.pruning import Removed
        from surgeon.transforms.kept import remains

        before, layers = self.before, range(self.before.depth)
        stay: dict[Half, set[int | None]] = {ATTENTION: set(self.plan.layer_map), MLP: set(self.plan.mlp_layers)}
        gone = {half: {layer for layer in layers if layer not in left} for half, left in stay.items()}
        whole = gone[ATTENTION] & gone[MLP]
        halves = {half: tuple(sorted(layers - whole)) for half, layers in gone.items()}
        return Removed(
            depth=before.num_layers,
            layers=before.in_all_stacks(sorted(whole)),
            halves={} if self.plan.mlp_map is None else halves,
            axes=remains(before, self.plan),
        )

    def _title(self) -> str:
        """Return what was pruned, how much goes, and by which scores on which text."""
        label = self.source.label
        before, after = self.before.spec.num_parameters, self.spec.num_parameters
        layers = f"{self.before.depth} → {len(self.plan.layer_map)} layers"
        how = "layers as named" if self.score is None else self.score
        if self.text is not None:
            rows, length = self.text.tokens.shape
            names = [Path(str(item["data"])).name for item in self.text.origin["sources"]]
            how += f", on {rows} x {length} tokens of {', '.join(names) or 'text by the model itself'}"
        elif self.scores is not None and self.scores.tokens:
            how += f", on {self.scores.tokens:,} tokens"
        name = Path(label).name if Path(label).exists() else label
        return f"{name}: {layers}, {before:,} → {after:,} parameters\n{how}"
