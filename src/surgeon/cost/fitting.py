"""The batches of a step that fit a device: how its rows are split, and whether activations are computed twice."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.cost.memory import Workload, lora_parameters, memory
from surgeon.errors import TrainingError
from surgeon.text import size

SHARE = 0.85  # of the free memory, that a run may take: the estimate leaves out masks, rotations, an allocator's waste
SHORTEST = 128  # tokens of a row that are still proposed


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a device computes its rows of a step: `gradient_accumulation` batches of `batch_size` rows each.

    `needed` are the bytes that this takes by the estimate, and `free` those that the device had, None where nobody
    knows them.
    """

    batch_size: int
    gradient_accumulation: int
    activation_checkpointing: bool
    needed: int | None = None
    free: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the estimate leaves room, or nothing is known of the memory."""
        return self.needed is None or self.free is None or self.needed <= SHARE * self.free

    def settings(self) -> dict[str, Any]:
        """Return the settings that it stands for."""
        names = ("batch_size", "gradient_accumulation", "activation_checkpointing")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        rows = self.batch_size * self.gradient_accumulation
        words = f"{rows} sequences a step on each device"
        if self.gradient_accumulation > 1:
            words += f", {self.gradient_accumulation} batches of {self.batch_size}"
        words += ", activations computed twice" if self.activation_checkpointing else ""
        if self.needed is None or self.free is None:
            return words
        return f"{words}: about {size(self.needed)} of {size(self.free)} that are free"


def split(
    anatomy: Anatomy, work: Workload, *, free: int | None, splits: bool, checkpointing: bool | None, can_recompute: bool
) -> Split:
    """Return the first way to compute the rows of a step that fits, or the one that takes the least memory.

    `work` has the rows as they are asked for, `batch_size` x `gradient_accumulation`. They are split only where
    `splits`; the largest batch goes first. Activations are computed twice as `checkpointing` says, with None where
    nothing else fits and the model `can_recompute`. So the choice depends on the estimate and on `free` alone.
    """
    rows = work.batch_size * work.gradient_accumulation
    sizes = [count for count in range(rows, 0, -1) if rows % count == 0] if splits else [work.batch_size]
    again = (False, True) if checkpointing is None and can_recompute else (bool(checkpointing),)
    ways = [_way(anatomy, work, rows, count, twice, free) for twice in again for count in sizes]
    return next((way for way in ways if way.fits), min(ways, key=lambda way: way.needed or 0))


def _way(anatomy: Anatomy, work: Workload, rows: int, count: int, twice: bool, free: int | None) -> Split:
    shape: dict[str, Any] = {
        "batch_size": count,
        "gradient_accumulation": rows // count,
        "activation_checkpointing": twice,
    }
    needed = None if free is None else _peak(anatomy, replace(work, **shape))
    return Split(**shape, needed=needed, free=free)


def too_large(anatomy: Anatomy, work: Workload, found: Split, *, label: str, device: str) -> TrainingError:
    """Return the error of a run that fits in no way, which says what would fit."""
    assert found.needed is not None
    assert found.free is not None
    twice = " and activations computed twice" if found.activation_checkpointing else ""
    known = ", ".join(f"{words} (about {size(needed)})" for words, needed in _smaller(anatomy, work, found))
    hint = f"These fit: {known}." if known else "Take a smaller model."
    return TrainingError(
        f"training {label} takes about {size(found.needed)} in batches of {found.batch_size} x {work.row_tokens:,} "
        f"tokens{twice}, and {size(found.free)} are free on {device}",
        hint=f"{hint} --batch-size 1 tries it anyway.",
    )


def _smaller(anatomy: Anatomy, work: Workload, found: Split) -> Iterator[tuple[str, int]]:
    """Yield options with which the run would fit, and the bytes that they take."""
    assert found.free is not None
    work = replace(work, **found.settings())
    length = work.row_tokens
    tried: list[tuple[str, Workload]] = []
    while (length := length // 2) >= SHORTEST:
        tried.append((f"--sequence-length {length}", replace(work, row_tokens=length)))
    tried = [next(((words, less) for words, less in tried if _fits(anatomy, less, found.free)), ("", work))]
    if not work.lora:
        tried.append(("--lora 16", replace(work, lora=16, trained=None)))
    if work.precision != "pure-bf16":
        tried.append(("--precision pure-bf16", replace(work, precision="pure-bf16")))
        small = replace(work, precision="pure-bf16", optim="adafactor")
        tried.append(("--precision pure-bf16 --optim adafactor", small))
    for words, less in tried:
        if words and _fits(anatomy, less, found.free):
            yield words, _peak(anatomy, less)


def _fits(anatomy: Anatomy, work: Workload, free: int) -> bool:
    return _peak(anatomy, work) <= SHARE * free


def _peak(anatomy: Anatomy, work: Workload) -> int:
    """Return the most bytes at once by the estimate."""
    adapters = lora_parameters(anatomy, work.lora) if work.lora else 0
    trained = adapters or (anatomy.spec.num_parameters if work.trained is None else work.trained)
    return memory(anatomy, work, trained=trained, adapters=adapters).peak
