"""RegMean beside the plain mean: two short finetunes of a model, merged, judged on held-out text with paired errors.

    python benchmarks/regmean.py SmolLM2-135M-Instruct --data plays.txt --data gsm8k.jsonl --work DIR

The model is finetuned on the first 60 % of each text; the two are merged by linear and by regmean, whose Gram matrices
are those of the same parts. Everything is judged on the rest of both texts, row by row. Each finetune should be better
than the model on its own text, else a merge shows nothing: they are in the table. What is done is kept in DIR and not
done again, so the command goes on where it was stopped, and prints the table of what there is.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MERGES = {
    "linear": (),
    "regmean .9": ("--alpha", "0.9"),
    "regmean 1": ("--alpha", "1.0"),
    "regmean .9, sequential": ("--alpha", "0.9", "--sequential"),
}
SAME_GRAMS = "regmean .9"  # its Gram matrices, which know no alpha, serve the others that are not sequential
BESIDE = "linear"


def main() -> None:
    """Make what is missing, judge it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True, help="two texts: 60 %% is read, the rest judged on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=40, help="of each finetune")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens of every row")
    parser.add_argument("--lr", default="5e-5")
    parser.add_argument("--samples", type=int, default=16, help="rows of each text for the Gram matrices")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of each text")
    parser.add_argument("--methods", nargs="*", default=list(MERGES), choices=list(MERGES))
    given = parser.parse_args()
    if len(given.data) != 2:
        parser.error("give two texts")
    given.work.mkdir(parents=True, exist_ok=True)
    experts = [finetuned(given, number) for number in (0, 1)]
    judged(given, "base", Path(given.model))
    for number, expert in enumerate(experts):
        judged(given, f"finetuned on {Path(given.data[number]).stem}", expert)
    for name in given.methods:
        judged(given, name, merged(given, name, experts))
    print(table(given))


def finetuned(given: argparse.Namespace, number: int) -> Path:
    """Return the model finetuned on the first part of a text."""
    target: Path = given.work / f"expert-{number}"
    if not (target / "config.json").exists():
        steps = ("--max-steps", given.max_steps, "--batch-size", given.batch_size, "--lr", given.lr)
        shape = ("--sequence-length", given.sequence_length, "--train-on", "all")
        alone = ("--eval-fraction", "0", "--save-every", "0", "--eval-rows", "4", "--eval-every", given.max_steps)
        data = ("--data", f"{given.data[number]}[:60%]")
        run("finetune", given.model, *data, *steps, *shape, *alone, "-o", target, "--overwrite", "--json")
    return target


def merged(given: argparse.Namespace, name: str, experts: list[Path]) -> Path:
    """Return the merge of this name."""
    target = place(given, name)
    if not (target / "config.json").exists():
        words: list[Any] = list(MERGES[name])
        if name != BESIDE:
            known = place(given, SAME_GRAMS)
            has_grams = "--sequential" not in words and (known / "grams.safetensors").exists()
            data = [known, known] if has_grams else [f"{each}[:60%]" for each in given.data]
            words += ["--method", "regmean", "--data", data[0], "--data", data[1]]
            words += ["--samples", given.samples, "--sequence-length", given.sequence_length]
        run("merge", *experts, *words, "-o", target, "--overwrite", "--json")
    return target


def place(given: argparse.Namespace, name: str) -> Path:
    work: Path = given.work
    return work / name.replace(", ", "-").replace(" ", "-").replace(".", "0.")


def run(*words: Any) -> None:
    command = [sys.executable, "-m", "surgeon", *map(str, words)]
    print("$ surgeon", *map(str, words), flush=True)
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    target = Path(words[words.index("-o") + 1])
    target.parent.joinpath(f"{target.name}.json").write_text(done.stdout)
    print(f"  {time.perf_counter() - began:.0f} s", flush=True)


def judged(given: argparse.Namespace, name: str, directory: Path) -> None:
    """Keep the sums of the losses of each held-out row of both texts."""
    import surgeon

    file = given.work / f"{name}.figures.json"
    if file.exists():
        return
    found = []
    for data in given.data:
        scored = surgeon.evaluate(
            directory, data=[f"{data}[60%:]"], samples=given.rows, sequence_length=given.sequence_length
        ).scored
        found.append({"loss": scored.outcomes["loss"], "sizes": scored.sizes})
    file.write_text(json.dumps(found))


def table(given: argparse.Namespace) -> str:
    """Return the losses, and of each the difference from the plain mean's with its paired error."""
    names = ["base", *(f"finetuned on {Path(each).stem}" for each in given.data), *MERGES]
    files = {name: given.work / f"{name}.figures.json" for name in names}
    figures = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    head = ["model", *(Path(each).stem for each in given.data), "mean of both", f"difference from {BESIDE}, paired"]
    lines = [head, ["---"] * len(head)]
    for name, own in figures.items():
        lines.append([name, *cells(own, figures.get(BESIDE) if name != BESIDE else None)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(own: list[Mapping[str, Any]], other: list[Mapping[str, Any]] | None) -> list[str]:
    """Return the losses on both texts, their mean, and the difference of the mean."""
    from surgeon.evals.compare import Estimate, estimate, mean_of, paired

    each = [estimate(text["loss"], text["sizes"]) for text in own]
    found, change = [f"{value.value:.3f}" for value in (*each, mean_of(each))], ""
    if other is not None:
        pairs = [paired(a["loss"], b["loss"], a["sizes"]) for a, b in zip(own, other, strict=True)]
        apart = mean_of([Estimate(pair.value, pair.error) for pair in pairs])
        found[:2] = [
            f"{loss} ({pair.value:+.4f} ± {pair.error or 0:.4f})" for loss, pair in zip(found, pairs, strict=False)
        ]
        change = f"{apart.value:+.4f} ± {apart.error or 0:.4f}"
    return [*found, change]


if __name__ == "__main__":
    main()
