"""The memorisation guard: says when a model begins to learn its training text by heart instead of learning from it.

It compares two losses at each evaluation: of held-out rows, and of a fixed sample of trained rows (the probe). The view
behind it is Niu et al. 2024 (arXiv:2405.08707), where a trained model stores its samples as an associative memory does:
once it can hold them all, the training loss falls to nothing while the validation loss stays, or rises.
"""

from collections.abc import Iterable, Mapping
from typing import Any

GAP = 0.2  # nats; the paper calls a set large enough where (train - validation)² stays below 0.04 at the best step
RISES = 3  # in a row; one or two are what small validation sets do by chance
# Below half the validation loss the trained text is known, not guessed: a small model on 300 lines of question
# formation had 0.30 against 1.98 nats after 600 steps, on lines enough 0.997 against 0.993. A share, and not so many
# nats, because what 0.5 nats mean depends on the text; and only with the gap, because near 0 a share is all noise.
COLLAPSE = 0.5


class Guard:
    """Judges the evaluations of one run, told in order. Each warning comes once."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None  # probe and validation at the start
        self._best: tuple[float, int] | None = None  # the lowest validation loss, and its step
        self._last: float | None = None
        self._rises = 0
        self._warned: set[str] = set()

    @classmethod
    def resumed(cls, records: Iterable[Mapping[str, Any]]) -> "Guard":
        """Return a guard that has seen the evaluations in the records of metrics.jsonl, and warned of them."""
        guard = cls()
        for record in records:
            if "eval_loss" in record:
                guard.observe(record["step"], record.get("probe_loss"), record["eval_loss"])
        return guard

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss so far."""
        return None if self._best is None else self._best[1]

    def observe(self, step: int, probe: float | None, validation: float | None) -> list[str]:
        """Return the warnings that an evaluation gives rise to, a sentence each; the losses are in nats a token."""
        warnings: dict[str, str] = {}
        if validation is not None:
            if self._best is None or validation < self._best[0]:
                self._best = validation, step
            self._rises = self._rises + 1 if self._last is not None and validation > self._last else 0
            self._last = validation
            if self._rises >= RISES:
                warnings["rising"] = self._rising(step, validation)
            if probe is not None:
                warnings |= self._compare(step, probe, validation)
        new = {kind: text for kind, text in warnings.items() if kind not in self._warned}
        self._warned |= set(new)
        return list(new.values())

    def _rising(self, step: int, validation: float) -> str:
        assert self._best is not None
        return (
            f"validation loss has risen {self._rises} times in a row, to {validation:.3f} at step {step}; "
            f"the best was {self._best[0]:.3f} at step {self._best[1]}"
        )

    def _compare(self, step: int, probe: float, validation: float) -> dict[str, str]:
        """Return warnings from both losses, against what they were at the start: either text may be the easier one.

        Held-out text must have come to cost more both beside the gap of the start and beside its ratio: where both
        losses fall to a half, as they do while a model learns a new form, a gap halves too, and nothing is memorised.
        """
        if self._first is None:
            self._first = probe, validation
        gap = validation - probe
        grown = gap - (self._first[1] - self._first[0])
        if self._first[0] > 0:
            grown = min(grown, validation - probe * self._first[1] / self._first[0])
        if grown <= GAP:
            return {}
        warnings = {
            "gap": f"at step {step} held-out text costs {validation:.3f} nats, trained text {probe:.3f}: "
            f"{grown:.2f} more than at the start; the model begins to memorise"
        }
        usual = min(1.0, self._first[0] / self._first[1]) if self._first[1] > 0 else 1.0
        if probe < COLLAPSE * usual * validation:
            assert self._best is not None
            warnings["collapse"] = (
                f"the loss on trained text has fallen to {probe:.3f} at step {step}, that on held-out text is "
                f"{validation:.3f}: stop, the best step was {self._best[1]} ({self._best[0]:.3f})"
            )
        return warnings
