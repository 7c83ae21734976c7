"""Published laws of size and data, each with its constants, its source and the range in which it was fitted.

N are parameters, U tokens that are there once, D tokens that are seen, R = D / U - 1 repetitions, losses in nats a
token. A law holds within its range; outside it is an extrapolation, which `Reach.holds` says. Nothing here imports
more than the standard library, so a line of advice costs a run nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["memorises", "boundary", "does not memorise"]
VERDICTS: tuple[Verdict, ...] = ("does not memorise", "boundary", "memorises")  # in their order
GAP = 0.2  # nats between held-out and trained text from which a model is said to memorise: σ of arXiv:2405.08707, F.3


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a law was fitted: the least and the most of each quantity. `said` is that for people."""

    said: str
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def holds(self, **quantities: float) -> bool:
        """Return whether all quantities lie in their limits."""
        return all(low <= quantities[name] <= high for name, (low, high) in self.limits.items() if name in quantities)


# --- capacity -----------------------------------------------------------------------------------------------------

# Morris et al. 2025 (arXiv:2505.24832): GPT-style models on random bits, trained until nothing more goes in.
CAPACITY_BITS = 3.6
CAPACITY = Reach("0.5M to 1.5B parameters, trained to saturation", {"parameters": (0.5e6, 1.5e9)})
# Slack from which a set is memorised, and up to which it is not. Between measured anchors: three sizes of the text of
# GPT-2 small at slacks of 10.4, 1.04 and 0.01 (arXiv:2405.08707), three of a toy at 4.5, 0.45 and 0.045.
MEMORISES, LEARNS = 2.2, 0.14


def data_bits(tokens: float, loss: float) -> float:
    """Return the bits that a model with a loss in nats a token does not predict of so many tokens."""
    return tokens * loss / math.log(2)


def capacity_slack(parameters: float, bits: float) -> float:
    """Return how many times the bits of a text fit into a model. Above 1 it can learn all of it by heart."""
    return CAPACITY_BITS * parameters / max(bits, 1.0)


def by_capacity(slack: float) -> Verdict:
    """Return what a model of this slack comes to, where it sees the text often enough."""
    return "memorises" if slack >= MEMORISES else "boundary" if slack > LEARNS else "does not memorise"


# --- repetition ---------------------------------------------------------------------------------------------------

# Muennighoff et al. 2023 (arXiv:2305.16264), constants of the authors' code for C4: a repeated token is worth less and
# less. The law rises for ever, so it never says that an epoch hurts.
REPETITION_SCALE = 15.387756
REPETITION = Reach(
    "10M to 9B parameters, 100M to 900B tokens, from scratch on C4",
    {"parameters": (1e7, 9e9), "tokens": (1e8, 9e11)},
)


def worth(unique: float, epochs: float) -> float:
    """Return as how many fresh tokens `epochs` passes over so many unique ones count: U + U R* (1 - exp(-R / R*))."""
    if epochs <= 1:
        return unique * epochs
    return unique * (1 + REPETITION_SCALE * -math.expm1(-(epochs - 1) / REPETITION_SCALE))


# --- compute ------------------------------------------------------------------------------------------------------

# Besiroglu et al. 2024 (arXiv:2404.10102), the points of Hoffmann et al. (arXiv:2203.15556) fitted anew:
# L = E + A / N^α + B / D^β, N with embeddings.
CHINCHILLA = {"A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
COMPUTE = Reach(
    "70M to 16B parameters, 5B to 500B tokens, from scratch, one epoch",
    {"parameters": (7e7, 1.6e10), "tokens": (5e9, 5e11)},
)


def optimal_parameters(tokens: float) -> float:
    """Return the size for which so many fresh tokens are the best use of compute: α A / N^α = β B / D^β."""
    a, b, alpha, beta = CHINCHILLA.values()
    return float((alpha * a / (beta * b)) ** (1 / alpha) * tokens ** (beta / alpha))


# --- associative memory -------------------------------------------------------------------------------------------

# Niu et al. 2024 (arXiv:2405.08707): the least data of which a model's gap stays below GAP, at three widths. Three
# points that span a factor of 2: weak evidence for the exponent.
ASSOCIATIVE_FACTOR = 8.6e-10
ASSOCIATIVE = Reach(
    "three models of 40M to 80M parameters without embeddings, 214M to 309M tokens",
    {"body": (4e7, 8e7), "tokens": (2.14e8, 3.09e8)},
)


def associative_parameters(tokens: float) -> float:
    """Return the largest size, without embeddings, whose gap so many tokens keep small: N = 8.6e-10 D²."""
    return ASSOCIATIVE_FACTOR * tokens**2


# --- healing ------------------------------------------------------------------------------------------------------

# Tokens for each removed parameter of recipes that were published: Minitron (arXiv:2408.11796, table 1), 15B to 4.2B
# and 8.0B to 4.5B on 94B tokens, 12.2B to 8.4B on 380B. And of self-data distillation with LoRA (arXiv:2410.09982),
# 8.0B to 6.7B on 10M to 20M tokens, which repairs and does not train anew.
RETRAIN, REPAIR = (94 / 10.8, 380 / 3.8), (0.010 / 1.31, 0.020 / 1.31)
RETRAINED = Reach(
    "three cuts of 31 % to 72 % of 8B to 15B parameters", {"removed": (0.31, 0.72), "whole": (8e9, 1.5e10)}
)
REPAIRED = Reach("one cut of 16 % of 8B parameters, with LoRA", {"removed": (0.0, 0.2), "whole": (7e9, 9e9)})


# --- when a further epoch hurts -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Overfit:
    """L = floor + B / D^β + P R^δ (N / U)^κ, with N without embeddings, and a gap of G R^γ (N / U)^λ.

    The form is Lovelace et al. 2026 (arXiv:2605.01640), who add a penalty to Chinchilla's law; the gap, between
    held-out and trained text, is of the same form. What does not depend on the data does not move the minimum.
    """

    b: float
    beta: float
    penalty: float
    delta: float
    kappa: float
    gap_factor: float
    gamma: float
    gap_kappa: float
    reach: Reach

    def rise(self, body: float, unique: float, epochs: float) -> float:
        """Return the loss on held-out text after `epochs` passes, less what does not depend on the data."""
        again = max(0.0, epochs - 1)
        learnt = self.b * (unique * epochs) ** -self.beta
        return float(learnt + self.penalty * again**self.delta * (body / unique) ** self.kappa)

    def gap(self, body: float, unique: float, epochs: float) -> float:
        """Return by how much held-out text costs more than trained text after `epochs` passes, in nats."""
        again = max(0.0, epochs - 1)
        return float(self.gap_factor * again**self.gamma * (body / unique) ** self.gap_kappa)

    def turning(self, body: float, unique: float) -> float:
        """Return the epoch after which the loss on held-out text rises; infinity where that is beyond 10^5."""
        epochs = [1.0 * 10 ** (step / 100) for step in range(501)]
        losses = [self.rise(body, unique, epoch) for epoch in epochs]
        best = losses.index(min(losses))
        return math.inf if best == len(epochs) - 1 else epochs[best]

    def verdict(self, body: float, unique: float, epochs: float) -> Verdict:
        """Return what a run of so many epochs comes to.

        It memorises where the loss on held-out text ends more than GAP above its minimum, and does not where the gap
        between held-out and trained text stays below GAP.
        """
        best = min(epochs, self.turning(body, unique))
        if self.rise(body, unique, epochs) - self.rise(body, unique, best) > GAP:
            return "memorises"
        return "boundary" if self.gap(body, unique, epochs) > GAP else "does not memorise"


# Fitted to 17 toys by `python benchmarks/advise.py --fit ...`; docs/advise.md says how, and how well.
OVERFIT = Overfit(
    b=39.10,
    beta=0.2971,
    penalty=1.586e-3,
    delta=1.551,
    kappa=0.2061,
    gap_factor=0.02975,
    gamma=0.7445,
    gap_kappa=0.1350,
    reach=Reach(
        "17 llamas of bytes from scratch: 25k to 332k parameters without embeddings, 10k to 523k unique tokens",
        {"body": (2.46e4, 3.33e5), "unique": (1.0e4, 5.3e5)},
    ),
)


# --- in one line --------------------------------------------------------------------------------------------------

ASSUMED_LOSS = 3.0  # nats a token, where no model has read the text; prose costs a small model 2.5 to 3.5


def in_a_line(parameters: int, tokens: int, epochs: float) -> str:
    """Return the verdict on a run of so many trained parameters and epochs, and what to type for more.

    No model has read the text, and no duplicates are counted: the loss is ASSUMED_LOSS. Embeddings count as the body,
    which makes a difference inside the range of the law of over-fit alone: of toys.
    """
    slack = capacity_slack(parameters, data_bits(tokens, ASSUMED_LOSS))
    verdict = by_capacity(slack)
    if epochs <= 1 or OVERFIT.reach.holds(body=parameters, unique=tokens):
        verdict = min(verdict, OVERFIT.verdict(parameters, tokens, epochs), key=VERDICTS.index)
    can = "can memorise it" if verdict == "memorises" else verdict
    times = f"{slack:,.0f}" if slack >= 10 else f"{slack:.2g}"
    return (
        f"{epochs:.3g} epochs of {tokens:,} tokens, of which {parameters:,} trained parameters hold {times} times as "
        f"many (3.6 bits each, {ASSUMED_LOSS:g} nats a token): {can}; surgeon advise says more"
    )
