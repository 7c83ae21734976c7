"""Shared by the benchmarks: time a process, write a checkpoint of random numbers, and train with a log."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from surgeon.checkpoint.header import TensorSpec
from surgeon.plan.execute import TensorWrite, write_safetensors


class Figure(NamedTuple):
    """The wall seconds, CPU seconds and peak memory in MB of one process."""

    seconds: float
    cpu: float
    memory: float


def measure(command: Sequence[str], *, stdout: int | IO[str] = subprocess.DEVNULL) -> Figure:
    """Run a command and return its figure, with that of the processes that it waits for. Exits if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=stdout)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed with exit code {process.returncode}")
    return Figure(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def spread(values: Sequence[float], *, unit: str = "") -> str:
    """Return "median (minimum to maximum)"."""
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def llama_layers(count: int, *, hidden: int, ffn: int, queries: int, keys: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `count` Llama layers. `queries` and `keys` are heads and key-value heads times head size."""
    layer = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, ffn),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], *, noise: memoryview
) -> int:
    """Write a new checkpoint whose every tensor repeats `noise`; return the bytes of its weights."""

    def content(nbytes: int) -> Iterator[memoryview]:
        for start in range(0, nbytes, len(noise)):
            yield noise[: min(len(noise), nbytes - start)]

    writes = [TensorWrite(name, spec, lambda size=spec.nbytes: content(size)) for name, spec in specs.items()]
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", writes)
    (directory / "config.json").write_text(json.dumps(config))
    return sum(spec.nbytes for spec in specs.values())


def normal_noise(dtype: str) -> memoryview:
    """Return the bytes of a million normal numbers in `dtype`, a name of torch."""
    import torch

    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    return memoryview(numbers.to(getattr(torch, dtype)).view(torch.uint8).numpy())


class Log:
    """A watcher that prints a line for each evaluation."""

    def begin(self, total_steps: int, *, done: int = 0) -> None:
        print(f"  {total_steps} steps, from {done}", flush=True)

    def step(self, report: Any) -> None:
        pass

    def evaluated(self, report: Any) -> None:
        print(f"  step {report.step}: validation {report.validation:.4f}, probe {report.probe:.4f}", flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def end(self) -> None:
        pass


def finetune(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Train `model` into `output` and return the results and the seconds that it took."""
    import surgeon

    print(output.name, flush=True)
    began = time.perf_counter()
    training = surgeon.finetune(model, output=output, watcher=Log(), resume=True, **options)
    return training.to_dict() | {"seconds": time.perf_counter() - began}
