"""What attribution is worth: whether its scores foretell what training without some rows does, its cost, and healing.

    python benchmarks/attribute.py lds  --data plays.txt --data gsm8k.jsonl --data articles.txt --work DIR
    python benchmarks/attribute.py time --model SmolLM2-135M-Instruct --data gsm8k.jsonl --work DIR
    python benchmarks/attribute.py heal --data plays.txt --data gsm8k.jsonl --data articles.txt --work DIR

`lds` is the linear datamodeling score (Park et al. 2023, arXiv:2303.14186, section 2): a toy is trained on many random
halves of a few rows; for each query the rank correlation over the halves of its loss and of the summed scores of the
rows that the half has; the mean over queries, with its standard error. The ceiling is the same correlation between two
trainings of each half that see its rows in another order. `time` is the time of a row's gradient beside that of a step
of training, in turns. `heal` trains a cut toy on rows that are
selected in each way for one of the texts. What is done is kept in DIR.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

QUERIES_A_SOURCE = 10
LENGTH = 64  # tokens of a row of the toy: no text is cut
TRAINED: dict[str, Any] = {"batch_size": 8, "sequence_length": LENGTH, "lr": "3e-3", "warmup": 0.1, "packing": "off"}
SHAPES: dict[str, dict[str, Any]] = {
    "trak, ridge .001": {"ridge": 0.001},
    "trak, ridge .01": {"ridge": 0.01},
    "trak, ridge .1": {"ridge": 0.1},
    "trak, ridge 1": {"ridge": 1.0},
    "trak, ridge .01, projected to 8 x 8": {"ridge": 0.01, "projection": "8"},
    "trak, ridge .01, projected to 4 x 4": {"ridge": 0.01, "projection": "4"},
    "less": {"method": "less"},
    "cosine": {"method": "cosine"},
    "tracin": {"method": "tracin"},
    "bm25": {"method": "bm25"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("lds", "time", "heal"))
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", help="of time")
    parser.add_argument("--rows", type=int, default=128, help="of lds: training rows, in equal parts of each text")
    parser.add_argument("--halves", type=int, default=48, help="of lds")
    parser.add_argument("--epochs", type=float, default=4, help="of lds")
    parser.add_argument("--steps", type=int, default=40, help="of heal: in each training")
    parser.add_argument("--pool", type=int, default=400, help="of heal: rows of each text to select from")
    parser.add_argument("--seeds", type=int, default=2, help="of heal: trainings of each selection")
    parser.add_argument("--targets", type=int, nargs="*", default=[0, 1], help="of heal: the texts to heal for")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    {"lds": lds, "time": timed, "heal": heal}[given.part](given)


# --- the linear datamodeling score --------------------------------------------------------------------------------


def lds(given: argparse.Namespace) -> None:
    """Train on halves, score rows in each way, and print the table."""
    toy = _toy(given)
    run = _run(given, toy)
    losses = [_losses(given, toy, seed) for seed in (1, 2)]
    assert losses[0].shape[1] == QUERIES_A_SOURCE * len(given.data), "each query is one row"
    halves = _halves(given)
    numbers = {"ceiling": _correlations(losses[0], losses[1])}
    numbers["random"] = _lds(np.random.default_rng(5).standard_normal((given.rows, losses[0].shape[1])), halves, losses)
    for name, how in SHAPES.items():
        for model in (run, run.with_suffix("")):
            is_run = model is run
            if not is_run and how.get("method") in ("less", "bm25"):
                continue
            scores = _scores(given, model, name, is_run, how)
            shown = name if name == "bm25" else f"{name}, {'3 checkpoints' if is_run else 'the result alone'}"
            numbers[shown] = _lds(scores, halves, losses)
    top = float(numbers["ceiling"].mean())
    none = numbers["random"]
    print(f"\n{given.rows} rows, {losses[0].shape[1]} queries, {len(halves)} halves")
    print(
        f"standard deviation of a query's loss over halves {losses[0].std(0).mean():.4f}, of a training's order "
        f"{np.abs(losses[0] - losses[1]).mean() / 1.128:.4f}"
    )
    print("\n| scores | LDS | of the ceiling | above random, in standard errors |\n| --- | --- | --- | --- |")
    for name, found in numbers.items():
        error = found.std(ddof=1) / len(found) ** 0.5
        both = (found - none).std(ddof=1) / len(found) ** 0.5
        above = "" if name == "random" else f"{(found - none).mean() / both:.1f}"
        print(f"| {name} | {found.mean():.3f} ± {error:.3f} | {100 * found.mean() / top:.0f} % | {above} |")


def _toy(given: argparse.Namespace) -> Path:
    """Return a toy that was trained on other parts of the texts, and write rows and queries."""
    import talkers

    import surgeon

    place: Path = given.work / "toy"
    if (place / "config.json").exists():
        return place
    texts = [_lines(Path(name)) for name in given.data]
    draw = random.Random(0)
    rows: list[str] = []
    asked: list[str] = []
    rest: list[str] = []
    for lines in texts:
        draw.shuffle(lines)
        each = given.rows // len(texts)
        rows += lines[:each]
        asked += lines[each : each + QUERIES_A_SOURCE]
        rest += lines[each + QUERIES_A_SOURCE : each + QUERIES_A_SOURCE + 1500]
    talkers.jsonl(given.work / "rows.jsonl", *[{"text": text} for text in rows])
    talkers.jsonl(given.work / "queries.jsonl", *[{"text": text} for text in asked])
    plays = rest[: len(rest) // len(texts)]  # only of the first text: the rows have something to teach
    talkers.jsonl(given.work / "before.jsonl", *[{"text": text} for text in plays])
    talkers.talker(given.work / "begun", text="\n".join(rest), num_hidden_layers=3)
    options = TRAINED | {"max_steps": 300, "batch_size": 16, "save_every": 0}
    surgeon.finetune(given.work / "begun", data=[str(given.work / "before.jsonl")], output=place, **options)
    return place


def _lines(path: Path) -> list[str]:
    """Return texts of about a row of the toy's tokens."""
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        parts = [record["answer"].replace("\n", " ") for record in records]
    elif path.suffix == ".json":
        parts = [record["output"] for record in json.loads(path.read_text())]
    else:
        parts = [line.strip() for line in path.read_text().splitlines()]
    return [part[:60] for part in parts if len(part) >= 50 and part.isascii()]


def _run(given: argparse.Namespace, toy: Path) -> Path:
    """Return the directory of the run that is attributed, on all rows, with three checkpoints."""
    import surgeon

    target = given.work / "tuned"
    steps = round(given.epochs * given.rows / TRAINED["batch_size"])
    if not (target / "config.json").exists():
        every = {"save_every": max(1, steps // 3), "keep_checkpoints": 3, "epochs": given.epochs, "eval_fraction": 0.0}
        trained = surgeon.finetune(toy, data=[str(given.work / "rows.jsonl")], output=target, **TRAINED, **every)
        print(f"all rows: {trained.steps} steps, loss {trained.train_loss:.3f}", flush=True)
    return given.work / "tuned.run"


def _halves(given: argparse.Namespace) -> np.ndarray:
    draw = np.random.default_rng(7)
    return np.stack([np.sort(draw.permutation(given.rows)[: given.rows // 2]) for _ in range(given.halves)])


def _losses(given: argparse.Namespace, toy: Path, seed: int) -> np.ndarray:
    """Return the loss of each query after training on each half, (halves, queries)."""
    file = given.work / f"losses-{seed}.npy"
    if file.exists():
        return np.load(file)
    train, losses = _trainer_of(given, toy, seed), []
    began = time.process_time()
    for number, half in enumerate(_halves(given)):
        losses.append(train(half))
        if number % 10 == 9:
            print(f"seed {seed}, {number + 1} halves, {time.process_time() - began:.0f} CPU s", flush=True)
    np.save(file, np.array(losses))
    return np.array(losses)


def _trainer_of(given: argparse.Namespace, toy: Path, seed: int) -> Callable[[np.ndarray], list[float]]:
    """Return a function that trains the toy on some rows as `finetune` does, and returns the losses of the queries."""
    from surgeon.attribution.snapshots import loading
    from surgeon.models.loading import load_tokenizer, quiet_transformers
    from surgeon.surgery import open_source
    from surgeon.train.arguments import arguments
    from surgeon.train.data import only
    from surgeon.train.inputs import Inputs
    from surgeon.train.settings import Settings
    from surgeon.train.task import Task
    from surgeon.train.tokenise import prepare
    from surgeon.train.trainer import SurgeonTrainer

    settings = Settings(**TRAINED, epochs=given.epochs, seed=seed, eval_fraction=0.0, save_every=0, precision="float32")
    source, task = open_source(toy), Task(settings)
    inputs = Inputs(source, (str(given.work / "rows.jsonl"),), task, "cpu", print, lambda: None)
    data = inputs.data(given.work / f"tokens-{seed}", None, None)
    asked = prepare(
        [str(given.work / "queries.jsonl")],
        load_tokenizer(str(toy)),
        directory=given.work / f"asked-{seed}",
        sequence_length=LENGTH,
        task=task,
    )
    model = loading(source, task, None)()
    begun = {name: value.clone() for name, value in model.state_dict().items()}

    def train(pieces: np.ndarray) -> list[float]:
        model.load_state_dict(begun)
        part = replace(only(data, pieces, settings, sequence_length=LENGTH), held_out={})
        steps = inputs.steps(part)
        how = arguments(settings, part, run_dir=given.work / "one", lr=3e-3, steps=steps, device="cpu", resumed=True)
        how.eval_strategy = "no"
        with quiet_transformers():
            SurgeonTrainer(model, how, data=part, on_step=lambda logs: None, on_evaluation=lambda losses: None).train()
        return _losses_of(model, asked)

    return train


def _losses_of(model: Any, store: Any) -> list[float]:
    """Return the loss of each piece of a store."""
    import torch

    from surgeon.train.data import Collator, RowDataset
    from surgeon.train.packing import one_per_row

    rows, collate = RowDataset(store, one_per_row(store.lengths)), Collator(0, with_index=True)
    model.eval()
    with torch.no_grad():
        found = [float(model(**collate([rows[index]]), taught=False)["loss"]) for index in range(len(rows))]
    model.train()
    return found


def _scores(given: argparse.Namespace, model: Path, name: str, is_run: bool, how: dict[str, Any]) -> np.ndarray:
    """Return the score of each row for each query, (rows, queries)."""
    import pyarrow.parquet

    import surgeon

    words = "".join(c if c.isalnum() else "-" for c in name)
    target = given.work / "scores" / f"{words}-{'run' if is_run else 'last'}"
    if not target.exists():
        asked = {"query": [str(given.work / "queries.jsonl")], "output": target}
        data = {} if is_run else {"data": [str(given.work / "rows.jsonl")], "sequence_length": LENGTH}
        surgeon.attribute(model, **asked, **data, **how)
    table = pyarrow.parquet.read_table(target / "scores.parquet").to_pydict()
    assert table["row"] == list(range(given.rows))
    return np.stack([table[key] for key in table if key.startswith("query_")], 1)


def _lds(scores: np.ndarray, halves: np.ndarray, losses: Sequence[np.ndarray]) -> np.ndarray:
    """Return the score of each query, the mean over both trainings."""
    sums = np.stack([scores[half].sum(0) for half in halves])
    return np.mean([_correlations(sums, -each) for each in losses], 0)


def _correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the rank correlation of each column of two arrays; ranks of equal numbers go by their order."""
    ranks = [np.argsort(np.argsort(each, axis=0), axis=0).astype(float) for each in (one, other)]
    return np.array([np.corrcoef(left, right)[0, 1] for left, right in zip(ranks[0].T, ranks[1].T, strict=True)])


# --- what it costs ------------------------------------------------------------------------------------------------


def timed(given: argparse.Namespace) -> None:
    """Time a step of training and the gradients of the same rows, in turns, and print both."""
    import torch

    from surgeon.attribution.gradients import RowGradients, maps_of
    from surgeon.attribution.rows import Batches
    from surgeon.attribution.snapshots import loading
    from surgeon.models.loading import load_tokenizer
    from surgeon.surgery import open_source
    from surgeon.train.data import Collator
    from surgeon.train.settings import Settings
    from surgeon.train.task import Task
    from surgeon.train.tokenise import prepare

    source, task = open_source(given.model), Task(Settings(train_on="all"))
    how: dict[str, Any] = {"directory": given.work / "timed", "sequence_length": 128, "task": task}
    store = prepare([f"{given.data[0]}[:40]"], load_tokenizer(given.model), **how)
    model = loading(source, task, None)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    longest = np.argsort(-store.lengths, kind="stable")[:4]
    _, batch, counts, spans = next(iter(Batches(store, longest, Collator(0, with_index=True), batch_size=4)))
    plain, shaped = maps_of(model), maps_of(model)
    for number, (one, other) in enumerate(zip(plain, shaped, strict=True)):
        one.project(0, number, 16)
        other.project(0, number, 16)
        other.scale = torch.ones(other.outs, other.ins)

    def step() -> None:
        model.train()
        model(**batch, num_items=int(counts.sum()))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def gradients(maps: Any) -> None:
        found = RowGradients(model, maps)
        with found.ready():
            found(batch, counts, spans, taught=True)

    ways = {
        "a step of training": step,
        "gradients, projected to 16 x 16": lambda: gradients(plain),
        "the same, shaped by Adam's squares (less)": lambda: gradients(shaped),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(4):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn:  # the first one warms up
                taken[name].append(time.process_time() - began)
    tokens = int((batch["token_index"] >= 0).sum())
    print(
        f"{given.model}: {len(counts)} rows, {tokens} tokens together; CPU seconds on {torch.get_num_threads()} thread"
    )
    base = statistics.median(taken["a step of training"])
    print("| | median | least to most | of a step |\n| --- | --- | --- | --- |")
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {middle:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {middle / base:.2f} |")


# --- healing ------------------------------------------------------------------------------------------------------


def heal(given: argparse.Namespace) -> None:
    """Cut a toy, heal it on rows that are selected in each way for one of the texts, and print the losses on that."""
    import surgeon

    cut = _cut(given)
    table = []
    for number in given.targets:
        name = Path(given.data[number]).stem
        before = _row_losses(cut, given.work / f"judged-{number}.jsonl")
        uncut = _row_losses(given.work / "whole", given.work / f"judged-{number}.jsonl")
        found: dict[str, list[np.ndarray]] = {}
        for by in ("random", "bm25", "less", "all"):
            for seed in range(given.seeds if by != "all" else 1):
                target = given.work / f"healed-{number}-{by}-{seed}"
                how = TRAINED | {"max_steps": given.steps, "seed": seed, "eval_fraction": 0.0, "save_every": 0}
                how |= {} if by == "all" else {"select": "5%", "select_by": by}
                how |= {"select_for": (str(given.work / f"asked-{number}.jsonl"),)} if by in ("bm25", "less") else {}
                if not (target / "config.json").exists():
                    began = time.process_time()
                    surgeon.finetune(cut, data=[str(given.work / "pool.jsonl")], output=target, **how)
                    print(f"{target.name}: {time.process_time() - began:.0f} CPU s", flush=True)
                found.setdefault(by, []).append(_row_losses(target, given.work / f"judged-{number}.jsonl"))
        means = {by: np.mean(losses, 0) for by, losses in found.items()}
        table.append([name, f"{uncut.mean():.3f}", f"{before.mean():.3f}"])
        for by in means:
            less = means[by] - means["random"]
            error = less.std(ddof=1) / len(less) ** 0.5
            beside = "" if by == "random" else f" ({less.mean():+.3f} ± {error:.3f})"
            table[-1].append(f"{means[by].mean():.3f}{beside}")
    print("\n| healed for | uncut | cut | random 5 % | bm25 5 % | less 5 % | all rows |\n" + "| --- " * 7 + "|")
    for line in table:
        print(f"| {' | '.join(line)} |")


def _cut(given: argparse.Namespace) -> Path:
    """Return a toy that was trained on all texts, and then lost layers; write the pool, what is asked, and judged."""
    import talkers

    import surgeon

    place: Path = given.work / "cut"
    if (place / "config.json").exists():
        return place
    draw = random.Random(1)
    pool: list[str] = []
    before: list[str] = []
    for number, name in enumerate(given.data):
        lines = _lines(Path(name))
        draw.shuffle(lines)
        parts = [lines[start : start + size] for start, size in ((0, 40), (40, 100), (140, given.pool))]
        talkers.jsonl(given.work / f"asked-{number}.jsonl", *[{"text": text} for text in parts[0]])
        talkers.jsonl(given.work / f"judged-{number}.jsonl", *[{"text": text} for text in parts[1]])
        pool += parts[2]
        before += lines[140 + given.pool : 140 + given.pool + 1500]
    talkers.jsonl(given.work / "pool.jsonl", *[{"text": text} for text in pool])
    talkers.jsonl(given.work / "before.jsonl", *[{"text": text} for text in before])
    talkers.talker(given.work / "begun", text="\n".join(before))
    options = TRAINED | {"max_steps": 400, "batch_size": 16, "save_every": 0}
    surgeon.finetune(
        given.work / "begun", data=[str(given.work / "before.jsonl")], output=given.work / "whole", **options
    )
    surgeon.truncate(given.work / "whole", layers=4).save(place)
    return place


def _row_losses(model: Path, records: Path) -> np.ndarray:
    """Return the loss of each record, in nats a token."""
    from surgeon.attribution.snapshots import loading
    from surgeon.models.loading import load_tokenizer
    from surgeon.surgery import open_source
    from surgeon.train.settings import Settings
    from surgeon.train.task import Task
    from surgeon.train.tokenise import prepare

    task = Task(Settings())
    with tempfile.TemporaryDirectory() as directory:
        how: dict[str, Any] = {"directory": Path(directory), "sequence_length": LENGTH, "task": task}
        store = prepare([str(records)], load_tokenizer(str(model)), **how)
        return np.array(_losses_of(loading(open_source(model), task, None)(), store))


if __name__ == "__main__":
    main()
