"""What a cut is worth on rows of text: sums over the tokens of each row. Pure numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Figures:
    """Sums over the tokens of each row: next-token loss and KL(whole || cut) in nats, Σ min(p, q), equal most likely.

    `tokens` is how many of each row count.
    """

    loss: tuple[float, ...]
    kl: tuple[float, ...]
    overlap: tuple[float, ...]
    agreeing: tuple[float, ...]
    tokens: tuple[float, ...]

    @classmethod
    def read(cls, entry: Mapping[str, Sequence[float]]) -> "Figures":
        """Return the figures in search.json."""
        return cls(*(tuple(float(value) for value in entry[name]) for name in (item.name for item in fields(cls))))

    def to_dict(self) -> dict[str, list[float]]:
        """Return this as search.json holds it."""
        return {item.name: list(getattr(self, item.name)) for item in fields(self)}

    def mean(self, of: str) -> float:
        """Return the mean per token of "loss", "kl", "overlap" or "agreeing"."""
        return math.fsum(getattr(self, of)) / max(1.0, math.fsum(self.tokens))

    @property
    def acceptance(self) -> float:
        """The share of a draft's tokens that exact speculative sampling accepts: 1 - total variation, over the text."""
        return self.mean("overlap")

    @property
    def agreement(self) -> float:
        """How often the cut's most likely token is the whole model's: greedy decoding accepts it."""
        return self.mean("agreeing")

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss."""
        return math.exp(self.mean("loss")) if self.mean("loss") < 700 else math.inf

    def over(self, other: "Figures", of: str) -> tuple[float, float]:
        """Return by how much a mean is above another cut's on the same rows, and the error of this paired difference.

        A row is one observation; it weighs as many tokens as it has. Of a single row there is no error: infinity.
        """
        total = math.fsum(self.tokens)
        differences = [one - two for one, two in zip(getattr(self, of), getattr(other, of), strict=True)]
        mean = math.fsum(differences) / total
        count = len(differences)
        if count < 2:
            return mean, math.inf
        spread = math.fsum((d - mean * t) ** 2 for d, t in zip(differences, self.tokens, strict=True))
        return mean, math.sqrt(spread * count / (count - 1)) / total
