"""What a search finds, what it costs, and how well its surrogate predicts: the figures of docs/benchmarks.md.

    python benchmarks/search.py MODEL --data wikitext2-valid.txt --other tinyshakespeare.txt [--removed 8] [--json FILE]

Three parts, each of which can be left out by naming others: --parts effort,surrogate,search.

effort: layer applications, in passes of the whole model, of 50 candidates on 8,192 tokens: every layer alone with
pairs, moves from a cut of --removed layers, and random cuts, which share the least.
surrogate: singles and telling pairs of layers on 512 tokens, then 30 random subsets of 3 to 6 layers between the third
and the last but one; Pearson's correlation of the true joint loss with the quadratic, and with the sum of singles.
search: cuts are searched on the first 2,048 tokens of --data (8 rows of 256) and of nothing else, unless --second names
a text to watch; the best is written and judged on tokens 100,000 to 104,096 in rows of 512, in float32, and on the
first 4,096 tokens of --other. The differences to the whole model are paired by row. --state keeps what was measured, so
that a run that is repeated, or asks for another size, takes from it.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoTokenizer

import surgeon
from surgeon.anatomy.halves import Pairing
from surgeon.measure.candidates import Reference
from surgeon.measure.scoring import row_losses_without, streamed_model
from surgeon.search.cuts import Candidate, Space, kept_halves
from surgeon.search.surrogate import Surrogate, telling_pairs
from surgeon.surgery import open_source

EVALUATION = (100_000, 8, 512)
PARTS = ("effort", "surrogate", "search")
SUBSETS, SMALLEST, LARGEST = 30, 3, 6


def tokens_of(model: str, path: Path) -> torch.Tensor:
    """Return the tokens of a text, as one stream."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return torch.tensor(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)


def without(depth: int, gone: tuple[int, ...]) -> Pairing:
    """Return the pairing of all layers but these."""
    return Pairing.of_layers(layer for layer in range(depth) if layer not in gone)


def effort(model: str, tokens: torch.Tensor, removed: int, rows: int) -> dict:
    """Return what 50 candidates cost, in passes of the whole model counted in layer applications, three kinds of them.

    The count does not depend on the number of tokens, so it can be taken on a few rows.
    """
    streamed = streamed_model(open_source(model), "cpu", resident=True)
    depth, draw = streamed.depth, random.Random(0)
    pairs = [(one, other) for one in range(2, depth - 1) for other in range(one + 1, depth - 1)]
    base = tuple(sorted(draw.sample(range(2, 2 * depth - 3, 2), removed)))
    space = Space.of(depth, halves=True, protect=(1, 1))
    kinds = {
        "every layer alone, and pairs": [
            *(((2 * layer,)) for layer in range(depth)),
            *((2 * one, 2 * other) for one, other in draw.sample(pairs, 50)),
        ][:50],
        f"moves from a cut of {removed}": draw.sample(list(space.moves(base)), 50),
        f"random cuts of {removed}": [
            tuple(2 * layer for layer in sorted(draw.sample(range(1, depth - 1), removed))) for _ in range(50)
        ],
    }
    found: dict = {"tokens": rows * 256}
    for name, cuts in kinds.items():
        reference = Reference(streamed, tokens[: rows * 256].view(rows, 256))
        began, first = time.perf_counter(), reference.effort.passes
        reference.measure([Pairing(*kept_halves(cut, depth)) for cut in cuts])
        found[name] = {
            "candidates": len(cuts),
            "passes": reference.effort.passes - first,
            "heads": reference.effort.heads,
            "seconds": time.perf_counter() - began,
        }
    return found


def surrogate(model: str, tokens: torch.Tensor) -> dict:
    """Return how the quadratic and the plain sum correlate with the true joint loss of random subsets."""
    streamed = streamed_model(open_source(model), "cpu", resident=True)
    depth, draw = streamed.depth, random.Random(0)
    rows = tokens[:512].view(2, 256)
    reference = Reference(streamed, rows)
    layers = range(2, depth - 1)
    whole = reference.whole.mean("loss")

    def losses(cuts: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        found = reference.measure([without(depth, cut) for cut in cuts])
        return {cut: outcome.mean("loss") - whole for cut, outcome in zip(cuts, found, strict=True)}

    alone = {2 * cut[0]: cost for cut, cost in losses([(layer,) for layer in layers]).items()}
    pairs = telling_pairs(alone, len(alone), bound=float("inf"))
    joint = losses([(one // 2, other // 2) for one, other in pairs])
    fitted = Surrogate(alone, {(2 * one, 2 * other): cost for (one, other), cost in joint.items()})
    subsets: list[tuple[int, ...]] = []
    while len(subsets) < SUBSETS:
        cut = tuple(sorted(draw.sample(list(layers), draw.randint(SMALLEST, LARGEST))))
        subsets += [cut] if cut not in subsets else []
    truth = losses(subsets)
    true = [truth[cut] for cut in subsets]
    parts = [fitted.parts(Candidate(tuple(2 * layer for layer in cut))) for cut in subsets]
    return {
        "pairs": len(pairs),
        "subsets": SUBSETS,
        "true": [min(true), max(true)],
        "quadratic": pearson([singles + beyond for singles, beyond in parts], true),
        "sum": pearson([singles for singles, _ in parts], true),
    }


def pearson(one: list[float], other: list[float]) -> float:
    """Return Pearson's correlation of two lists."""
    a, b = mean(one), mean(other)
    covariance = sum((x - a) * (y - b) for x, y in zip(one, other, strict=True))
    return covariance / (sum((x - a) ** 2 for x in one) * sum((y - b) ** 2 for y in other)) ** 0.5


def rows_of(tokens: torch.Tensor, first: int, rows: int, length: int) -> torch.Tensor:
    return tokens[first : first + rows * length].view(rows, length)


def judged(place: str, texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the loss of each row of each text, in float32."""
    model = streamed_model(open_source(place), "cpu", resident=False, dtype=torch.float32)
    found = {}
    for name, rows in texts.items():
        sums, counts = row_losses_without(model, rows, [frozenset()])
        found[name] = sums[0] / counts
    return found


def search(options: argparse.Namespace, texts: dict[str, torch.Tensor]) -> dict:
    """Search, write the best cut, and judge it beside the whole model."""
    depth = len(surgeon.open_model(options.model).plan.layer_map)
    goal: dict = {"layers": depth - options.removed, "score": "search"}
    if options.target_parameters:
        goal = {"target_parameters": options.target_parameters}
    goal |= {"over": options.over} if options.over else {}
    goal |= {"compensate": True} if options.compensate else {}
    began = time.perf_counter()
    cut = surgeon.prune(
        options.model,
        **goal,
        data=[str(options.data), *map(str, options.more_data)],
        eval_data=[str(options.second)] if options.second else [],
        objective=options.objective,
        evaluations=options.evaluations,
        search_dir=options.state,
        seed=options.seed,
        device="cpu",
        evaluate=False,
    )
    seconds = time.perf_counter() - began
    whole = judged(options.model, texts)
    with tempfile.TemporaryDirectory() as work:
        cut.save(Path(work) / "cut")
        losses = judged(str(Path(work) / "cut"), texts)
    if options.plot:
        cut.draw_search().savefig(options.plot, dpi=110)
    result = {"seconds": seconds, "found": cut.record.told(), "gone": cut.point.told(depth)}
    for name, own in losses.items():
        above = own - whole[name]
        result[name] = {
            "loss": float(own.mean()),
            "perplexity": float(own.mean().exp()),
            "whole": float(whole[name].mean().exp()),
            "nats": float(above.mean()),
            "error": float(above.std() / len(above) ** 0.5),
        }
    return result


def main() -> None:
    """Run the parts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--more-data", type=Path, action="append", default=[], help="a text that is searched on too")
    parser.add_argument("--other", type=Path, help="another domain, which only judges")
    parser.add_argument("--second", type=Path, help="a text to watch: --eval-data")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--removed", type=int, default=8)
    parser.add_argument("--effort-rows", type=int, default=32, help="of 256 tokens")
    parser.add_argument("--target-parameters")
    parser.add_argument("--over")
    parser.add_argument("--compensate", action="store_true")
    parser.add_argument("--objective", default="loss", choices=("kl", "loss"))
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="a directory for what was measured")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    tokens = tokens_of(options.model, options.data)
    found: dict = {}
    for part in options.parts.split(","):
        if part == "effort":
            found[part] = effort(options.model, tokens, options.removed, options.effort_rows)
        elif part == "surrogate":
            found[part] = surrogate(options.model, tokens)
        else:
            texts = {options.data.name: rows_of(tokens, *EVALUATION)}
            if options.other:
                texts[options.other.name] = rows_of(tokens_of(options.model, options.other), 0, 8, 512)
            found[part] = search(options, texts)
        print(json.dumps({part: found[part]}, indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
