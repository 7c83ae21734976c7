"""Whether drafting pays: the speed of exact speculative sampling with a smaller model that proposes tokens.

Source: Leviathan et al. 2023 (arXiv:2211.17192), theorem 3.8, for acceptances that do not depend on the place.
"""

import math
from dataclasses import dataclass

from surgeon.anatomy.anatomy import Anatomy

MOST_DRAFTED = 16  # tokens ahead that are tried


@dataclass(frozen=True)
class DraftSpeed:
    """How many times as fast a model writes with a draft that proposes `tokens` at once.

    `times` of 1 or less: drafting with it cannot pay.
    """

    times: float
    tokens: int

    @property
    def told(self) -> str:
        """The factor, or that it cannot pay."""
        if self.times <= 1.0:
            return f"cannot pay ({self.times:.2f} x at best)"
        return f"{self.times:.2f} x with {self.tokens} tokens drafted"


def tokens_a_round(acceptance: float, drafted: int) -> float:
    """Return how many tokens come out of a round of so many drafted ones: (1 - a^(g + 1)) / (1 - a)."""
    return math.fsum(acceptance**power for power in range(drafted + 1))


def draft_speed(acceptance: float, share: float) -> DraftSpeed:
    """Return the best speed with a draft that takes `share` of the time of the model's token.

    A round of g drafted tokens takes g x share + 1 steps of the model. So drafting is faster where the acceptance is
    above `share`, and nowhere else: a + a^2 + ... + a^g is at most g a.
    """
    speeds = (
        DraftSpeed(tokens_a_round(acceptance, drafted) / (drafted * share + 1.0), drafted)
        for drafted in range(1, MOST_DRAFTED + 1)
    )
    return max(speeds, key=lambda speed: (speed.times, -speed.tokens))


def acceptance_of(tokens: float, drafted: int) -> float:
    """Return the acceptance at which a round of so many drafted tokens gives `tokens`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_a_round(middle, drafted) < tokens else (low, middle)
    return (low + high) / 2


def time_share(draft: Anatomy, model: Anatomy) -> float:
    """Return the share of a model's time that a draft's token takes, as far as weights say: by the numbers they read.

    Each token reads all weights of the layers and of the head, and one row of an embedding. Of experts those that are
    chosen would count; here all do.
    """
    return _read_by_a_token(draft) / _read_by_a_token(model)


def _read_by_a_token(anatomy: Anatomy) -> int:
    embedding = sum(
        tensor.num_parameters
        for name, tensor in anatomy.spec.tensors.items()
        if anatomy.whole_family is not None and anatomy.row(name)[0].kind == "embedding"
    )
    text = anatomy.config
    is_tied = bool(text.get("tie_word_embeddings", True)) and not any(
        anatomy.row(name)[0].kind == "head" for name in anatomy.spec.tensors if anatomy.whole_family is not None
    )
    return anatomy.spec.num_parameters - (0 if is_tied else embedding)
