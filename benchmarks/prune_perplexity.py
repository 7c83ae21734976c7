"""Perplexity with 4, 8 and 12 layers removed by every score and at random, before and after a short healing run.

    python benchmarks/prune_perplexity.py MODEL --data wikitext2-valid.txt [--steps 16] [--record FILE]

The text is tokenised whole. Scores: its first 32 rows of 256 tokens (the gradient's and the removals': the first 8).
Perplexity: tokens 100,000 to 104,096 as 8 rows of 512, a loss inside each row, in float32. Healing: AdamW on rows of
128 tokens drawn from tokens 8,192 to 100,000, which neither the scores nor the perplexity see; cosine schedule, the
same rate, rows and number of steps for every cut, master weights in float32 and bfloat16 autocast. With --record, cuts
that are in the file are not healed again.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon
from surgeon.measure.scoring import ScoreRequest, perplexity, removal_curve, score
from surgeon.surgery import open_source
from surgeon.transforms.choose import choose_layers
from surgeon.transforms.scores import METHODS

COUNTS = (4, 8, 12)
CALIBRATION = (32, 256)
FEW = 8  # rows for the scores that cost many passes
EVALUATION = (100_000, 8, 512)
HEALING = (8_192, 100_000, 128)
BATCH, RATE, WARMUP = 4, 2e-4, 0.1
RANDOM_SEEDS = (0, 1)


def choices(source, tokens) -> dict[str, dict[int, list[int]]]:
    """Return, for each score, the layers that go when 4, 8 or 12 do."""
    depth = len(surgeon.open_model(source).plan.layer_map)
    opened = open_source(source)
    began = time.perf_counter()
    states = score(opened, tokens, ScoreRequest(layers=("angular", "magnitude")))
    print(f"states and magnitudes: {time.perf_counter() - began:.0f} s", flush=True)
    costly = score(opened, tokens[:FEW], ScoreRequest(layers=("perplexity", "taylor")))
    print(f"one by one, gradients: {time.perf_counter() - began:.0f} s", flush=True)
    protect = METHODS["perplexity"].greedy.protect
    request = ScoreRequest(layers=("perplexity",), rounds=max(COUNTS), protect=protect)
    rounds = score(opened, tokens[:FEW], request)
    print(f"greedy: {time.perf_counter() - began:.0f} s", flush=True)
    values = states.layers | {name: costly.layers[name] for name in ("perplexity", "taylor")}
    found: dict[str, dict[int, list[int]]] = {}
    for name in METHODS:
        if name not in ("random", "uniform"):
            cut = {n: choose_layers(name, n, depth, values=values.get(name)) for n in COUNTS}
            found[name] = {n: list(choice.dropped) for n, choice in cut.items()}
    order = rounds.greedy["order"]
    found["perplexity, greedy"] = {n: sorted(order[:n]) for n in COUNTS}
    found["truncate"] = {n: list(range(depth - n, depth)) for n in COUNTS}
    for seed in RANDOM_SEEDS:
        found[f"random, seed {seed}"] = {n: list(choose_layers("random", n, depth, seed=seed).dropped) for n in COUNTS}
    return found


def heal(directory: Path, tokens: torch.Tensor, steps: int) -> None:
    """Train the checkpoint in place for `steps` steps of BATCH rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    start, stop, length = HEALING
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, int(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / (steps - warm))),
    )
    for _ in range(steps):
        places = torch.randint(start, stop - length, (BATCH,), generator=draw)
        rows = torch.stack([tokens[place : place + length] for place in places.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def main() -> None:
    """Cut, heal and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--record", type=Path, help="a JSON file to go on from")
    options = parser.parse_args()

    text = options.data.read_text(encoding="utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text, add_special_tokens=False).input_ids)
    rows, length = CALIBRATION
    begin, eval_rows, eval_length = EVALUATION
    evaluation = tokens[begin : begin + eval_rows * eval_length].view(eval_rows, eval_length)
    record = json.loads(options.record.read_text()) if options.record and options.record.exists() else {}

    def keep() -> None:
        if options.record:
            options.record.write_text(json.dumps(record, indent=1))

    if "choices" not in record:
        record["choices"] = choices(options.model, tokens[: rows * length].view(rows, length))
        keep()
    cuts = {tuple(dropped) for by_count in record["choices"].values() for dropped in by_count.values()}
    healed = record.setdefault("healed", {})
    before = record.setdefault("before", {})
    missing = [cut for cut in sorted(cuts) if str(list(cut)) not in before]
    if missing:
        found = removal_curve(open_source(options.model), evaluation, [(), *missing])
        record["whole"] = found[0]
        before |= {str(list(cut)): value for cut, value in zip(missing, found[1:], strict=True)}
        keep()
    for cut in [(), *sorted(cuts, key=lambda cut: (abs(len(cut) - COUNTS[1]), len(cut), cut))]:
        if (name := str(list(cut))) in healed:
            continue
        with tempfile.TemporaryDirectory() as work:
            out = Path(work) / "cut"
            kept = [layer for layer in range(len(surgeon.open_model(options.model).plan.layer_map)) if layer not in cut]
            cut_to(options.model, kept, out)
            heal(out, tokens, options.steps)
            healed[name] = perplexity(open_source(out), evaluation)
        print(f"{name}: {before.get(name, record['whole']):.4g} -> {healed[name]:.4g}", flush=True)
        keep()
    report(record, options.steps)


def cut_to(model: str, kept: list[int], out: Path) -> None:
    """Write the model with these layers."""
    from dataclasses import replace

    from surgeon.transforms.layers import keep_layers

    begun = surgeon.open_model(model)
    replace(begun, plan=begun.plan.then(keep_layers(begun.anatomy, kept))).save(out)


def report(record: dict, steps: int) -> None:
    """Print the table, a row a score."""
    print(f"whole model: {record['whole']:.2f}, after {steps} steps of the same training {record['healed']['[]']:.2f}")
    print("| score | " + " | ".join(f"{n} removed | healed" for n in COUNTS) + " |")
    print("| --- |" + " --- | --- |" * len(COUNTS))
    for name, by_count in record["choices"].items():
        cells = []
        for n in COUNTS:
            cut = str(list(by_count[str(n)] if str(n) in by_count else by_count[n]))
            cells += [f"{record['before'][cut]:.4g}", f"{record['healed'][cut]:.4g}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
