"""A quantized result loaded as users load it, beside the same model quantized in memory: equal logits, bit for bit.

In memory the library quantizes whole modules of transformers, with no file in between. So a difference is something
that was lost on the way to the disk and back: a weight that the loader draws at random, or reads in another form.
"""

import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import PlanError, VerificationError
from surgeon.measure.reload import LOAD_HINT, check_whole, loaded, logits_of, tokens
from surgeon.models.loading import libraries_fail, quiet_transformers
from surgeon.plan.quantizing import quiet_import, unpacked_by_library
from surgeon.plan.schemes import TORCHAO, Scheme


@dataclass(frozen=True)
class Proof:
    """How far the logits of a quantized model are from its source's: the largest change, and their deviation.

    Both are over all positions of random tokens. The written model's logits are those of the model in memory.
    """

    difference: float
    deviation: float
    tokens: int

    def rows(self) -> list[tuple[str, str]]:
        """Return this for people, as rows of a name and a text."""
        share = f"max |Δlogits| from the source {self.difference:.2g}, of a standard deviation of {self.deviation:.3g}"
        return [("verified", f"reloads to the logits of the model that was quantized, bit for bit; {share}")]

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {
            "verdict": "exact",
            "max_abs_logit_difference_from_source": self.difference,
            "logit_deviation": self.deviation,
            "tokens": self.tokens,
        }


@dataclass(frozen=True, eq=False)
class Expected:
    """What a model gives before and after its modules are quantized in memory, on random tokens."""

    ids: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, source: tuple[str, str | None], modules: Collection[str], scheme: Scheme) -> "Expected":
        """Return this of a source, which is loaded by its name and revision, with these linear modules quantized.

        Raises PlanError for a model whose code the library's weights do not run in.
        """
        with _running(source[0]), torch.no_grad():
            ids = tokens([source], seed=0)
            model, _ = loaded(*source, source[0], dtype="auto")
            before = logits_of(model, ids)
            _quantize(model, modules, scheme)
            return cls(ids, before, logits_of(model, ids))

    def check(self, made: Path, label: str) -> Proof:
        """Return how far the quantized model in `made` is from its source.

        Raises VerificationError where it does not load whole, or computes anything else than the model in memory.
        """
        with _running(label), torch.no_grad():
            written, report = loaded(str(made), None, label, dtype="auto")
            check_whole(report, label)
            found = logits_of(written, self.ids)
        if not torch.equal(found, self.after):
            worst = float((found - self.after).abs().max())
            raise VerificationError(
                f"{label} does not reload to what was quantized: max |Δlogits| is {worst:.2g}, and must be 0",
                hint=LOAD_HINT,
            )
        return Proof(float((found - self.before).abs().max()), float(self.before.std()), self.ids.numel())


@contextmanager
def _running(label: str) -> Iterator[None]:
    """Return a context in which a library's error becomes a VerificationError, and its bars are not shown."""
    fails = libraries_fail(f"{label} cannot be run quantized", hint=LOAD_HINT, error_type=VerificationError)
    with fails, quiet_transformers(), quiet_import(), redirect_stderr(io.StringIO()):  # no setting hides those bars
        yield


def _quantize(model: nn.Module, modules: Collection[str], scheme: Scheme) -> None:
    """Quantize modules in place, by the library. Raises VerificationError for one that it would pass over."""
    known = dict(model.named_modules())
    for name in modules:
        module = known.get(name)
        if type(module) is not nn.Linear:  # a subclass multiplies in a way of its own, by which codes are not known
            what = "nothing" if module is None else type(module).__name__
            message = f"transformers has {what} as {name}, which {scheme.method} does not take for a linear module"
            raise PlanError(message, hint="This type of model cannot be quantized by it.")
    if scheme.method == TORCHAO:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        chosen = set(modules)
        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), lambda module, name: name in chosen)
        return
    for name in modules:
        weight: Any = known[name].weight
        weight.data = unpacked_by_library(weight.data, scheme)
