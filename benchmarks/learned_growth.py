"""Is learned growth worth its steps? Exact, learned and random starts at equal compute, on a CPU.

    python benchmarks/learned_growth.py [--text FILE] [--seeds 3] [--quick]

Trains a small byte-level Llama with tied embeddings on a text (default: the Python standard library), and makes it 1.5
times as wide and twice as deep: by the exact growth, by `surgeon grow --learn 100`, and with random weights. Then all
are trained on, in the usual way: exact and random for as many steps; the learned one once for as many steps in all, and
once for fewer, so that all cost the same, by the measured price of a step of learning. Every run has one thread. Writes
the figures as JSON into --directory and prints the table.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grow_training import HELD_OUT_BYTES, corpus, next_byte_loss, train

if TYPE_CHECKING:
    from torch import Tensor

LENGTH, ROWS = 96, 16
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = {"hidden_size": 96, "intermediate_size": 264, "num_attention_heads": 6, "num_key_value_heads": 3}
GROW = {"hidden_size": 96, "intermediate_size": 264, "attention_heads": 6, "key_value_heads": 3, "layers": 6}
RATES = {"small": 2e-3, "grown": 1e-3, "random": 2e-3}
SHAPE = (ROWS, LENGTH)


def main() -> None:
    """Carry out the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, help="the text; default: the sources of the Python standard library")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300, help="of ordinary training after the growth")
    parser.add_argument("--learn", type=int, default=100, help="steps of learning")
    parser.add_argument("--lr", type=float, help="of the learning; default: that of surgeon grow")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to try the script")
    parser.add_argument("--directory", type=Path, default=Path("build/learned-growth"))
    options = parser.parse_args()
    if options.quick:
        options.small_steps, options.steps, options.learn, options.seeds = 10, 12, 4, 1
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    options.directory.mkdir(parents=True, exist_ok=True)
    results = [run(seed, options) for seed in range(options.seeds)]
    (options.directory / "learned-growth.json").write_text(json.dumps(results, indent=1))
    print(table(results, options.steps))


def run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one seed: losses in nats per byte on the same held-out windows."""
    import surgeon
    from surgeon.growth.settings import RATE

    place: Path = options.directory / str(seed)
    small, began = place / "small", time.process_time()
    model = fresh(SMALL, 3, seed)
    curve = trained(model, options.small_steps, "small", seed, options.text)
    model.save_pretrained(small)
    give_tokenizer(small)
    texts = write_texts(place, options.text)
    surgeon.grow(small, seed=seed, **GROW).save(place / "exact", overwrite=True)
    how = {"data": [str(texts[0])], "eval_data": [str(texts[1])], "sequence_length": LENGTH, "batch_size": ROWS}
    rate = options.lr or RATE
    growing = surgeon.grow(small, seed=seed, learn=options.learn, lr=rate, device="cpu", **how, **GROW)
    growing.save(place / "learned", overwrite=True)
    price = price_of_learning(small, seed)
    saved = max(0, options.steps - round(options.learn * price))
    starts = {
        "exact": (loaded(place / "exact"), options.steps, "grown"),
        "learned, as many steps": (loaded(place / "learned"), options.steps - options.learn, "grown"),
        "learned, as much compute": (loaded(place / "learned"), saved, "grown"),
        "random": (fresh(LARGE, 6, seed), options.steps, "random"),
    }
    rows = {}
    for name, (start, steps, kind) in starts.items():
        losses = trained(start, steps, kind, seed, options.text)
        rows[name] = {"steps": steps, "before": losses[0][1], "after": losses[-1][1]}
    record = growing.learning.record
    assert record is not None, "it was learned"
    return {
        "seed": seed,
        "small": curve[-1][1],
        "parameters": {"small": count(model), "large": count(loaded(place / "exact"))},
        "learned_numbers": growing.learning.numbers,
        "held_out": record["held_out"],
        "kept": record["kept"],
        "price": price,
        "rows": rows,
        "cpu_seconds": time.process_time() - began,
    }


def trained(model: Any, steps: int, kind: str, seed: int, text: Path | None) -> list[list[float]]:
    """Return the losses before and after some steps of ordinary training."""
    every = max(1, steps)
    return train(
        model, steps, learning_rate=RATES[kind], seed=1000 + seed, measure=every, loss_fn=loss, text=text, shape=SHAPE
    )


def loss(model: Any, windows: "Tensor", step: int) -> "Tensor":
    """Return the mean loss of each next byte, in nats."""
    return next_byte_loss(model, windows, step)


def fresh(sizes: dict[str, int], layers: int, seed: int) -> Any:
    """Return a model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokens = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, **tokens, head_dim=16, num_hidden_layers=layers, max_position_embeddings=LENGTH)
    )


def loaded(directory: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def give_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose tokens are the bytes, by their own numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # ByteLevel writes these as they are
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(letters), "all bytes have a letter"
    end = chr(256)  # byte 0, which no text has
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(directory)


def write_texts(place: Path, text: Path | None) -> tuple[Path, Path]:
    """Return files with the trained and the held-out part of a text, as `train` divides it."""
    data, _ = corpus(text, LENGTH)
    whole = bytes(data.tolist())
    held = place / "held-out.txt"
    paths = place / "train.txt", held
    paths[0].write_bytes(whole[:400_000])  # more than the learning reads
    source = bytearray() if text is None else text.read_bytes()
    held.write_bytes(bytes(source[-min(HELD_OUT_BYTES, len(source) // 12) :][:20_000]) or whole[-20_000:])
    return paths


def price_of_learning(small: Path, seed: int, steps: int = 8) -> float:
    """Return how many ordinary steps of the large model one step of learning costs, by CPU time."""
    import torch

    from surgeon.growth.operator import Operator
    from surgeon.models.skeleton import build_skeleton
    from surgeon.plan.operators import PREFIX
    from surgeon.plan.planned import PlannedSource
    from surgeon.surgery import open_model
    from surgeon.transforms.grow import growth
    from surgeon.transforms.learned import learned

    begun = open_model(small)
    grown = growth(begun.anatomy, seed=seed, **GROW)
    planned = PlannedSource(begun.source, grown.plan)
    operator = Operator(
        begun.source, grown.plan, learned(grown, PREFIX), PREFIX, lambda dtype: build_skeleton(planned, dtype)
    )
    ordinary = fresh(LARGE, 6, seed)
    windows = torch.randint(256, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    seconds = []
    for model in (operator, ordinary):
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.0)
        for step in range(steps + 1):
            if step == 1:  # the first one warms up
                began = time.process_time()
            optimizer.zero_grad()
            next_byte_loss(model, windows).backward()
            optimizer.step()
        seconds.append(time.process_time() - began)
    return seconds[0] / seconds[1]


def table(results: list[dict[str, Any]], steps: int) -> str:
    """Return the figures as a table in Markdown."""
    first = results[0]
    sizes = first["parameters"]
    price = fmean(each["price"] for each in results)
    small = listed([each["small"] for each in results])
    held = [(each["held_out"]["exact"], each["held_out"]["learned"], each["kept"]) for each in results]
    losses = ", ".join(f"{exact:.3f} → {made:.3f} ({kept} kept)" for exact, made, kept in held)
    lines = [
        f"Small: {sizes['small']:,} parameters, loss {small}. Large: {sizes['large']:,}.",
        f"Learned are {first['learned_numbers']:,} numbers; a step of learning costs {price:.2f} ordinary ones.",
        f"Held-out loss, exact → learned: {losses}.",
        "",
        "| start | loss before | ordinary steps | loss after |",
        "| --- | --- | --- | --- |",
    ]
    for name in first["rows"]:
        rows = [each["rows"][name] for each in results]
        taken = listed([row["steps"] for row in rows], digits=0) if name != "random" else str(steps)
        before, after = (listed([row[key] for row in rows]) for key in ("before", "after"))
        lines.append(f"| {name} | {before} | {taken} | {after} |")
    seconds = sum(each["cpu_seconds"] for each in results)
    return "\n".join([*lines, "", f"{seconds / 60:.0f} minutes of one core."])


def listed(numbers: list[float], digits: int = 3) -> str:
    """Return the mean, and each in brackets where they differ."""
    mean = f"{fmean(numbers):.{digits}f}"
    return mean if len({*numbers}) == 1 else f"{mean} ({', '.join(f'{number:.{digits}f}' for number in numbers)})"


if __name__ == "__main__":
    main()
