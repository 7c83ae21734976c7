"""Does a grown model learn faster than one with random weights? A toy answer on a CPU, with a plot.

    python benchmarks/grow_training.py [--seeds 2] [--quick]

Trains a small byte-level Llama on the sources of the Python standard library, and grows it with `surgeon.grow` in every
way. Then it trains, on the same text, each result, the small model itself, and models of the large shapes with random
weights. Nothing is downloaded. Two processes of one thread each run at a time. Writes the losses as JSON into
--directory, the plot as docs/images/grow-training.png, and prints the table.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PLOT = ROOT / "docs" / "images" / "grow-training.png"
BATCH, LENGTH = 16, 96
CORPUS_BYTES, HELD_OUT_BYTES, HELD_OUT_WINDOWS = 12_000_000, 1_000_000, 96
WARM_UP, DECAY = 50, 0.2  # steps, and the last share of them in which the learning rate falls to zero
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 128, "intermediate_size": 352, "attention_heads": 8, "key_value_heads": 4}
LAYERS = 3


@dataclass(frozen=True)
class Start:
    """Where a run starts: how the small model is grown ({}: not at all), or None for random weights.

    `like` is the shape of the random model that it is compared with.
    """

    label: str
    grow: dict[str, Any] | None
    like: str
    learning_rate: float = 1e-3


STARTS = {
    "clone": Start("clone, no noise", {**WIDE, "width_method": "clone", "noise": 0.0}, "wide"),
    "clone-noise": Start("clone + noise", {**WIDE, "width_method": "clone"}, "wide"),
    "pad": Start("pad", {**WIDE, "width_method": "pad"}, "wide"),
    "zero-pad": Start("zero-pad", {**WIDE, "width_method": "zero-pad"}, "wide"),
    "small-on": Start("small, trained on", {}, "wide"),
    "random-wide": Start("random, wide", None, "wide", 2e-3),
    "identity": Start("identity depth", {"layers": 6}, "deep"),
    "stack": Start("stack", {"layers": 6, "depth_method": "stack"}, "deep"),
    "random-deep": Start("random, deep", None, "deep", 2e-3),
}


@dataclass(frozen=True)
class Lengths:
    """Steps of training, and how often the loss is measured."""

    small: int = 1500
    grown: int = 500
    random: int = 2000
    measure: int = 25


QUICK = Lengths(small=30, grown=10, random=20, measure=5)


def corpus(path: Path | None = None, length: int = LENGTH) -> "tuple[Tensor, Tensor]":
    """Return the bytes of a file to train on (None: of the standard library), and windows of held-out ones.

    Of a shorter text a twelfth is held out. Windows are of shape (windows, length + 1).
    """
    import torch

    text = _library() if path is None else bytearray(path.read_bytes())
    data = torch.frombuffer(text[:CORPUS_BYTES], dtype=torch.uint8).long()
    num_held_out = min(HELD_OUT_BYTES, len(data) // 12)
    held_out = data[-num_held_out:]
    starts = torch.linspace(0, num_held_out - length - 1, HELD_OUT_WINDOWS).long()
    return data[:-num_held_out], torch.stack([held_out[i : i + length + 1] for i in starts.tolist()])


def _library() -> bytearray:
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    text = bytearray()
    for path in sorted(library.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(library).parts) and len(text) < CORPUS_BYTES:
            text += path.read_bytes()
    return text


def batches(data: "Tensor", seed: int, shape: tuple[int, int]) -> "Iterator[Tensor]":
    """Yield random windows of the text, (rows, length + 1)."""
    import torch

    rows, length = shape
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - length - 1, (rows,), generator=generator)
        yield torch.stack([data[i : i + length + 1] for i in starts.tolist()])


def next_byte_loss(model: Any, windows: "Tensor", _: int = 0) -> "Tensor":
    """Return the mean loss of each next byte, in nats."""
    import torch

    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: Any,
    steps: int,
    *,
    learning_rate: float,
    seed: int,
    measure: int,
    loss_fn: "Callable[[Any, Tensor, int], Tensor]" = next_byte_loss,
    text: Path | None = None,
    shape: tuple[int, int] = (BATCH, LENGTH),
) -> list[list[float]]:
    """Return [tokens, held-out loss in nats per byte] from before the first step on; the model is trained in place.

    `loss_fn` takes the model, windows of text and the number of the step, 0 for held-out ones. `shape` is that of a
    batch: rows and their length.
    """
    import torch

    data, held_out = corpus(text, shape[1])

    def measured() -> float:
        with torch.no_grad():
            return float(loss_fn(model, held_out, 0))

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    curve = [[0, measured()]]
    for step, batch in zip(range(1, steps + 1), batches(data, seed, shape), strict=False):
        scale = min(step / WARM_UP, (steps - step + 1) / (DECAY * steps), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        loss = loss_fn(model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % measure == 0 or step == steps:
            curve.append([step * shape[0] * shape[1], measured()])
    return curve


def fresh(shape: str, seed: int) -> Any:
    """Return a model with random weights: "small", "wide" or "deep"."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(SMALL)
    if shape == "wide":
        sizes = {key: 2 * size for key, size in SMALL.items()}
    return LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            num_hidden_layers=2 * LAYERS if shape == "deep" else LAYERS,
            vocab_size=256,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def run(name: str, seed: int, directory: Path, lengths: Lengths) -> None:
    """Carry out one run and write its curve: the small model, a grown one, or one from random weights."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    import surgeon

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    began = time.perf_counter()
    small = directory / "small"
    steps, rate = lengths.small, 2e-3
    if name == "small":
        model = fresh("small", 0)
    else:
        start = STARTS[name]
        rate = start.learning_rate
        steps = lengths.random if start.grow is None else lengths.grown
        if start.grow is None:
            model = fresh(start.like, seed)
        else:
            grown = directory / f"{name}-{seed}" if start.grow else small
            if start.grow:
                surgeon.grow(small, seed=seed, **start.grow).save(grown, overwrite=True)
            model = LlamaForCausalLM.from_pretrained(grown, dtype=torch.float32)
    curve = train(model, steps, learning_rate=rate, seed=1000 + seed, measure=lengths.measure)
    if name == "small":
        model.save_pretrained(small)
    record = {
        "run": name,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learning_rate": rate,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }
    (directory / f"{name}-{seed}.json").write_text(json.dumps(record))


def run_all(base: list[str], seeds: int, starts: Mapping[str, Start]) -> None:
    """Carry out every run, each in a process of its own, two at a time; first the small model.

    `base` is the command that "--run NAME" and "--seed N" complete.
    """
    subprocess.run([*base, "--run", "small"], check=True)
    long_first = sorted(starts, key=lambda name: starts[name].grow is not None)
    waiting = [[*base, "--run", name, "--seed", str(seed)] for seed in range(seeds) for name in long_first]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(subprocess.Popen(waiting.pop(0)))
        for process in list(running):
            if process.poll() is not None:
                running.remove(process)
                if process.returncode:
                    sys.exit(f"{process.args} failed with exit code {process.returncode}")
        time.sleep(0.2)


def tokens_to_reach(curve: list[list[float]], loss: float) -> float | None:
    """Return the tokens after which a curve first is at or below `loss`, between two measurements linearly."""
    for (before, high), (after, low) in pairwise(curve):
        if high <= loss:
            return before
        if low <= loss:
            return before + (high - loss) / (high - low) * (after - before)
    return None


def mean_curve(records: list[dict[str, Any]]) -> list[list[float]]:
    """Return the mean over seeds of curves that are measured at the same tokens."""
    points = zip(*(record["curve"] for record in records), strict=True)
    return [[group[0][0], sum(loss for _, loss in group) / len(group)] for group in points]


def gather(directory: Path, seeds: int, starts: Mapping[str, Start]) -> dict[str, Any]:
    """Return the curves, and for each grown model how many tokens the random model needs for the same loss."""
    runs = {
        name: [json.loads((directory / f"{name}-{seed}.json").read_text()) for seed in range(seeds)] for name in starts
    }
    small = json.loads((directory / "small-0.json").read_text())
    curves = {name: mean_curve(records) for name, records in runs.items()}
    spent = small["parameters"] * small["curve"][-1][0]
    rows = {}
    for name, start in starts.items():
        parameters = runs[name][0]["parameters"]
        curve, random = curves[name], curves[f"random-{start.like}"]
        tokens, final = curve[-1]
        row: dict[str, Any] = {
            "parameters": parameters,
            "start": curve[0][1],
            "tokens": tokens,
            "final": final,
            "finals": [record["curve"][-1][1] for record in runs[name]],
        }
        if start.grow is not None:
            needed = tokens_to_reach(random, final)
            same = next((loss for at, loss in random if at >= tokens), random[-1][1])
            row["random_at_same_tokens"] = same
            row["random_needs"] = needed
            row["ratio"] = needed / tokens if needed else None
            whole = runs[f"random-{start.like}"][0]["parameters"]
            row["ratio_with_pretraining"] = needed * whole / (tokens * parameters + spent) if needed else None
        rows[name] = row
    return {"small": small, "curves": curves, "rows": rows, "seeds": seeds}


def table(results: dict[str, Any], starts: Mapping[str, Start]) -> str:
    """Return the figures as a table in Markdown."""
    small = results["small"]
    tokens, loss = small["curve"][-1]
    lines = [
        f"Small model: {small['parameters']:,} parameters, {tokens / 1e6:.2f} M tokens, loss {loss:.3f}.",
        f"Means of {results['seeds']} seeds; in brackets each.",
        "",
        "| start | parameters | loss before | tokens | loss after | random, as many | random needs | ratio | in all |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["rows"].items():
        finals = ", ".join(f"{final:.3f}" for final in row["finals"])
        cells = [starts[name].label, f"{row['parameters']:,}", f"{row['start']:.3f}", f"{row['tokens'] / 1e6:.2f} M"]
        cells.append(f"{row['final']:.3f} ({finals})")
        if starts[name].grow is None:
            cells += ["", "", "1", ""]
        else:
            longest = results["curves"][f"random-{starts[name].like}"][-1][0]
            needs, ratio, total = row["random_needs"], row["ratio"], row["ratio_with_pretraining"]
            cells.append(f"{row['random_at_same_tokens']:.3f}")
            cells.append(f"{needs / 1e6:.2f} M" if needs else f"> {longest / 1e6:.2f} M")
            cells.append(f"{ratio:.1f}x" if ratio else f"> {longest / row['tokens']:.1f}x")
            cells.append(f"{total:.1f}x" if total else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path, starts: Mapping[str, Start], *, top: float = 2.0) -> None:
    """Draw the curves: one panel for each of two large shapes, with losses up to `top`."""
    from surgeon.plots.figure import BLACK, GREY, clean, line_style, new_figure, save

    figure = new_figure(10, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    curves = {name: [(tokens / 1e6, loss) for tokens, loss in curve] for name, curve in results["curves"].items()}
    small = results["small"]["curve"][-1][1]
    low = min(loss for curve in curves.values() for _, loss in curve)
    for panel, like in zip(panels, dict.fromkeys(start.like for start in starts.values()), strict=True):
        random = curves[f"random-{like}"]
        grown = sorted(
            (name for name in starts if starts[name].like == like and starts[name].grow is not None),
            key=lambda name: -curves[name][-1][1],
        )
        panel.axhline(small, color=GREY, linewidth=0.8, zorder=0)
        panel.annotate("small model", (0.62 * random[-1][0], small), va="top", color=GREY, fontsize=8)
        panel.plot(*zip(*random, strict=True), color=BLACK, linewidth=1.8, linestyle="--")
        middle = random[len(random) // 3]
        panel.annotate("random weights", middle, xytext=(6, 6), textcoords="offset points", color=BLACK, fontsize=9)
        for place, name in enumerate(grown):
            style = line_style(place) | {"linestyle": "-", "markersize": 3.5, "markevery": 2, "linewidth": 1.4}
            panel.plot(*zip(*curves[name], strict=True), **style)
            x, y = curves[name][-1]
            at = (x + 0.06 * random[-1][0], min(small, curves[grown[0]][-1][1] + 0.02) - 0.042 * place)
            color = style["color"]
            line = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)}
            label = starts[name].label
            panel.annotate(label, (x, y), xytext=at, color=color, fontsize=9, va="center", arrowprops=line)
        panel.set(
            title=f"{like}: {results['rows'][f'random-{like}']['parameters']:,} parameters", ylim=(low - 0.12, top)
        )
        panel.set_xlabel("tokens of the large model (millions)")
        clean(panel)
    panels[0].set_ylabel("validation loss (nats/byte)")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def command_line(description: str | None, *, directory: str, picture: Path) -> argparse.ArgumentParser:
    """Return the parser of a benchmark whose runs are processes of their own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps of each run: does it work at all?")
    parser.add_argument("--directory", type=Path, default=Path(directory), help="where checkpoints and curves go")
    parser.add_argument("--plot", type=Path, default=picture)
    parser.add_argument("--report", action="store_true", help="only tables and plot, from curves that are there")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Carry out the chosen runs, and report."""
    options = command_line(__doc__, directory="grow-training", picture=PLOT).parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    lengths = QUICK if options.quick else Lengths()
    if options.run:
        run(options.run, options.seed, options.directory, lengths)
        return
    seeds = 1 if options.quick else options.seeds
    if not options.report:
        quick = ["--quick"] if options.quick else []
        run_all([sys.executable, __file__, "--directory", str(options.directory), *quick], seeds, STARTS)
    results = gather(options.directory, seeds, STARTS)
    (options.directory / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results, STARTS))
    plot(results, options.directory / "quick.png" if options.quick else options.plot, STARTS)


if __name__ == "__main__":
    main()
