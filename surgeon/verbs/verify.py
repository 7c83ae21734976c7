"""Load what was written, compare its logits with the source's, and see whether what was added can learn.

Both folders are loaded as anyone would load them, one after the other, and given the same tokens.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.receipt import read_receipt
from surgeon.checkpoint.source import LocalSource, open_directory, spec_of
from surgeon.errors import CheckpointError, VerificationError
from surgeon.measure.reload import result_logits, source_logits, tokens
from surgeon.measure.trainability import Trainability, trainability
from surgeon.models.loading import quiet_transformers
from surgeon.options import verb_named
from surgeon.plan.plan import STORED_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

# The project's acceptance criterion in float32, as a share of the largest logit. Measured: rounding of float32 leaves
# at most 1e-5 of it, on toys of all families and on SmolLM2; a wrong factor or a lost tensor 1e-2 and more.
TOLERANCE = 1e-4
# How much more 16 bits may cost a grown model than they cost its source (reload.rounding). Measured: 0.2 to 2.1 times
# as much, on 11 families, two seeds, sources in float32 and bfloat16, factors 1.5, 2 and 3, noise 0 and 0.5.
SLACK = 6.0
USUAL_NOISE = 0.5  # the difference grows with the square of the noise: copies are told apart where they are written,
# by the rounding of their noise, and that is multiplied by the noise of what reads them. Measured at noise 2: up to 16.


@dataclass(frozen=True)
class Verification:
    """What a result computes beside its source.

    `difference` is the largest |Δ logit| and `largest` the largest |logit| of the source, over all positions of
    random tokens. `verdict` is "exact" where the plan keeps the function and the difference is at most `allowed`,
    which then is 1e-4 of `largest`; "rounded" where it is more, the result is stored in 16 bits (`rounded_by`), and
    it is within a few times of what rounding to these 16 bits does to the source itself (measured);
    "approximate" where the plan says that it is, and `reason` is what it says.
    """

    verdict: Literal["exact", "rounded", "approximate"]
    difference: float
    largest: float
    allowed: float | None
    rounded_by: str | None
    reason: str | None
    tokens: int
    trainability: Trainability
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {
            "verdict": self.verdict,
            "rounded_by": self.rounded_by,
            "max_abs_logit_difference": self.difference,
            "max_abs_logit": self.largest,
            "allowed": self.allowed,
            "reason": self.reason,
            "tokens": self.tokens,
            "trainability": self.trainability.to_dict(),
            "seconds": round(self.seconds, 3),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return this for people, a line each."""
        by = f" by {self.rounded_by}" if self.rounded_by else ""
        because = f" ({self.reason})" if self.reason else ""
        found = f"{self.verdict}{by}: max |Δlogits| {self.difference:.2g} of {self.largest:.3g}{because}"
        return [("verified", found), *self.trainability.rows()]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.rows())


def verify(
    source: str | PathLike[str],
    result: str | PathLike[str],
    *,
    revision: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Verification:
    """Return how the checkpoint in the directory `result` compares with the one it was made from.

    `source` is a directory or a Hub id (`revision`: its commit). What was done is read from the receipt in `result`.
    Both are loaded in float32, one after the other, and compared on 96 random tokens drawn with `seed`.

    Raises VerificationError when one cannot be loaded whole, or when the result differs from the source by more than
    the plan and the stored dtype explain. Nothing is written or removed.
    """
    began = time.perf_counter()
    written = open_directory(Path(result))
    receipt = read_receipt(written.directory)
    if receipt is None:
        raise CheckpointError(f"{result} has no receipt of what was done", hint="Verify what surgeon wrote.")
    dtype = _narrow_dtype(written)
    reason = _reason(receipt)
    with quiet_transformers():
        ids = tokens([(fspath(source), revision), (fspath(result), None)], seed).to(device)
        logits, rounding = source_logits(fspath(source), revision, ids, dtype=None if reason else dtype)
        grown, gradients = result_logits(written, ids)
    axes = {axis: _index(runs) for axis, runs in receipt.get("axis_maps", {}).items()}
    if logits.shape != grown.shape:
        grown = _narrowed(grown, logits, axes.get("hidden", ()))
    difference, largest = (logits - grown).abs().max().item(), logits.abs().max().item()
    rounding *= SLACK * max(1.0, (_noise(receipt) / USUAL_NOISE) ** 2)
    verdict, allowed = _verdict(written.label, difference, largest, dtype, rounding, reason)
    health = trainability(
        written,
        read_anatomy(spec_of(written)),
        gradients,
        axes=axes,
        layer_map=receipt["layer_map"],
        noise=_noise(receipt),
    )
    rounded_by = dtype if verdict == "rounded" else None
    seconds = time.perf_counter() - began
    return Verification(verdict, difference, largest, allowed, rounded_by, reason, ids.numel(), health, seconds)


def _narrowed(grown: "Tensor", states: "Tensor", index: tuple[int, ...]) -> "Tensor":
    """Return the hidden states of a wider model without a head as its source has them: the same up to one factor."""
    width = states.shape[-1]
    if len(index) != grown.shape[-1] or not set(range(width)) <= set(index):
        raise VerificationError(
            f"the result puts out {grown.shape[-1]} numbers a token, its source {width}",
            hint="Use --no-verify: only outputs of the same kind can be compared.",
        )
    mine = grown[..., [index.index(i) for i in range(width)]]
    return mine * ((mine * states).sum() / mine.square().sum())


def _verdict(
    name: str, difference: float, largest: float, dtype: str | None, rounding: float, reason: str | None
) -> tuple[Literal["exact", "rounded", "approximate"], float | None]:
    """Return the verdict and the difference that it allows. Raises VerificationError for more than that."""
    if reason is not None and math.isfinite(difference):
        return "approximate", None
    exact = TOLERANCE * largest
    if difference <= exact:
        return "exact", exact
    allowed = max(exact, min(rounding, largest))  # no rounding explains as much as the logits themselves
    if dtype is not None and difference <= allowed:
        return "rounded", allowed
    explains = f"rounding to {dtype} explains" if dtype else "float32 explains"
    raise VerificationError(
        f"{name} does not compute what its source computes: max |Δlogits| is {difference:.2g} of {largest:.3g}, "
        f"and {explains} {allowed:.2g}",
        hint=f"Do not use {name}, which is left for you to look at. "
        + (
            "Grow it again with --dtype float32: that leaves no rounding." if dtype else "Grow it again elsewhere (-o)."
        ),
    )


def _reason(receipt: Mapping[str, Any]) -> str | None:
    """Return why a result need not compute what its source computes, None where it has to."""
    verbs = [verb for step in receipt["steps"] for verb in step if not verb_named(verb).keeps_function]
    reasons = [*receipt.get("approximate", ()), *(f"{verb} changes the function" for verb in verbs)]
    return reasons[0] if reasons else None


def _noise(receipt: Mapping[str, Any]) -> float:
    """Return how much noise was put beside copies, relative to the weights."""
    options = [asked for step in receipt["steps"] for asked in step.values()]
    return max((float(asked["noise"]) for asked in options if "noise" in asked), default=0.0)


def _narrow_dtype(written: LocalSource) -> str | None:
    """Return the 16-bit dtype in which most of a checkpoint is stored, None where there is none."""
    narrow = {code: word for word, code in STORED_DTYPES.items() if word != "float32"}
    sizes: dict[str, int] = {}
    for tensor in written.tensors.values():
        if word := narrow.get(tensor.spec.dtype):
            sizes[word] = sizes.get(word, 0) + tensor.spec.nbytes
    return max(sizes, key=lambda word: sizes[word], default=None)


def _index(runs: list[list[int]]) -> tuple[int, ...]:
    """Return the map of an axis from the runs of a receipt."""
    return tuple(-1 if first < 0 else first + k for first, count in runs for k in range(count))
