"""How far models are from the base that they are said to come from, and whether they moved the same way."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.checkpoint.source import Source, StoredTensor
from surgeon.errors import MeasureError
from surgeon.plan.arithmetic import TORCH_DTYPES

CHUNKS, CHUNK = 8, 4096  # places of a tensor that are looked at, and how many numbers at each
FAR = 0.1  # of the base's length: finetunes of 1 B models on 10 B tokens move by 1 to 5 %
UNRELATED = 0.5  # the cosine of a model and its base below which it is another model: of two that are, it is near 0


@dataclass(frozen=True)
class Differences:
    """The lengths of models' differences from their base, as parts of its length, and the cosines of each two.

    `alike` are the cosines of the models themselves with the base. All are of samples of every tensor.
    """

    labels: tuple[str, ...]
    lengths: tuple[float, ...]
    cosines: Mapping[tuple[int, int], float]
    alike: tuple[float, ...]

    def notes(self, base: str) -> list[str]:
        """Return what there is to tell of them: their numbers, and a warning where they look wrong."""
        told = ", ".join(f"{name} {100 * part:.3g} %" for name, part in zip(self.labels, self.lengths, strict=True))
        pairs = ", ".join(f"{self.labels[i]} and {self.labels[j]} {c:.3f}" for (i, j), c in self.cosines.items())
        found = [f"differences from {base}, as parts of its length: {told}" + (f"; cosines: {pairs}" if pairs else "")]
        for name, part in zip(self.labels, self.lengths, strict=True):
            if part > FAR:
                found.append(f"warning: {name} is far from {base}; was it finetuned from another model?")
            elif not part:
                found.append(f"warning: {name} does not differ from {base} where it was looked at")
        for (i, j), value in self.cosines.items():
            if value < 0:
                found.append(f"warning: the differences of {self.labels[i]} and {self.labels[j]} point apart")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return them for JSON."""
        pairs = [{"models": [self.labels[i], self.labels[j]], "cosine": c} for (i, j), c in self.cosines.items()]
        return {"lengths": dict(zip(self.labels, self.lengths, strict=True)), "cosines": pairs}


def differences(source: Source, models: Mapping[str, Sequence[str]], base: tuple[str, Sequence[str]]) -> Differences:
    """Return the differences of models, each a name and the names of its tensors in `source`, from their base.

    The tensors stand in one order in all of them. Raises MeasureError for a model that is none of the base's.
    """
    label, origins = base
    count = len(models)
    gram = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    for names in zip(origins, *models.values(), strict=True):
        numbers = torch.stack([_sample(source, source.tensors[name]) for name in names])
        numbers[1:] -= numbers[0].clone()
        gram += numbers @ numbers.T
    norms = gram.diagonal().sqrt().tolist()
    labels = tuple(models)
    alike = []
    for number, name in enumerate(labels, start=1):
        whole = math.sqrt(max(0.0, float(gram[0, 0] + 2 * gram[0, number] + gram[number, number])))
        product = norms[0] * whole
        alike.append(float(gram[0, 0] + gram[0, number]) / product if product else 0.0)
        if product and alike[-1] < UNRELATED:
            raise MeasureError(
                f"{label} is not the base of {name}: their weights have a cosine of {alike[-1]:.3f}, and a difference "
                f"of {100 * norms[number] / norms[0]:.0f} % of its length",
                hint="Name the model that all were finetuned from; without one there is --method linear.",
            )
    cosines = {
        (i, j): float(gram[i + 1, j + 1]) / (norms[i + 1] * norms[j + 1]) if norms[i + 1] * norms[j + 1] else 0.0
        for i, j in itertools.combinations(range(count), 2)
    }
    lengths = tuple(norm / norms[0] if norms[0] else 0.0 for norm in norms[1:])
    return Differences(labels, lengths, cosines, tuple(alike))


def _sample(source: Source, stored: StoredTensor) -> torch.Tensor:
    """Return numbers of a tensor from places at equal distances, in float64; all of a small one."""
    dtype = TORCH_DTYPES[stored.spec.dtype]
    total = math.prod(stored.spec.shape)
    starts = [0] if total <= CHUNKS * CHUNK else [(total - CHUNK) * k // (CHUNKS - 1) for k in range(CHUNKS)]
    size = total if total <= CHUNKS * CHUNK else CHUNK
    spans = [(stored.start + at * dtype.itemsize, stored.start + (at + size) * dtype.itemsize) for at in starts]
    part = source.parts({stored.file: spans})[stored.file]
    data = torch.empty(len(spans), size * dtype.itemsize, dtype=torch.uint8)
    with part.opened() as file:
        for row, (start, _) in zip(data, spans, strict=True):
            file.read_into(row.numpy().data, start)
    return data.view(dtype).flatten().to(torch.float64)
