"""The verb `verify`: compare a result's logits with its source's, and check that its new weights can learn.

Both are loaded with transformers, as users load them, one after the other, and run on the same tokens.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.receipt import read_receipt
from surgeon.checkpoint.source import LocalSource, open_directory, spec_of
from surgeon.errors import CheckpointError, VerificationError
from surgeon.measure.reload import result_logits, source_logits, tokens
from surgeon.measure.trainability import Trainability, trainability
from surgeon.models.loading import libraries_fail, quiet_transformers
from surgeon.options import verb_named
from surgeon.plan.plan import STORED_DTYPES
from surgeon.progress import stage
from surgeon.showing import Shown

if TYPE_CHECKING:
    from torch import Tensor

# The project's acceptance criterion in float32, as a share of the largest logit. Measured: rounding of float32 leaves
# at most 1e-5 of it, on toys of all families and on SmolLM2; a wrong factor or a lost tensor 1e-2 and more.
TOLERANCE = 1e-4
HOW = "--no-verify writes a result without this check, to look at it."
# The allowed effect of 16-bit rounding on a grown model, relative to its effect on the source (reload.rounding).
# Measured: 0.2 to 2.1, on 11 families, two seeds, sources in float32 and bfloat16, factors 1.5, 2 and 3, noise 0 and
# 0.5.
SLACK = 6.0
# The difference grows with the square of the noise: the rounding of the noise in the weights that write a copy is
# multiplied by the noise in the weights that read it. Measured at noise 2: up to 16.
USUAL_NOISE = 0.5


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """The comparison of a result with its source.

    `difference` is the largest |Δ logit| and `largest` the largest |logit| of the source, over all positions of random
    tokens. `verdict` is "exact" where the plan keeps the function and the difference is at most `allowed`, then 1e-4 of
    `largest`. It is "rounded" where the difference is larger, the result is stored in 16 bits (`rounded_by`), and the
    difference is within a few times the measured effect of that rounding on the source. It is "approximate" where the
    plan gives a `reason`.

        surgeon.grow("gpt2", layers=16).save("gpt2-16")
        verification = surgeon.verify("gpt2", "gpt2-16")
        print(verification.verdict, verification.difference)
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
        """Return this for people, as rows of a name and a text."""
        by = f" by {self.rounded_by}" if self.rounded_by else ""
        because = f" ({self.reason})" if self.reason else ""
        verdict = f"{self.verdict}{by}: max |Δlogits| {self.difference:.2g} of {self.largest:.3g}{because}"
        return [("verified", verdict), *self.trainability.rows()]

    @property
    def headline(self) -> str:
        """The verdict, and the largest difference."""
        return self.rows()[0][1]

    def to_text(self) -> str:
        """Return this for people."""
        return text.rows(self.rows())


def verify(
    source: str | PathLike[str],
    result: str | PathLike[str],
    *,
    revision: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Verification:
    """Return the comparison of the checkpoint in the directory `result` with its source.

    `source` is a directory or a Hub id (`revision`: its commit). The surgery is read from the receipt in `result`.
    Both are loaded in float32, one after the other, and compared on 96 random tokens drawn with `seed`.

    Raises VerificationError when one cannot be loaded completely, or when the result differs from the source by more
    than the plan and the stored dtype explain. Nothing is written or removed.

        surgeon.grow("gpt2", hidden_size="2x").save("gpt2-wide")
        print(surgeon.verify("gpt2", "gpt2-wide"))
    """
    return verify_as(fspath(result), fspath(source), Path(result), revision=revision, device=device, seed=seed)


def verify_as(
    label: str, source: str, result: Path, *, revision: str | None = None, device: str = "cpu", seed: int = 0
) -> Verification:
    """Return what `verify` returns of a `result` that messages call `label`: it may still have another name."""
    with (
        stage("comparing with the source"),
        libraries_fail(f"{label} cannot be compared with its source", hint=HOW, error_type=VerificationError),
    ):
        return _compared(label, source, result, revision=revision, device=device, seed=seed)


def _compared(label: str, source: str, result: Path, *, revision: str | None, device: str, seed: int) -> Verification:
    began = time.perf_counter()
    written = open_directory(result, label=label)
    receipt = read_receipt(written.directory)
    if receipt is None:
        raise CheckpointError(f"{label} has no receipt of a surgery", hint="Verify a checkpoint that surgeon wrote.")
    dtype = _narrow_dtype(written)
    reason = _reason(receipt)
    with quiet_transformers():
        ids = tokens([(source, revision), (fspath(result), None)], seed).to(device)
        logits, rounding = source_logits(source, revision, ids, dtype=None if reason else dtype)
        result_values, gradients = result_logits(written, ids)
    axes = {axis: _index(runs) for axis, runs in receipt.get("axis_maps", {}).items()}
    if logits.shape != result_values.shape:
        result_values = _narrowed(result_values, logits, axes.get("hidden", ()))
    difference, largest = (logits - result_values).abs().max().item(), logits.abs().max().item()
    rounding *= SLACK * max(1.0, (_noise(receipt) / USUAL_NOISE) ** 2)
    verdict, allowed = _verdict(written.label, difference, largest, dtype, rounding, reason)
    learning = trainability(
        written,
        read_anatomy(spec_of(written)),
        gradients,
        axes=axes,
        layer_map=receipt.get("layer_map", []),
        noise=_noise(receipt),
    )
    rounded_by = dtype if verdict == "rounded" else None
    seconds = time.perf_counter() - began
    return Verification(verdict, difference, largest, allowed, rounded_by, reason, ids.numel(), learning, seconds)


def _narrowed(wider: "Tensor", states: "Tensor", index: tuple[int, ...]) -> "Tensor":
    """Return the hidden states of a wider model without a head at the positions of its source, up to one factor."""
    width = states.shape[-1]
    if len(index) != wider.shape[-1] or not set(range(width)) <= set(index):
        raise VerificationError(
            f"the result has {wider.shape[-1]} outputs per token, its source {width}",
            hint="Use --no-verify: only outputs of the same kind can be compared.",
        )
    narrow = wider[..., [index.index(i) for i in range(width)]]
    return narrow * ((narrow * states).sum() / narrow.square().sum())


def _verdict(
    name: str, difference: float, largest: float, dtype: str | None, rounding: float, reason: str | None
) -> tuple[Literal["exact", "rounded", "approximate"], float | None]:
    """Return the verdict and the allowed difference. Raises VerificationError for a larger one."""
    if reason is not None and math.isfinite(difference):
        return "approximate", None
    exact = TOLERANCE * largest
    if difference <= exact:
        return "exact", exact
    allowed = max(exact, min(rounding, largest))  # rounding cannot change a logit by more than its size
    if dtype is not None and difference <= allowed:
        return "rounded", allowed
    explains = f"rounding to {dtype} explains" if dtype else "float32 explains"
    raise VerificationError(
        f"{name} does not compute what its source computes: max |Δlogits| is {difference:.2g} of {largest:.3g}, "
        f"and {explains} {allowed:.2g}",
        hint=f"Do not use it. {'With --dtype float32 there is no rounding.' if dtype else HOW}",
    )


def _reason(receipt: Mapping[str, Any]) -> str | None:
    """Return why a result may differ from its source, None where it must not."""
    verbs = [verb for step in receipt.get("steps", []) for verb in step if not verb_named(verb).keeps_function]
    reasons = [*receipt.get("approximate", ()), *(f"{verb} changes the function" for verb in verbs)]
    return reasons[0] if reasons else None


def _noise(receipt: Mapping[str, Any]) -> float:
    """Return the noise that was added to copies, relative to the weights."""
    noises = [values.get("noise") for step in receipt.get("steps", []) for values in step.values()]
    return max((float(noise) for noise in noises if isinstance(noise, int | float)), default=0.0)


def _narrow_dtype(written: LocalSource) -> str | None:
    """Return the 16-bit dtype of most of a checkpoint's bytes, None where none has 16 bits."""
    narrow = {code: word for word, code in STORED_DTYPES.items() if word != "float32"}
    sizes: dict[str, int] = {}
    for tensor in written.tensors.values():
        if word := narrow.get(tensor.spec.dtype):
            sizes[word] = sizes.get(word, 0) + tensor.spec.nbytes
    return max(sizes, key=lambda word: sizes[word], default=None)


def _index(runs: list[list[int]]) -> tuple[int, ...]:
    """Return the map of an axis from the runs of a receipt."""
    return tuple(-1 if first < 0 else first + k for first, count in runs for k in range(count))
