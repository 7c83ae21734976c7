"""Cuts of a model bare and compensated, on two texts that no fit sees: perplexity, loss, and acceptance as a draft.

    python benchmarks/compensate.py MODEL --data wikitext2-valid.txt --mix alpaca.json gsm8k.jsonl --other plays.txt

All texts are tokenised whole, as they stand in their files. Fit: 32 rows of 256 tokens of --data from token 8,192 on;
mixed, 16 of these, and 8 of each of the --mix. One row in eight is held out of the fit: it chooses the ridge, and
decides what is taken. Judged by tokens 100,000 to 104,096 of --data as 8 rows of 512, and by the first 1,024 tokens of
--other as 2 rows, in float32, with the solved weights rounded to the dtype of the checkpoint.
"""

import argparse
import math
import time
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from surgeon.anatomy.halves import ATTENTION, HALVES, MLP, Pairing
from surgeon.measure.calibration import Calibration
from surgeon.measure.candidates import Fitting, Reference
from surgeon.measure.scoring import ScoreRequest, losses_without, score, streamed_model
from surgeon.plan.planned import PlannedSource
from surgeon.search.figures import Figures
from surgeon.surgery import open_model
from surgeon.transforms.prune import prune, pruned_sizes
from surgeon.transforms.scores import CONTRIBUTION
from surgeon.verbs.compensating import Texts, compensated

BLOCKS = {
    "block 12-15": range(12, 16),
    "free 12-14, 26": (12, 13, 14, 26),
    "block 11-18": range(11, 19),
    "free 3, 12-15, 17, 25, 26": (3, 12, 13, 14, 15, 17, 25, 26),
}
SHIFTED = {"MLP of 11, 12-14, attention of 15": (11, 15), "MLP of 17, attention of 18": (17, 18)}
WIDTHS = {"MLP 1536 to 1152": {"ffn": 1152}, "9 heads to 6, 3 key-value heads to 2": {"heads": 6, "kv_heads": 2}}


def texts(options: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the rows of each fit, those that judge, and those of the other text."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def read(path: Path, most: int | None = None) -> Tensor:
        text = path.read_text(encoding="utf-8")[: None if most is None else 8 * most]
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)[:most]

    main = read(options.data)
    fit = main[8192:16384].view(32, 256)
    fits = {"one text": fit}
    if options.mix:
        fits["mixed"] = torch.cat([fit[:16], *(read(path, 2048).view(8, 256) for path in options.mix)])
    return fits, main[100_000:104_096].view(8, 512), read(options.other, 1024).view(2, 512)


def cuts(depth: int) -> dict[str, Pairing]:
    """Return the cuts in depth by name."""
    found = {name: Pairing.of_layers(i for i in range(depth) if i not in gone) for name, gone in BLOCKS.items()}
    for name, (first, last) in SHIFTED.items():
        inside = [(i, half) for i in range(first + 1, last) for half in HALVES]
        gone = {(first, MLP), (last, ATTENTION), *inside}
        found[name] = Pairing.of_halves((i, half) for i in range(depth) for half in HALVES if (i, half) not in gone)
    return found


def show(name: str, how: str, values: tuple[float, ...]) -> None:
    """Print a row of the table: perplexity, nats above the whole model, the same on the other text, acceptance."""
    perplexity, nats, other, *acceptance = values
    shown = " ".join(f"| {each:.3f}" for each in acceptance) or "| "
    print(f"| {name} | {how} | {perplexity:.2f} | {nats:+.3f} | {other:+.3f} {shown} |", flush=True)


def split(outcome: Figures, num: int) -> tuple[Figures, Figures]:
    """Return the outcome on the first rows, and on the others."""
    values = [getattr(outcome, item.name) for item in fields(outcome)]
    return Figures(*(value[:num] for value in values)), Figures(*(value[num:] for value in values))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mix", type=Path, nargs="*", default=[])
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--no-width", action="store_true", help="leave out the cuts in width")
    options = parser.parse_args()

    fits, judged, other = texts(options)
    begun = open_model(options.model)
    model = streamed_model(begun.source, "cpu", resident=True)
    reference = Reference(model, torch.cat([judged, other]))  # rows of one length
    num = len(judged)
    whole = split(reference.whole, num)
    print(f"whole model: {whole[0].perplexity:.2f}\n")
    print("| cut | fitted on | perplexity | nats | other text, nats | acceptance |")
    print("| --- | --- | --- | --- | --- | --- |")
    candidates = cuts(model.depth)
    for how, fitting in {"bare": None, **fits}.items():
        began = time.perf_counter()
        repair = None if fitting is None else Fitting(Reference(model, fitting))
        found = reference.measure(list(candidates.values()), repair=repair)
        for name, outcome in zip(candidates, found, strict=True):
            first, second = split(outcome, num)
            nats = (first.mean("loss") - whole[0].mean("loss"), second.mean("loss") - whole[1].mean("loss"))
            show(name, how, (first.perplexity, *nats, first.acceptance))
        print(f"<!-- {how}: {time.perf_counter() - began:.0f} s -->", flush=True)
    if not options.no_width:
        widths(begun, fits, judged, other, [outcome.mean("loss") for outcome in whole])


def widths(begun, fits: dict[str, Tensor], judged: Tensor, other: Tensor, whole: list[float]) -> None:
    """Print the rows of cuts in width, chosen by what they add on the rows of the fit."""
    for how, rows in fits.items():
        values = score(begun.source, rows, ScoreRequest(widths=(CONTRIBUTION,))).widths[CONTRIBUTION]
        for name, sizes in WIDTHS.items():
            plan = prune(begun.anatomy, sizes=pruned_sizes(begun.anatomy, sizes), values=values)
            bare = PlannedSource(begun.source, begun.plan.then(plan))
            began = time.perf_counter()
            texts = Texts(Calibration(rows, {"sources": []}))
            source, solved, _ = compensated(begun.source, begun.plan, plan, begun.anatomy, texts, device="cpu")
            seconds = time.perf_counter() - began
            for label, result in (("bare", bare), (how, PlannedSource(source, solved))):
                model = streamed_model(result, "cpu", resident=True)
                losses = [losses_without(model, rows, [frozenset()])[0] for rows in (judged, other)]
                nats = [loss - before for loss, before in zip(losses, whole, strict=True)]
                show(name, label, (math.exp(losses[0]), *nats))
            print(f"<!-- {how}: {seconds:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()
