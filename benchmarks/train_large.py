"""Train large, then compress, at small scale: two models at equal compute, then quantized and pruned, several seeds.

    python benchmarks/train_large.py tinyshakespeare.txt

A small and a large Llama on characters, trained with as many floating-point operations (6 per parameter that is
multiplied and character). Then, without training: codes of 8, 4, 3 and 2 bits in groups of 32 along the inputs, by
compressed-tensors; and the smallest half of each map set to zero, as it is, after some masked steps, and then in 4
bits. Sizes are those that such a model takes in a file: embeddings and head in 16 bits, a scale of 16 bits for each
group, and of what is pruned a bit for each weight that says whether it is there. Losses are on held-out text, in nats a
character, the mean over seeds with its standard error. About five minutes of one core.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgeon.plan.quantizing import library

SIZES = {"small": (64, 2), "large": (128, 3)}  # hidden, layers
GROUP, LENGTH, BATCH = 32, 128, 16
HEALING = 40  # masked steps
ROWS = 128  # of held-out text


def model_of(size: str, vocabulary: int, seed: int) -> Any:
    """Return a new model."""
    hidden, layers = SIZES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=LENGTH,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def maps_of(model: Any) -> list[nn.Linear]:
    """Return the linear maps inside the layers."""
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def train(model: Any, text: Tensor, steps: int, seed: int, *, rate: float, masks: list[Tensor] | None = None) -> None:
    """Train a model in place, on rows that the seed draws; with masks, what they hide stays zero."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        share = min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        places = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=draw)
        rows = torch.stack([text[place : place + LENGTH] for place in places.tolist()])
        loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masks is not None:
            mask(model, masks)


def mask(model: Any, masks: list[Tensor]) -> None:
    """Set to zero what the masks hide."""
    with torch.no_grad():
        for module, kept in zip(maps_of(model), masks, strict=True):
            module.weight.mul_(kept)


def loss_of(model: Any, rows: Tensor) -> float:
    """Return the mean loss on rows of held-out text."""
    with torch.no_grad():
        return statistics.fmean(float(model(part, labels=part, use_cache=False).loss) for part in rows.split(BATCH))


def quantized(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded to codes of so many bits, by compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    how = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=GROUP, symmetric=True)
    groups = weight.unflatten(1, (-1, GROUP))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), how)
    return fake_quantize(weight, scale, zero, how)


def compress(model: Any, bits: int) -> None:
    """Round all maps of a model in place."""
    with torch.no_grad():
        for module in maps_of(model):
            module.weight.copy_(quantized(module.weight, bits))


def kilobytes(model: Any, bits: float, *, kept: float = 1.0) -> float:
    """Return what a model takes in a file, with codes of so many bits for the share of weights that are kept."""
    inside = sum(module.weight.numel() for module in maps_of(model))
    outside = sum(parameter.numel() for parameter in model.parameters()) - inside
    scales = inside / GROUP * 16 if bits < 16 else 0
    return (inside * (bits * kept + (kept < 1)) + scales + outside * 16) / 8000


def forms_of(model: Any, held: Tensor, text: Tensor, seed: int) -> dict[str, tuple[float, float]]:
    """Return for each form of a trained model its kilobytes and its loss."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {"16 bits": (kilobytes(model, 16), loss_of(model, held))}
    for bits in (8, 4, 3, 2):
        compress(model, bits)
        found[f"{bits} bits"] = kilobytes(model, bits), loss_of(model, held)
        model.load_state_dict(start)
    masks = [(module.weight.abs() > module.weight.abs().median()).float() for module in maps_of(model)]
    mask(model, masks)
    found["half of it zero"] = kilobytes(model, 16, kept=0.5), loss_of(model, held)
    train(model, text, HEALING, seed + 1000, rate=1e-3, masks=masks)
    found["half of it zero, healed"] = kilobytes(model, 16, kept=0.5), loss_of(model, held)
    compress(model, 4)
    mask(model, masks)  # rounding moves no zero: it stays one
    found["half of it zero, healed, 4 bits"] = kilobytes(model, 4, kept=0.5), loss_of(model, held)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="of the small model")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    library("compressed-tensors")
    characters = options.text.read_text(encoding="utf-8")
    known = {character: number for number, character in enumerate(sorted(set(characters)))}
    tokens = torch.tensor([known[character] for character in characters])
    text, held = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    held = held[: ROWS * LENGTH].view(ROWS, LENGTH)
    began, found = time.process_time(), {size: [] for size in SIZES}
    counts = {size: sum(each.numel() for each in model_of(size, len(known), 0).parameters()) for size in SIZES}
    for size in SIZES:
        steps = round(options.steps * counts["small"] / counts[size])
        told = f"{counts[size]:,} parameters, {steps} steps, {steps * BATCH * LENGTH / counts[size]:.1f}"
        print(f"{size}: {told} characters a parameter", flush=True)
        for seed in range(options.seeds):
            model = model_of(size, len(known), seed)
            train(model, text, steps, seed, rate=3e-3)
            found[size].append(forms_of(model, held, text, seed))
    print(f"{time.process_time() - began:.0f} s of processor time\n")
    print("| form | " + " | ".join(f"{size}, kB | loss | over its 16 bits" for size in SIZES) + " |")
    print("| --- |" + " --- | --- | --- |" * len(SIZES))
    for form in found["small"][0]:
        cells = []
        for runs in found.values():
            losses = [run[form][1] for run in runs]
            over = [run[form][1] - run["16 bits"][1] for run in runs]
            cells += [f"{runs[0][form][0]:.0f}", with_error(losses), with_error(over)]
        print(f"| {form} | {' | '.join(cells)} |")


def with_error(values: list[float]) -> str:
    """Return a mean with its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
