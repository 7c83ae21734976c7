"""What a model can do with a text, row by row: each figure, the law that it is from, and whether it holds here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from surgeon.cost import laws
from surgeon.cost.laws import GAP, OVERFIT, VERDICTS, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure of the advice: its `value`, None where there is none, and `shown`, that for people.

    `law` is where it is from, `range` where that was fitted, and `inside` whether this model and text lie there.
    `says` is what it comes to by itself, None where it says nothing about that.
    """

    quantity: str
    value: float | None
    shown: str
    law: str
    range: str
    inside: bool = True
    says: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a model and a text.

    `parameters` are all that learn, `body` those without embedding and head, `whole` all that there are. Of `tokens`
    so many are `unique`. `loss` is the model's own on the text before training, in nats a token, and `error` its
    standard error; `packed` what a compressor needs, which knows nothing of the text before. `near` is the share of
    pieces of text with an earlier near duplicate, `separation` the distance of states to their nearest neighbour over
    that of normal draws. `memorised` is by how much a token costs a reference model more, in nats, with its error.
    `cut` is the number of parameters that the model is to lose.
    """

    parameters: int
    body: int
    whole: int
    tokens: int
    unique: int
    loss: float
    epochs: float
    error: float | None = None
    packed: float = math.inf
    near: float | None = None
    separation: float | None = None
    memorised: tuple[float, float | None] | None = None
    cut: int | None = None

    @property
    def bits(self) -> float:
        """What the model does not predict of the unique tokens, in bits; of one that knows less than xz, what xz needs.

        An untrained model predicts nothing, and most of that it learns as language, and not by heart.
        """
        return laws.data_bits(self.unique, min(self.loss, self.packed))


@dataclass(frozen=True, slots=True)
class Advice:
    """The rows, the verdict, and in words how the rows agree."""

    verdict: Verdict
    rows: tuple[Row, ...]
    sentences: tuple[str, ...] = field(default=())


def advise(facts: Facts, measured: Sequence[Row] = ()) -> Advice:
    """Return the advice: what the model can hold, held against what the epochs of the plan lead to.

    The verdict is the lesser of two: whether the model can hold the text (capacity), and whether the plan shows it
    often enough. The second is said by a row of `measured` that says something, else by the law of over-fit; outside
    its range that counts only where no token is seen twice, and capacity decides.
    """
    can, law = capacity(facts), overfit(facts)
    rows = [*of_text(facts), can, *_held(facts), law, repetition(facts)]
    rows += [associative(facts), suitable(facts), *healing(facts), *measured]
    counts = law.inside or facts.epochs <= 1
    will = next((row for row in measured if row.says), law if counts else None)
    says = [row.says for row in (can, will) if row is not None and row.says is not None]
    verdict = min(says, key=VERDICTS.index)
    return Advice(verdict, tuple(rows), (*_because(verdict, can, will, facts), *_dissent(verdict, rows)))


# --- the rows -----------------------------------------------------------------------------------------------------


def of_text(facts: Facts) -> list[Row]:
    """Return what is counted and measured of the text: no law is in it."""
    share = 100 * (1 - facts.unique / max(1, facts.tokens))
    rows = [
        Row(
            quantity="tokens",
            value=facts.tokens,
            shown=f"{facts.tokens:,}",
            law="counted with the model's tokenizer",
            range="any text",
        ),
        Row(
            quantity="unique tokens",
            value=facts.unique,
            shown=f"{facts.unique:,}  ({share:.1f} % repeat an earlier run)",
            law="in no run of 13 tokens (50 characters) that occurred before; 64-bit rolling hash",
            range="any text",
        ),
    ]
    if facts.near is not None:
        rows.append(
            Row(
                quantity="near duplicates",
                value=facts.near,
                shown=f"{100 * facts.near:.1f} % of the pieces of text",
                law="MinHash of 64 over runs of 5 words, Jaccard index 0.7 or more (± 0.06)",
                range="pieces of 10 words or more",
            )
        )
    if facts.separation is not None:
        rows.append(
            Row(
                quantity="separation",
                value=facts.separation,
                shown=f"{facts.separation:.2f} of the distance of normal draws",
                law="distance of last states to the nearest one (arXiv:2405.08707), over that of normal draws",
                range="compared with other texts on this model only; 0 where a text repeats itself",
            )
        )
    error = "" if facts.error is None else f" ± {facts.error:.2g}"
    rows.append(
        Row(
            quantity="loss",
            value=facts.loss,
            shown=f"{facts.loss:.3f}{error} nats a token",
            law="the model's own, before training",
            range="the first rows of the text",
        )
    )
    by_model = facts.loss <= facts.packed
    rows.append(
        Row(
            quantity="bits",
            value=facts.bits,
            shown=f"{_count(facts.bits)}bit, {'not predicted by the model' if by_model else 'as xz packs the text'}",
            law="unique tokens times the lesser of the model's loss and xz's",
            range="any text",
        )
    )
    return rows


def capacity(facts: Facts) -> Row:
    """Return how many times the bits of the text fit into the parameters."""
    slack = laws.capacity_slack(facts.parameters, facts.bits)
    return Row(
        quantity="capacity",
        value=slack,
        shown=f"{_times(slack)} the text: {_count(laws.CAPACITY_BITS * facts.parameters)}bit",
        law="3.6 bits a parameter (arXiv:2505.24832): an upper bound",
        range=laws.CAPACITY.said,
        inside=laws.CAPACITY.holds(parameters=facts.parameters),
        says=laws.by_capacity(slack),
    )


def _held(facts: Facts) -> list[Row]:
    """Return the bits a parameter that the text would take, and those that it takes already."""
    needed = facts.bits / facts.parameters
    rows = [
        Row(
            quantity="bits needed",
            value=needed,
            shown=f"{needed:.3g} a parameter, of about {laws.CAPACITY_BITS}",
            law="loss of the unique tokens over the parameters",
            range=laws.CAPACITY.said,
            inside=laws.CAPACITY.holds(parameters=facts.parameters),
        )
    ]
    if facts.memorised is not None:
        less, error = facts.memorised
        each = laws.data_bits(facts.unique, less) / facts.whole
        said = "" if error is None else f" ± {laws.data_bits(facts.unique, error) / facts.whole:.2g}"
        rows.append(
            Row(
                quantity="bits used",
                value=each,
                shown=f"{each:.3g}{said} a parameter, of about {laws.CAPACITY_BITS}",
                law="the reference's loss less the model's (arXiv:2505.24832's estimator): at least so many",
                range="a reference that was not trained on the text",
            )
        )
    return rows


def overfit(facts: Facts) -> Row:
    """Return the epoch after which held-out text gets worse."""
    turning = OVERFIT.turning(facts.body, facts.unique)
    shown = "beyond 100,000" if math.isinf(turning) else f"{turning:.2g}"
    return Row(
        quantity="over-fit",
        value=None if math.isinf(turning) else turning,
        shown=f"after epoch {shown}, of {facts.epochs:g}",
        law="form of arXiv:2605.01640, constants of toys (benchmarks/advise.py)",
        range=OVERFIT.reach.said,
        inside=OVERFIT.reach.holds(body=facts.body, unique=facts.unique, parameters=facts.parameters),
        says=OVERFIT.verdict(facts.body, facts.unique, facts.epochs),
    )


def repetition(facts: Facts) -> Row:
    """Return as how many fresh tokens the epochs of the plan count."""
    seen = facts.unique * facts.epochs
    share = laws.worth(facts.unique, facts.epochs) / seen
    return Row(
        quantity="worth of the epochs",
        value=share,
        shown=f"{100 * share:.0f} % of as many fresh tokens",
        law="R* = 15.4 (arXiv:2305.16264); it never says that an epoch hurts",
        range=laws.REPETITION.said,
        inside=laws.REPETITION.holds(parameters=facts.whole, tokens=seen),
    )


def associative(facts: Facts) -> Row:
    """Return the largest size whose gap stays small on this text, by the law of the memory paper."""
    most = laws.associative_parameters(facts.unique)
    return Row(
        quantity="associative memory",
        value=most,
        shown=f"gap below {GAP} up to {_count(most)} parameters; here {_count(facts.body)}",
        law="N = 8.6e-10 D², without embeddings (arXiv:2405.08707): weak evidence",
        range=laws.ASSOCIATIVE.said,
        inside=laws.ASSOCIATIVE.holds(body=facts.body, tokens=facts.unique),
        says="does not memorise" if facts.body <= most else "memorises",
    )


def suitable(facts: Facts) -> Row:
    """Return the size that suits the text where a model is trained on it from scratch."""
    size = laws.optimal_parameters(facts.unique)
    return Row(
        quantity="size that suits",
        value=size,
        shown=f"{_count(size)} parameters from scratch; here {_count(facts.whole)}",
        law="compute-optimal (arXiv:2404.10102); a finetune starts from what others have paid for",
        range=laws.COMPUTE.said,
        inside=laws.COMPUTE.holds(parameters=size, tokens=facts.unique),
    )


def healing(facts: Facts) -> list[Row]:
    """Return how many tokens a cut takes to heal: repaired with adapters, and trained anew."""
    if facts.cut is None:
        return []
    removed = facts.cut / facts.whole
    rows = []
    for name, rates, reach, law in (
        ("to repair the cut", laws.REPAIR, laws.REPAIRED, "one recipe with LoRA (arXiv:2410.09982)"),
        ("to train the cut anew", laws.RETRAIN, laws.RETRAINED, "three published recipes (arXiv:2408.11796)"),
    ):
        low, high = (rate * facts.cut for rate in rates)
        rows.append(
            Row(
                quantity=name,
                value=math.sqrt(low * high),
                shown=f"{_count(low)} to {_count(high)} tokens; here {_count(facts.unique)}",
                law=f"{law}: {rates[0]:.3g} to {rates[1]:.3g} a removed parameter",
                range=reach.said,
                inside=reach.holds(removed=removed, whole=facts.whole),
            )
        )
    return rows


# --- words --------------------------------------------------------------------------------------------------------


def _because(verdict: Verdict, can: Row, will: Row | None, facts: Facts) -> list[str]:
    """Return what the verdict rests on."""
    if will is None:
        return ["That is what it can do: the law of over-fit is outside its range here, and --probe measures it."]
    if can.says == will.says:
        return [f"The rows {can.quantity} and {will.quantity} agree on it."]
    if verdict == will.says:
        return [f"It could come to more ({can.says}, by its capacity), but {facts.epochs:g} epochs do not go that far."]
    return [f"So many epochs would lead further ({will.says}), but the model cannot hold the text."]


def _dissent(verdict: Verdict, rows: Sequence[Row]) -> list[str]:
    """Return how many of the rows that say something agree with the verdict, and which do not."""
    saying = [row for row in rows if row.says]
    others = [
        f"{row.quantity} ({row.says}{'' if row.inside else ', outside its range'})"
        for row in saying
        if row.says != verdict
    ]
    agree = f"{len(saying) - len(others)} of {len(saying)} rows that say something agree"
    return [agree + (f"; not: {', '.join(others)}." if others else ".")]


def _count(number: float) -> str:
    """Return a number with a unit of thousands: "484 M", "1.2 k"."""
    if 0 < number < 1:
        return "less than 1"
    for unit in ("", " k", " M", " G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def _times(number: float) -> str:
    return f"{number:,.0f} x" if number >= 10 else f"{number:.2g} x"
