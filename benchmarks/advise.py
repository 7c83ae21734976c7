"""Toys of three sizes on three shares of a text: what `surgeon advise` says of each, and then what training shows.

    python benchmarks/advise.py --text gsm8k.jsonl --output judged
    python benchmarks/advise.py --text wikitext2-valid.txt --output fitted --sizes fitted
    python benchmarks/advise.py --fit fitted judged

The first command judges: it writes verdict and over-fit epoch of all nine cells to verdicts.json, trains the cells with
`surgeon finetune`, and prints both. The second one trains cells of other sizes on other shares. The third one fits the
constants of `cost.laws.OVERFIT` to the curves of such directories. All take up where they were stopped, cell by cell.
The text is cut into blocks of lines; every 16th is held out, and a share is every n-th of the others, so that all of
them are of one kind.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from shared import finetune

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.cost.flops import body_parameters
from surgeon.cost.laws import GAP, Overfit, Reach, Verdict
from surgeon.data.documents import documents
from surgeon.surgery import open_source
from surgeon.train.run_dir import read_metrics

BLOCK = 1000  # characters of a block of lines, at least
HELD_OUT = 16  # every so many blocks one is held out
ROWS, LENGTH = 16, 64
RUN: Mapping[str, Any] = {
    "batch_size": ROWS,
    "sequence_length": LENGTH,
    "lr": "3e-3",
    "warmup": 20,
    "schedule": "constant",  # so that a loss is that of a run that ends there
    "eval_rows": 64,
    "patience": 20,  # evaluations without a better one, after which a run has shown what it comes to
    "save_every": 0,
    "device": "cpu",
    "precision": "float32",
}
# Width and layers by name. The cells that are judged and those that the constants are fitted to cover one range.
SIZES = {"small": (32, 2), "between": (48, 2), "middle": (64, 2), "above": (80, 3), "large": (96, 3)}
JUDGED_STEPS, FITTED_STEPS = 500, 1000  # of a cell
JUDGED = [(size, share) for share in (0.01, 0.04, 0.5) for size in ("small", "middle", "large")]
FITTED = [(size, share) for share in (0.02, 0.06, 0.25) for size in ("between", "above")]
FITTED += [("small", 0.01), ("large", 0.01)]
CURVES = "curves.json"
FLAT = 0.03  # nats by which a curve must have risen, to have turned
WARM, FAR = 60_000, 0.7  # tokens from which a curve is fitted, and nats above its minimum up to which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text, or records: a file of data")
    parser.add_argument("--output", type=Path, help="directory of the cells")
    parser.add_argument("--sizes", choices=("judged", "fitted"), default="judged")
    parser.add_argument("--fit", type=Path, nargs="+", metavar="DIR", help="fit the constants to the cells in these")
    options = parser.parse_args()
    if options.fit:
        known = [json.loads((place / CURVES).read_text(encoding="utf-8")) for place in options.fit]
        curves = [Curve(**{**one, "name": f"{place.name}/{one['name']}"})
                  for place, each in zip(options.fit, known, strict=True) for one in each]  # fmt: skip
        law = fitted(curves)
        print(law)
        table(curves, [(law.verdict(c.body, c.unique, c.last), law.turning(c.body, c.unique)) for c in curves])
        return
    options.output.mkdir(parents=True, exist_ok=True)
    cells = FITTED if options.sizes == "fitted" else JUDGED
    text = "\n\n".join("\n".join(document.parts) for document in documents(options.text))
    held_out, texts = written(text, options.output, {share for _, share in cells})
    models = {name: built(options.output / name, *SIZES[name]) for name, _ in cells}
    if options.sizes == "judged":
        verdicts(options.output / "verdicts.json", {cell: (models[cell[0]], texts[cell[1]]) for cell in cells})
    steps = FITTED_STEPS if options.sizes == "fitted" else JUDGED_STEPS
    curves = []
    for name, share in cells:
        output = options.output / f"{name}-{share:g}"
        curves.append(curve_of(output, models[name], texts[share], held_out, steps))
        (options.output / CURVES).write_text(json.dumps([asdict(curve) for curve in curves]) + "\n", encoding="utf-8")
    if options.sizes == "judged":
        said = json.loads((options.output / "verdicts.json").read_text(encoding="utf-8"))
        table(curves, [(said[c.name]["verdict"], said[c.name]["over_fit"] or math.inf) for c in curves])


def verdicts(path: Path, cells: Mapping[tuple[str, float], tuple[Path, Path]]) -> None:
    """Write what `surgeon advise` says of each cell, unless that was written before: the runs come after it."""
    if path.exists():
        return
    said = {}
    for (name, share), (model, text) in cells.items():
        epochs = JUDGED_STEPS * ROWS * LENGTH / text.stat().st_size
        advice = surgeon.advise(model, data=[str(text)], epochs=epochs, sequence_length=LENGTH, device="cpu")
        rows = {row.quantity: row for row in advice.rows}
        said[f"{name}-{share:g}"] = {
            "verdict": advice.verdict,
            "over_fit": rows["over-fit"].value,
            "capacity": rows["capacity"].value,
            "inside": rows["over-fit"].inside,
            "epochs": epochs,
            "unique": advice.facts.unique,
            "loss": advice.facts.loss,
        }
    path.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def table(curves: Sequence["Curve"], said: Sequence[tuple[str, float]]) -> None:
    """Print what was said of each cell beside what came of it."""
    print("| cell | N | U | epochs | said | outcome | turns at, said | measured | rise | gap |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for curve, (verdict, turning) in zip(curves, said, strict=True):
        measured = "-" if curve.turning is None else f"{curve.turning:.1f}"
        print(
            f"| {curve.name} | {curve.body:,} | {curve.unique:,} | {curve.last:.1f} | {verdict} | {curve.outcome} | "
            f"{turning:.1f} | {measured} | {curve.rise:.2f} | {curve.gap:.2f} |"
        )
    right = sum(curve.outcome == verdict for curve, (verdict, _) in zip(curves, said, strict=True))
    print(f"{right} of {len(curves)} verdicts are the outcome")


def written(text: str, into: Path, shares: Iterable[float]) -> tuple[Path, dict[float, Path]]:
    """Return the files of the held-out text and of each share of the rest."""
    blocks, block = [], ""
    for line in text.splitlines(keepends=True):
        block += line
        if len(block) >= BLOCK:
            blocks.append(block)
            block = ""
    rest = [block for number, block in enumerate(blocks) if number % HELD_OUT]
    held_out = into / "held-out.txt"
    held_out.write_text("".join(blocks[::HELD_OUT]), encoding="utf-8")
    files = {}
    for share in shares:
        files[share] = into / f"share-{share:g}.txt"
        step = round(1 / share)
        files[share].write_text("".join(rest[step // 2 :: step]), encoding="utf-8")
    return held_out, files


def built(path: Path, hidden: int, layers: int) -> Path:
    """Return a checkpoint of a random llama of bytes."""
    if not path.exists():
        size = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "num_hidden_layers": layers}
        size |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2 * LENGTH}
        values = [f"{key}={value}" for key, value in size.items()]
        surgeon.init("llama", set=[*values, "tie_word_embeddings=true"], tokenizer="bytes").save(path)
    return path


def trained(model: Path, text: Path, held_out: Path, output: Path, steps: int) -> list[Mapping[str, Any]]:
    """Return the evaluations of a cell's training, which is done where it is not yet."""
    epoch = text.stat().st_size / (ROWS * LENGTH)  # in steps
    each = max(20, min(40, round(epoch / 2)))
    if not output.exists():
        finetune(model, output, data=[str(text)], eval_data=(str(held_out),), max_steps=steps, eval_every=each, **RUN)
    return [record for record in read_metrics(Path(f"{output}.run")) if "eval_loss" in record]


# --- the fit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The evaluations of a cell: epochs, losses on held-out and on trained text, of a body on so many unique tokens."""

    name: str
    body: int
    unique: int
    epochs: Sequence[float]
    validation: Sequence[float]
    probe: Sequence[float]

    @property
    def smooth(self) -> list[float]:
        """The losses on held-out text as means of three evaluations."""
        return [fmean(self.validation[max(0, i - 1) : i + 2]) for i in range(len(self.validation))]

    @property
    def turning(self) -> float | None:
        """The epoch of the lowest loss on held-out text; None where it has not risen by FLAT since."""
        best = min(range(len(self.smooth)), key=lambda i: self.smooth[i])
        return None if self.rise < FLAT else self.epochs[best]

    @property
    def last(self) -> float:
        """The epochs of the whole run."""
        return self.epochs[-1]

    @property
    def rise(self) -> float:
        """By how much the loss on held-out text ends above its lowest."""
        return self.smooth[-1] - min(self.smooth)

    @property
    def gap(self) -> float:
        """By how much held-out text costs more than trained text at the end, as means of three evaluations."""
        return fmean(self.validation[-3:]) - fmean(self.probe[-3:])

    @property
    def outcome(self) -> Verdict:
        """What came of the cell, by the definitions of `Overfit.verdict`."""
        if self.rise > GAP:
            return "memorises"
        return "boundary" if self.gap > GAP else "does not memorise"


def fitted(curves: Sequence[Curve]) -> Overfit:
    """Return the law with the constants that fit the curves best: losses by Huber's distance, gaps in logarithms."""
    import torch

    points, gaps = [], []
    for number, curve in enumerate(curves):
        least = min(curve.validation)
        for epoch, loss, probe in zip(curve.epochs, curve.validation, curve.probe, strict=True):
            if epoch * curve.unique < WARM or loss > least + FAR:
                continue
            points.append((number, epoch, loss))
            if 0.05 < loss - probe < 1 and epoch > 1:
                gaps.append((math.log(epoch - 1), math.log(curve.body / curve.unique), math.log(loss - probe)))
    which = torch.tensor([point[0] for point in points])
    epochs, losses = (torch.tensor([point[i] for point in points], dtype=torch.float64) for i in (1, 2))
    body, unique = (
        torch.tensor([getattr(c, n) for c in curves], dtype=torch.float64)[which] for n in ("body", "unique")
    )
    start = [math.log(1e3), math.log(0.7), math.log(0.01), math.log(1.2), math.log(0.7)]
    shared = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    kinds = [(curve.name.partition("/")[0], curve.body) for curve in curves]  # a floor for each text and size
    floors = torch.full((len(set(kinds)),), 1.5, dtype=torch.float64, requires_grad=True)
    own = torch.tensor([sorted(set(kinds)).index(kinds[int(i)]) for i in which])
    optimizer = torch.optim.LBFGS(
        [shared, floors], max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def predicted() -> torch.Tensor:
        b, beta, penalty, delta, kappa = shared.exp()
        again = (epochs - 1).clamp(min=1e-9)
        return floors[own] + b / (unique * epochs) ** beta + penalty * again**delta * (body / unique) ** kappa

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.huber_loss(predicted(), losses, delta=0.05)
        loss.backward()
        return loss

    optimizer.step(closure)
    b, beta, penalty, delta, kappa = shared.exp().tolist()
    again, ratio, gap = (torch.tensor([row[i] for row in gaps], dtype=torch.float64) for i in range(3))
    columns = torch.stack([torch.ones_like(again), again, ratio], 1)
    factor, gamma, gap_kappa = torch.linalg.lstsq(columns, gap[:, None]).solution[:, 0].tolist()
    error = float((predicted().detach() - losses).abs().mean())
    print(f"mean error of {len(points)} losses: {error:.3f} nats; floors {floors.tolist()}")
    return Overfit(b=b, beta=beta, penalty=penalty, delta=delta, kappa=kappa, gap_factor=math.exp(factor),
                   gamma=gamma, gap_kappa=gap_kappa, reach=Reach("toys"))  # fmt: skip


def curve_of(output: Path, model: Path, text: Path, held_out: Path, steps: int) -> Curve:
    """Return the curve of a cell, which is trained where it is not yet."""
    records = trained(model, text, held_out, output, steps)[1:]  # before the first step there is nothing to fit
    unique = text.stat().st_size
    body = body_parameters(read_anatomy(spec_of(open_source(model))))
    tokens, validation, probe = ([record[key] for record in records] for key in ("tokens", "eval_loss", "probe_loss"))
    return Curve(output.name, body, unique, [count / unique for count in tokens], validation, probe)


if __name__ == "__main__":
    main()
