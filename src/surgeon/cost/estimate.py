"""The cost of a run before it begins: tokens, memory by use, and time. From headers, without a model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgeon import text
from surgeon.anatomy.anatomy import Anatomy
from surgeon.cost.fitting import Split
from surgeon.cost.flops import attention_flops, flops_per_token, multiplied_parameters
from surgeon.cost.memory import Memory, Precision, Workload, lora_parameters, memory
from surgeon.showing import Shown
from surgeon.text import duration

# Training reaches about this share of the speed of one large product of matrices; norms, softmax, small matrices and
# the optimizer take the rest. SmolLM2-135M on one CPU core: 0.42 to 0.76. An assumption; a run's own meter measures it.
EFFICIENCY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunEstimate(Shown):
    """The cost of a run. `seconds` is None where no device was measured."""

    steps: int
    tokens: int
    parameters: int
    trained_parameters: int
    memory: Memory
    flops: float
    seconds: float | None
    notes: tuple[str, ...] = ()
    split: Split | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as `--json` prints it."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "memory": self.memory.to_dict(),
            "flops": self.flops,
            "seconds": self.seconds,
            **({} if self.split is None else {**self.split.settings(), "free": self.split.free}),
            "notes": list(self.notes),
        }

    @property
    def headline(self) -> str:
        """The steps, the memory and the time."""
        memory = text.size(self.memory.peak)
        time_left = "" if self.seconds is None else f", about {duration(self.seconds)}"
        return f"{self.steps:,} steps, {self.tokens:,} tokens, {memory} on each device{time_left}"

    def to_text(self) -> str:
        """Return the estimate for people."""
        parts = self.memory.to_dict()
        lines = [
            ("steps", f"{self.steps:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("trained", f"{self.trained_parameters:,} of {self.parameters:,} parameters"),
            *([] if self.split is None else [("batches", str(self.split))]),
            ("memory", f"about {text.size(parts.pop('peak'))} on each device"),
        ]
        lines += [(f"  {name}", text.size(nbytes)) for name, nbytes in parts.items() if nbytes]
        lines += [("operations", f"{self.flops:.3g}")]
        if self.seconds is not None:
            lines += [("time", f"about {duration(self.seconds)}")]
        return text.rows([*lines, *(("note", note) for note in self.notes)])


def estimate(anatomy: Anatomy, work: Workload, *, throughput: float | None = None) -> RunEstimate:
    """Return the cost of training a model; `throughput` is one device's speed in products (`matmul_throughput`)."""
    total = anatomy.spec.num_parameters
    adapters = lora_parameters(anatomy, work.lora) if work.lora else 0
    trained = adapters or (total if work.trained is None else work.trained)
    flops = work.tokens * _flops(anatomy, work, trained / (total + adapters))
    notes = []
    seconds = None
    if throughput is not None:
        seconds = flops / (throughput * work.processes * EFFICIENCY)
        speed = f"{throughput / 1e12:.3g} T/s in products of matrices, measured"
        notes = [f"time: {speed}, of which training is assumed to reach {EFFICIENCY:.0%}; evaluations are not in it"]
    if anatomy.whole_family is None:
        notes += [f"a {anatomy.model_type} has no table of its tensors: activations are guessed as those of a Llama"]
    return RunEstimate(
        steps=work.steps,
        tokens=work.tokens,
        parameters=total,
        trained_parameters=trained,
        memory=memory(anatomy, work, trained=trained, adapters=adapters),
        flops=flops,
        seconds=seconds,
        notes=tuple(notes),
    )


def matmul_throughput(device: str, precision: Precision, *, seconds: float = 0.5) -> float:
    """Return how many operations a second a device reaches in products of square matrices, tried for `seconds`."""
    import torch

    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    size = 1024 if device == "cpu" else 8192
    left = torch.randn(size, size, dtype=dtype, device=device)  # of equal numbers a GPU is faster
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = float("inf")
    left @ left
    wait()
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        left @ left
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _flops(anatomy: Anatomy, work: Workload, trained: float) -> float:
    """Return the operations for one token, including what is computed a second time, and the teacher's."""
    length = round(work.document_tokens or work.mean_tokens or work.row_tokens)
    total = flops_per_token(anatomy, length, trained=trained)
    if work.activation_checkpointing:
        total += 2 * multiplied_parameters(anatomy) + attention_flops(anatomy, length)
    if work.teacher is not None:
        total += 2 * multiplied_parameters(work.teacher) + attention_flops(work.teacher, length)
    return total
