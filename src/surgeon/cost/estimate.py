"""The cost of a run before it begins: tokens, memory by use, and time. From headers, without a model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgeon import text
from surgeon.anatomy.anatomy import Anatomy
from surgeon.cost.flops import attention_flops, flops_per_token, multiplied_parameters
from surgeon.cost.memory import BatchShape, Precision, activation_bytes, loss_bytes, matrices
from surgeon.models.device import LOGITS_BYTES
from surgeon.showing import Shown
from surgeon.text import duration

STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}  # numbers for each parameter; others: 2
# Training reaches about this share of the speed of one large product of matrices; norms, softmax, small matrices and
# the optimizer take the rest. SmolLM2-135M on one CPU core: 0.42 to 0.76. An assumption; a run's own meter measures it.
EFFICIENCY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The facts of a run that its cost depends on. `row_tokens` is the longest row, `mean_tokens` a usual one."""

    steps: int
    row_tokens: int
    mean_tokens: float | None = None  # of a row, without padding
    document_tokens: float | None = None  # of a document, where rows hold several and keep them apart
    batch_size: int = 1
    gradient_accumulation: int = 1
    processes: int = 1
    optim: str = "adamw_torch_fused"
    trained: int | None = None  # parameters, where not all are
    lora: int | None = None  # rank; then the base is not trained
    stored_bf16: bool = False  # the base of adapters, in memory
    precision: Precision = "bf16"
    activation_checkpointing: bool = False
    teacher: Anatomy | None = None
    logits_bytes: int = LOGITS_BYTES  # of a chunk of the loss, in float32

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, padding left out."""
        rows = self.steps * self.batch_size * self.gradient_accumulation * self.processes
        return round(rows * (self.mean_tokens or self.row_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on each device by use; `peak` is the most at once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    teacher: int
    keeps_gradients: bool  # from one batch to the next, or in the buckets that processes exchange

    @property
    def peak(self) -> int:
        """The most bytes at once: gradients grow while activations are freed, unless they exist before."""
        forward = self.activations + self.loss
        moving = self.gradients + forward if self.keeps_gradients else max(self.gradients, forward)
        return self.weights + self.optimizer + self.teacher + moving

    def to_dict(self) -> dict[str, int]:
        """Return the parts and the peak."""
        names = ("weights", "gradients", "optimizer", "activations", "loss", "teacher", "peak")
        return {name: getattr(self, name) for name in names}


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


def memory(anatomy: Anatomy, work: Workload, *, trained: int, adapters: int = 0) -> Memory:
    """Return the bytes that training holds on each device, without those of a runtime itself (CUDA: ½ GB)."""
    total = anatomy.spec.num_parameters
    half_base = work.precision == "pure-bf16" or (adapters > 0 and work.stored_bf16)
    wide = 2 if work.precision == "pure-bf16" else 4  # bytes of a trained parameter, its gradient and each state
    distributed = work.processes > 1
    batch = BatchShape(
        rows=work.batch_size,
        row_tokens=work.row_tokens,
        precision=work.precision,
        is_packed=work.document_tokens is not None,
        lora=work.lora,
        is_base_half=half_base,
        is_checkpointed=work.activation_checkpointing,
        logits_bytes=work.logits_bytes,
    )
    teacher = (
        0 if work.teacher is None else work.teacher.spec.num_parameters * (4 if work.precision == "float32" else 2)
    )
    return Memory(
        weights=total * (2 if half_base else 4) + adapters * 4,
        gradients=trained * wide * (2 if distributed else 1),  # torch's DDP copies them into buckets
        optimizer=round(trained * _states(work.optim) * wide),
        activations=activation_bytes(anatomy, batch),
        loss=loss_bytes(anatomy, batch, is_head_trained=not adapters, with_teacher=work.teacher is not None),
        teacher=teacher,
        keeps_gradients=work.gradient_accumulation > 1 or distributed,
    )


def lora_parameters(anatomy: Anatomy, rank: int) -> int:
    """Return the parameters of adapters on all matrices of the layers."""
    return sum(rank * sum(anatomy.spec.tensors[name].shape) for name in matrices(anatomy))


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


def _states(optim: str) -> float:
    """Return how many numbers of a parameter's width an optimizer keeps of each parameter."""
    kept = next((count for name, count in STATES.items() if optim.startswith(name)), 2)
    return kept / 4 if "8bit" in optim else kept
