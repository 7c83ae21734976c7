"""Heal a pruned model: its perplexity on held-out text before, after plain training, and after distillation.

    python benchmarks/heal.py MODEL --text wikitext2-valid.txt --layers 24 --output heal

The first nine tenths of the text are for training, the rest for measuring. The model is cut by angular distance, then
trained twice with the same steps and the same rate, chosen by `--lr auto`: on the text alone, and with the KL to the
unpruned model added. Differences are paired, on the same tokens; errors are standard errors.
"""

import argparse
import json
import sys
from pathlib import Path

from shared import finetune

import surgeon


def split(text: Path, into: Path, share: float) -> tuple[str, str]:
    """Return the names of two files with the first `share` of a text and the rest, cut at the end of a line."""
    whole = text.read_text(encoding="utf-8")
    at = whole.rindex("\n", 0, int(share * len(whole))) + 1
    paths = into / "trained.txt", into / "held-out.txt"
    for path, part in zip(paths, (whole[:at], whole[at:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return str(paths[0]), str(paths[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--lr", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--kd-weight", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=64, help="rows of 512 held-out tokens that are measured on")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    trained, held_out = split(options.text, options.output, 0.9)

    pruned = options.output / "pruned"
    if not pruned.exists():
        surgery = surgeon.prune(
            options.model, score="angular", layers=options.layers, data=[trained], samples=16, evaluate=False
        )
        print(f"dropped layers {list(surgery.choice.dropped)}", flush=True)
        surgery.save(pruned)
    shared = {
        "data": [trained],
        "max_steps": options.max_steps,
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "precision": options.precision,
        "eval_fraction": 0.03,  # of the trained text: the rate is chosen without the held-out text
        "eval_rows": 16,
        "save_every": 0,
    }
    plain = finetune(pruned, options.output / "plain", overwrite=True, lr=options.lr, **shared)
    rate = f"{plain['learning_rate']:g}"
    teacher = {"teacher": options.model, "kd_weight": options.kd_weight}
    distilled = finetune(pruned, options.output / "distilled", overwrite=True, lr=rate, **shared, **teacher)

    rows = {}
    for name, model in {"pruned": pruned, "plain": plain["output"], "distilled": distilled["output"]}.items():
        evaluation = surgeon.evaluate(model, data=[held_out], baseline=options.model, samples=options.samples)
        rows[name] = evaluation.to_dict()
        print(evaluation.to_text(), flush=True)
    against = surgeon.evaluate(distilled["output"], data=[held_out], baseline=plain["output"], samples=options.samples)
    rows["distilled against plain"] = against.to_dict()
    print(against.to_text(), flush=True)
    figures = {"runs": {"plain": plain, "distilled": distilled}, "evaluations": rows, "command": sys.argv}
    (options.output / "heal.json").write_text(json.dumps(figures, indent=1, default=str) + "\n")
    from surgeon.plots.training import plot_losses
    from surgeon.train.run_dir import read_metrics

    runs = [options.output / "plain.run", options.output / "distilled.run"]
    plot_losses([(run, read_metrics(run)) for run in runs], options.output / "heal.png")


if __name__ == "__main__":
    main()
