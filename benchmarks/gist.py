"""Train gists and both of the paper's bounds on instructions, and compare them on unseen instructions.

    python benchmarks/gist.py MODEL --data seen.json unseen.json --records 200 --tokens 4 --output gist

The last records of the last file are held out. Three models are trained on all others, with the same steps and rates:
one that compresses each instruction into a gist, the positive control that also sees the instruction, and the negative
control that sees neither (`surgeon finetune --gist`). Each then reads the held-out records in its own form.
A training is skipped if its output exists; `--only NAME` runs one of them, so that machines can share the work.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shared import finetune

import surgeon
from surgeon.evals.generation import load_whole
from surgeon.evals.gist import EXACT, LOSS, ROUGE, GistEvaluation
from surgeon.evals.gist_answers import answer_losses, answers
from surgeon.evals.metrics import exact_match, rouge_l
from surgeon.gist.records import FULL, GIST, NONE, Record, read_forms
from surgeon.gist.tokens import read_gist
from surgeon.models.loading import load_tokenizer, loadable
from surgeon.surgery import open_source

CONTROLS = {"gist": "none", "positive": "positive", "negative": "negative"}
SEES = {"positive": FULL, "gist": GIST, "negative": NONE}  # the form in which each model sees a record
FIELDS = ("instruction", "input", "output")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def split(files: Sequence[Path], into: Path, count: int) -> tuple[str, str]:
    """Return the names of two files: the records to train on, and the last `count` records, held out.

    Training records with a held-out instruction are left out.
    """
    records = [{field: record[field] for field in FIELDS} for file in files for record in json.loads(file.read_text())]
    held_out = records[-count:]
    known = {record["instruction"].strip().lower() for record in held_out}
    trained = [record for record in records[:-count] if record["instruction"].strip().lower() not in known]
    paths = into / "trained.jsonl", into / "held-out.jsonl"
    for path, part in zip(paths, (trained, held_out), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
    print(f"{len(trained)} records to train on, {len(held_out)} held out", flush=True)
    return str(paths[0]), str(paths[1])


def train(model: Path, name: str, output: Path, **options: Any) -> None:
    """Train one of the three models, unless its output exists, and write the results of the training beside it."""
    if output.exists():
        return
    results = finetune(model, output, gist=True, gist_control=CONTROLS[name], **options)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1, default=str) + "\n")


def records_for(name: str, source: Any, held_out: str) -> list[Record]:
    """Return the held-out records as a model was trained to see them; the positive control sees gist tokens too."""
    gist = read_gist(source.config)
    assert gist is not None
    records = read_forms([held_out], load_tokenizer(*loadable(source)), gist, num_tokens=gist.num_tokens, samples=None)
    if name != "positive":
        return records
    return [replace(record, prompt=(*record.prompt, *record.gist)) for record in records]


def scored(model: Path, name: str, held_out: str, *, max_new_tokens: int) -> dict[str, Any]:
    """Return the scores and the answers of a model on the held-out records, in the form that it was trained in."""
    source = open_source(model)
    records, loaded = records_for(name, source, held_out), load_whole(source, DEVICE)
    losses = answer_losses(loaded, records, SEES[name], batch_size=8)
    loaded.generation_config.suppress_tokens = list(records[0].gist)
    tokenizer = load_tokenizer(*loadable(source))
    written = answers(loaded, tokenizer, records, SEES[name], max_new_tokens=max_new_tokens, batch_size=8)
    pairs = [(answer, record.reference) for answer, record in zip(written, records, strict=True)]
    return {
        LOSS: tuple(losses),
        ROUGE: tuple(rouge_l(*pair) for pair in pairs),
        EXACT: tuple(exact_match(*pair) for pair in pairs),
        "written": written,
    }


def compared(models: Path, held_out: str, *, max_new_tokens: int) -> GistEvaluation:
    """Return the three models side by side, each in the form that it was trained in."""
    began = time.perf_counter()
    scores = {name: scored(models / name, name, held_out, max_new_tokens=max_new_tokens) for name in SEES}
    records = records_for("gist", open_source(models / "gist"), held_out)
    predictions = [
        {"prompt": record.where, "reference": record.reference}
        | {name: each["written"][number] for name, each in scores.items()}
        for number, record in enumerate(records)
    ]
    return GistEvaluation(
        model="three models: positive control, gist, negative control",
        outcomes={
            measure: {SEES[name]: each[measure] for name, each in scores.items()} for measure in (LOSS, ROUGE, EXACT)
        },
        sizes=tuple(len(record.answer) for record in records),
        gist_tokens=len(records[0].gist),
        prompt_tokens=sum(len(record.begin) + len(record.prompt) for record in records) / len(records),
        setup={"data": [held_out], "dtype": "float32", "max_new_tokens": max_new_tokens},
        predictions=tuple(predictions),
        seconds=time.perf_counter() - began,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="lists of instruction, input and output")
    parser.add_argument("--records", type=int, default=200, help="how many are held out")
    parser.add_argument("--tokens", type=int, default=4, help="of a gist")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=384)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--only", choices=tuple(CONTROLS), help="train this one and stop")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    trained, held_out = split(options.data, options.output, options.records)

    start = options.output / "start"
    if not start.exists():
        surgeon.add_gist(options.model, tokens=options.tokens).save(start)
    shared = {
        "data": [trained],
        "epochs": options.epochs,
        "lr": options.lr,
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "warmup": 0.05,
        "eval_fraction": 0.02,  # of the trained records: the held-out ones are not looked at
        "eval_rows": 8,
        "save_every": 100,
        "keep_checkpoints": 1,
    }
    for name in [options.only] if options.only else CONTROLS:
        train(start, name, options.output / name, **shared)
    if options.only:
        return
    evaluation = compared(options.output, held_out, max_new_tokens=options.max_new_tokens)
    print(evaluation.to_text(), flush=True)
    closer = evaluation.difference(LOSS, GIST, FULL)
    print(f"loss, gist - positive: {closer.value:+.4f} ± {closer.error:.4f}", flush=True)
    trainings = {name: json.loads((options.output / f"{name}.json").read_text()) for name in CONTROLS}
    figures = {"trainings": trainings, "evaluation": evaluation.to_dict(), "command": sys.argv}
    (options.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (options.output / "written.json").write_text(
        json.dumps(evaluation.predictions, indent=1, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    main()
