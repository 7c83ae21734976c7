"""Training and measuring on a GPU beside the same on the CPU, and their speed, in one command of less than 9 minutes.

    python benchmarks/gpu.py --out figures [--budget 520] [--parts exact,speed] [--data text.jsonl]

It makes its models of random weights and its texts itself and needs no network. Each part runs in a process of its own,
in the order of PARTS, until the budget in seconds is spent; one that fails or takes too long leaves the others alone.
`gpu.json` and `gpu.md` in --out are written anew after every part, and say of each what it found, or why it was left
out. TRL's SFTTrainer and long trainings are not among the parts. With --tiny and --device cpu it is a dry run with
toys. It had not been run on a card when this was written.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shared import normal_noise, write_checkpoint

SPECIAL = ("<pad>", "<s>", "</s>")
WARM = 5  # steps before speed is measured
LOSS_NOISE = {"float32": 1e-4, "bf16": 2e-2}  # bf16 keeps 8 bits: 0.4 % of a number, and less of a mean


class SkippedError(Exception):
    """A part that cannot run here, with the reason."""


@dataclass(frozen=True)
class Size:
    """A Llama, and the batches that it is trained on."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    rows: int
    steps: int


@dataclass(frozen=True)
class Bench:
    """Where a part runs: its device, its directory, the sizes of the small, the timed and the streamed model."""

    device: str
    place: Path
    small: Size
    timed: Size
    streamed: Size
    data: tuple[str, ...]

    def model(self, name: str, *, dtype: str = "float32") -> Path:
        """Return a checkpoint of random weights: `small`, `timed` or `streamed`."""
        size, where = getattr(self, name), self.place / f"{name}-{dtype}"
        if not where.exists():
            whole = where.with_name(f"{where.name}-{os.getpid()}")  # a part that is ended leaves no half of one
            build(whole, size, dtype, is_noise=name == "streamed")
            whole.rename(where)
        return where

    def text(self, name: str = "small") -> list[str]:
        """Return the files to train on, those given or one of random words."""
        if self.data:
            return list(self.data)
        size, where = getattr(self, name), self.place / f"{name}.jsonl"
        if not where.exists():
            write_text(where, size.length * size.rows * (size.steps + 4), longest=size.length)
        return [str(where)]


CARD = {
    "small": Size(576, 1536, 12, 9, 3, 49152, 256, 4, 20),
    "timed": Size(2048, 8192, 16, 32, 8, 128256, 4096, 8, 25),  # 1.24e9 parameters, the sizes of Llama-3.2-1B
    "streamed": Size(4096, 14336, 40, 32, 8, 128256, 256, 32, 1),  # 9.3e9 parameters, 18.5 GB
}
TINY = {
    "small": Size(32, 48, 3, 4, 2, 300, 32, 2, 4),
    "timed": Size(48, 64, 2, 4, 2, 320, 64, 2, WARM + 3),
    "streamed": Size(64, 96, 4, 4, 2, 300, 32, 2, 1),
}


def build(directory: Path, size: Size, dtype: str, *, is_noise: bool) -> None:
    """Write a Llama with a tokenizer of bytes, its weights as transformers begins with them.

    With `is_noise` all weights, gains too, repeat the same numbers: quick, and good for nothing but to be read.
    """
    import torch
    from shared import llama_layers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from surgeon.checkpoint.header import TensorSpec

    head = size.hidden // size.heads
    shapes = {"model.embed_tokens.weight": (size.vocab, size.hidden), "model.norm.weight": (size.hidden,)}
    widths = {"queries": size.heads * head, "keys": size.kv_heads * head}
    shapes |= llama_layers(size.layers, hidden=size.hidden, ffn=size.ffn, **widths)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if is_noise:
        stored = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        specs = {name: TensorSpec(stored, shape) for name, shape in shapes.items()}
        write_checkpoint(directory, config.to_dict(), specs, noise=normal_noise(dtype))
    else:
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


def write_text(path: Path, nbytes: int, *, longest: int) -> None:
    """Write documents of random words, of up to `longest` bytes, until there are `nbytes` of them."""
    import random

    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(2000)]
    with path.open("w") as file:
        while nbytes > 0:
            document = " ".join(draw.choices(words, k=max(4, draw.randint(longest // 16, longest // 6))))
            file.write(json.dumps({"text": document}) + "\n")
            nbytes -= len(document)


def train(bench: Bench, model: Path, name: str, size: Size, **options: Any) -> dict[str, Any]:
    """Train on the device and return the losses, the speed and the peak of memory."""
    import surgeon
    from surgeon.train.run_dir import read_metrics

    how = {"batch_size": size.rows, "sequence_length": size.length, "max_steps": size.steps, "lr": "1e-3"}
    how |= {"data": bench.text(), "device": bench.device, "save_every": 0, "eval_rows": 1, "eval_every": 10_000}
    shutil.rmtree(bench.place / f"{name}.run", ignore_errors=True)  # of another part
    training = surgeon.finetune(model, output=bench.place / name, overwrite=True, **how | options)
    records = [record for record in read_metrics(training.run_dir) if "loss" in record]
    speeds = [record["tokens_per_second"] for record in records[WARM:] if record.get("tokens_per_second")]
    shares = [record["mfu"] for record in records[WARM:] if record.get("mfu")]
    return {
        "losses": [record["loss"] for record in records],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "mfu": statistics.median(shares) if shares else None,
        "memory": peak_memory(bench.device),
        "notes": list(training.notes),
    }


def peak_memory(device: str) -> int | None:
    """Return the most bytes that tensors held on a card, None elsewhere."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def apart(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference of two lists of losses, which have the same length."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def judged(difference: float, limit: float) -> dict[str, Any]:
    return {"difference": difference, "limit": limit, "holds": difference <= limit}


def exact(bench: Bench) -> dict[str, Any]:
    """20 steps in float32 and in bfloat16 on the device, beside float32 on the CPU."""
    model, size, how = bench.model("small"), bench.small, {"precision": "float32"}
    on_cpu = train(bench, model, "cpu", size, **how, device="cpu")["losses"]
    results = {}
    for precision, limit in LOSS_NOISE.items():
        losses = train(bench, model, precision, size, precision=precision)["losses"]
        results[precision] = judged(apart(losses, on_cpu), limit) | {"losses": losses}
    return results | {"cpu": on_cpu}


def speed(bench: Bench, **options: Any) -> dict[str, Any]:
    """About 1 B parameters, packed rows, bfloat16: tokens a second, MFU, memory beside its estimate."""
    import surgeon

    model, size = bench.model("timed"), bench.timed
    how = {"data": bench.text("timed"), "precision": "bf16"} | options
    shape = {"batch_size": size.rows, "sequence_length": size.length, "max_steps": size.steps}
    guess = surgeon.estimate_finetune(model, device=bench.device, **shape, **how)
    return train(bench, model, "timed-out", size, **how) | {"estimate": guess.memory.peak}


def compiled(bench: Bench) -> dict[str, Any]:
    """The same with compiled layers."""
    return speed(bench, compile=True)


def uncompiled(bench: Bench) -> dict[str, Any]:
    """The same without compiled layers."""
    return speed(bench, compile=False)


def masked(bench: Bench) -> dict[str, Any]:
    """The same behind a mask, by sdpa."""
    return speed(bench, attention="sdpa")


def profile(bench: Bench) -> dict[str, Any]:
    """The kernels that a short run of the timed model spends its time in, longest first."""
    import torch
    from torch.profiler import ProfilerActivity

    is_gpu = bench.device.startswith("cuda")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as seen:
        options = {"data": bench.text("timed"), "precision": "bf16", "max_steps": 3}
        train(bench, bench.model("timed"), "profiled", bench.timed, **options)
    spent = {event.key: event.self_device_time_total if is_gpu else event.self_cpu_time_total
             for event in seen.key_averages()}  # fmt: skip
    longest = sorted(spent, key=lambda name: -spent[name])[:25]
    attention = [name for name in spent if any(word in name.lower() for word in ("flash", "attention", "fmha", "sdpa"))]
    return {"milliseconds": {name: spent[name] / 1000 for name in longest}, "attention kernels": attention}


def accelerate(bench: Bench) -> dict[str, Any]:
    """A bare loop of accelerate with the same model and batches of tokens, each row one document."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers import AutoModelForCausalLM

    size = bench.timed
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training in the same process
    accelerator = Accelerator(cpu=bench.device == "cpu", mixed_precision="bf16")
    model = AutoModelForCausalLM.from_pretrained(bench.model("timed"), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    rows = torch.randint(3, 259, (size.steps * size.rows, size.length), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(rows, batch_size=size.rows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    times = [time.perf_counter()]
    for ids in loader:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter())
    steps = [after - before for before, after in zip(times[WARM:], times[WARM + 1 :], strict=False)]
    tokens = size.rows * size.length / statistics.median(steps)
    return {"tokens_per_second": tokens, "memory": peak_memory(bench.device)}


def resume(bench: Bench) -> dict[str, Any]:
    """A run that is killed and resumed beside one that is not, each with deterministic kernels."""
    from surgeon.train.run_dir import read_metrics

    size, out = bench.small, bench.place / "killed"
    options = {"deterministic": True, "save_every": 2, "data": bench.text(), "precision": "float32"}
    whole = train(bench, bench.model("small"), "whole", size, **options)["losses"]
    words = ["--data", *bench.text(), "--device", bench.device, "--deterministic", "--save-every", 2, "-o", out]
    words += ["--batch-size", size.rows, "--sequence-length", size.length, "--max-steps", size.steps, "--lr", "1e-3"]
    words += ["--eval-rows", 1, "--eval-every", 10_000, "--precision", "float32", "--resume", "--quiet"]
    command = [sys.executable, "-m", "surgeon", "finetune", bench.model("small"), *words]
    started = subprocess.Popen([str(word) for word in command])
    metrics = Path(f"{out}.run") / "metrics.jsonl"
    while started.poll() is None:
        if metrics.exists() and any(record["step"] >= 3 for record in read_metrics(metrics.parent)):
            break
        time.sleep(0.01)
    started.kill()
    was_killed = started.wait() == -signal.SIGKILL
    subprocess.run([str(word) for word in command], check=True)
    losses = [record["loss"] for record in read_metrics(metrics.parent) if "loss" in record]
    return judged(apart(losses, whole), 0.0) | {"killed before its end": was_killed}


def adapters(bench: Bench) -> dict[str, Any]:
    """LoRA and distillation beside the CPU's losses."""
    model, size = bench.model("small"), bench.small
    ways = {"lora": {"lora": 8}, "distillation": {"teacher": str(model), "kd_weight": 0.5}}
    results = {}
    for name, options in ways.items():
        here, there = (
            train(bench, model, f"{name}-{device}", size, precision="float32", device=device, **options)["losses"]
            for device in (bench.device, "cpu")
        )
        results[name] = judged(apart(here, there), 1e-4)
    return results


def qlora(bench: Bench) -> dict[str, Any]:
    """A base model in 4 bits: that it trains."""
    if find_spec("bitsandbytes") is None:
        raise SkippedError("bitsandbytes is not installed")
    losses = train(bench, bench.model("small"), "qlora", bench.small, lora=8, qlora=True)["losses"]
    return {"losses": losses, "falls": losses[-1] < losses[0]}


def gist(bench: Bench) -> dict[str, Any]:
    """Gist training in one pass behind a mask beside two passes, and beside two passes of varlen attention."""
    import surgeon

    model, size, data = bench.place / "gist-model", bench.small, bench.place / "records.jsonl"
    surgeon.add_gist(bench.model("small"), tokens=2).save(model, overwrite=True)
    lines = [
        {"prompt": f"Say word {index % 7} twice.", "completion": f" word {index % 7} word {index % 7}"}
        for index in range(size.rows * 40)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ways = {"mask": {"gist_impl": "mask"}, "two-pass": {"gist_impl": "two-pass"}}
    ways["varlen"] = {"gist_impl": "two-pass", "attention": "varlen"}
    results: dict[str, Any] = {}
    for name, options in ways.items():
        # the kernel of varlen takes 16 bits only, so all are compared in them
        how = {"gist": True, "data": [str(data)], "precision": "bf16", "max_steps": min(8, size.steps)}
        try:
            results[name] = train(bench, model, f"gist-{name}", size, **how | options)["losses"]
        except surgeon.PlanError as refusal:
            results[f"{name} is refused"] = str(refusal)
    for name in ways.keys() & results.keys() - {"mask"}:
        results[f"{name} beside mask"] = judged(apart(results[name], results["mask"]), LOSS_NOISE["bf16"])
    return results


def scores(bench: Bench) -> dict[str, Any]:
    """Scores of layers and a perplexity on the device beside the CPU's.

    A card measures in bfloat16, so the losses are equal within its noise; the scores are told as they are.
    """
    import surgeon

    model, losses, influence = bench.model("small"), [], {}
    how = {"data": bench.text(), "samples": 8, "sequence_length": bench.small.length}
    for device in (bench.device, "cpu"):
        pruning = surgeon.prune(model, layers=1, device=device, **how)
        losses.append(surgeon.evaluate(model, device=device, **how).scored.figures["loss"].value)
        influence["here" if device == bench.device and not influence else "cpu"] = dict(pruning.scores.layers)
    return {"loss": judged(apart(losses[:1], losses[1:]), LOSS_NOISE["bf16"]), "scores": influence}


def stream(bench: Bench) -> dict[str, Any]:
    """A streamed pass over a model in bfloat16, cold and warm, and its rate beside the disk's own."""
    import surgeon

    model = bench.model("streamed", dtype="bfloat16")
    weights = model / "model.safetensors"
    results: dict[str, Any] = {"bytes": weights.stat().st_size, "cold": forget(weights)}
    how = {"data": bench.text("streamed"), "samples": bench.streamed.rows, "sequence_length": bench.streamed.length}
    for name in ("first", "second"):
        began = time.perf_counter()
        surgeon.evaluate(model, device=bench.device, **how)
        results[f"{name} pass, bytes a second"] = results["bytes"] / (time.perf_counter() - began)
    forget(weights)
    began = time.perf_counter()
    with weights.open("rb", buffering=0) as file:
        while file.read(16 << 20):
            pass
    return results | {"disk, bytes a second": results["bytes"] / (time.perf_counter() - began)}


def forget(path: Path) -> bool:
    """Ask the kernel to drop a file from its cache; return whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not written yet are not dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


# In order of worth, each with the most seconds that it may take.
PARTS: dict[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    "exact": (exact, 90),
    "speed": (speed, 100),
    "accelerate": (accelerate, 80),
    "profile": (profile, 70),
    "scores": (scores, 60),
    "resume": (resume, 60),
    "gist": (gist, 60),
    "adapters": (adapters, 60),
    "masked": (masked, 70),
    "compiled": (compiled, 100),
    "uncompiled": (uncompiled, 70),
    "stream": (stream, 90),
    "qlora": (qlora, 40),
}


def one(name: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run a part in this process and return what it found, or why it cannot run here."""
    sizes = TINY if options.tiny else CARD
    bench = Bench(options.device, place, sizes["small"], sizes["timed"], sizes["streamed"], tuple(options.data))
    began = time.perf_counter()
    try:
        found = PARTS[name][0](bench)
    except SkippedError as reason:
        return {"state": "skipped", "why": str(reason)}
    return {"state": "done", "seconds": time.perf_counter() - began, "found": found}


def guarded(name: str, arguments: list[str], place: Path, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own and return what became of it; nothing of it is left after `seconds`."""
    result = place / f"{name}.json"
    command = [sys.executable, __file__, *arguments, "--only", name, "--place", str(place)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"state": "failed", "why": f"it was ended after {seconds:.0f} seconds"}
    if process.returncode:
        lines = error.decode(errors="replace").strip().splitlines()
        return {
            "state": "failed",
            "why": lines[-1] if lines else f"exit code {process.returncode}",
            "error": lines[-30:],
        }
    return json.loads(result.read_text())


def write(out: Path, report: dict[str, Any]) -> None:
    """Write the report as gpu.json, and as gpu.md for people."""
    (out / "gpu.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    lines = [f"# {report['device name']}", "", f"{report['date']}, torch {report['torch']}: `{report['command']}`", ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}: {part['state']}", "", part.get("why") or PARTS[name][0].__doc__.splitlines()[0], ""]
        found = part.get("found", {})
        lines += [f"- {what}: {json.dumps(value, default=str)[:600]}" for what, value in found.items()] + [""]
    (out / "gpu.md").write_text("\n".join(lines))


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "a CPU"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=520, help="seconds")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        (options.place / f"{options.only}.json").write_text(
            json.dumps(one(options.only, options, options.place), default=str)
        )
        return 0
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    began = time.perf_counter()
    import torch

    report = {"device name": device_name(options.device), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
              "command": " ".join(["python benchmarks/gpu.py", *arguments]), "parts": {}}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out, ignore_cleanup_errors=True) as place:
        for name in names:
            left = options.budget - (time.perf_counter() - began)
            if left < 10:
                part = {"state": "skipped", "why": f"the budget of {options.budget:.0f} seconds was spent"}
            else:
                part = guarded(name, arguments, Path(place), min(left, PARTS[name][1]))
            report["parts"][name] = part
            print(f"{name}: {part['state']} {part.get('why', '')}", flush=True)
            write(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
