"""Cuts of one size by several methods, bare, compensated and healed: loss and KL on two texts, with paired errors.

    python benchmarks/prune_table.py MODEL --data wikitext.txt --data other.jsonl --unseen novel.txt --work DIR

Every cut of a row has the same size (the parameters that go with so many layers), is made by the command line from the
same text, and is judged on text that no step has read: the end of the first --data, and --unseen, another domain. What
is done is kept in DIR and not done again. `--results FILE` keeps the figures of every row of text beside it, so that
another machine can go on: results/prune_table.json has those of docs/benchmarks.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DROPPED = (12, 8, 4)  # layers: a tenth, a fifth and three tenths of SmolLM2-135M
CALIBRATION = ("--samples", "32", "--sequence-length", "256")
SEARCH = ("--evaluations", "16")  # on as many rows as a scored cut is fitted to
GREEDY = ("--samples", "8")  # a pass for each layer that is left, again after each that goes
PEERS = ("soup", "optipfair-depth", "optipfair-width")  # where prune_peers.py has made them
HEALING = (
    "--max-steps",
    "200",
    "--batch-size",
    "1",
    "--sequence-length",
    "128",
    "--lr",
    "2e-4",
    "--eval-fraction",
    "0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True, help="the first 60 % is read, the rest judged on")
    parser.add_argument("--unseen", required=True, help="a text of another domain, which no step reads")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="read and write the figures of all cuts here")
    parser.add_argument("--dropped", type=int, nargs="*", default=DROPPED)
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--heal", nargs="*", default=(), help="the methods whose cuts are healed: angular search ...")
    parser.add_argument("--rows", type=int, default=16, help="of 256 tokens, of each text; half of them for the KL")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    restore(given)
    for dropped in given.dropped:
        cuts = made(given, dropped)
        for name, directory in cuts.items():
            judged(given, f"{dropped}-{name}", directory)
            if name in given.heal:
                judged(given, f"{dropped}-{name}-healed", healed(given, dropped, name, directory))
            keep(given)
    print(table(given))


def made(given: argparse.Namespace, dropped: int) -> dict[str, Path]:
    """Return the cuts of one size, by method."""
    from surgeon.anatomy.anatomy import read_anatomy
    from surgeon.checkpoint.source import spec_of
    from surgeon.surgery import open_source

    anatomy = read_anatomy(spec_of(open_source(given.model)))
    depth, hidden, ffn = anatomy.depth, anatomy.sizes["hidden"], anatomy.sizes["ffn"]
    smaller = anatomy.spec.num_parameters
    kept = [tensor.num_parameters for name, tensor in anatomy.spec.tensors.items() if ".layers.0." in name]
    target = smaller - dropped * sum(kept)
    narrow = ffn - (dropped * sum(kept) // (3 * hidden * depth) + 15) // 16 * 16
    texts = [word for name in given.data for word in ("--data", f"{name}[:60%]")]
    layers = ("--layers", str(depth - dropped))
    shared = ("--search-dir", str(given.work / "state"))  # what one target measured serves the others
    orders: dict[str, Sequence[str]] = {
        "angular": ("--score", "angular", *layers),
        "block-influence": ("--score", "block-influence", *layers),
        "greedy": ("--score", "perplexity", "--greedy", *layers),
        "width": ("--intermediate-size", str(narrow)),
        "width-activation": ("--intermediate-size", str(narrow), "--width-score", "activation"),
        "depth": ("--target-parameters", str(target), "--over", "layers,halves", *shared, *SEARCH),
        "search": ("--target-parameters", str(target), *shared, *SEARCH),
    }
    cuts: dict[str, Path] = {}
    for name, words in orders.items():
        for repair in ("--no-compensate", "--compensate"):
            method = name if repair == "--no-compensate" else f"{name}+"
            if given.methods is not None and method not in given.methods:
                continue
            if method in ("depth", "search"):
                continue  # a search judges its cuts repaired
            directory = given.work / f"{dropped}-{method}"
            last = f"{dropped}-{method}-healed" if method in given.heal else f"{dropped}-{method}"
            if figures_file(given, last).exists():
                continue
            if not (directory / "config.json").exists():
                how = (repair, *texts, *CALIBRATION, "--no-evaluate", *words)
                known = next(iter(sorted(given.work.glob("*-greedy/scores.json"))), None)
                if name == "greedy":  # the order of the deepest cut has those of all others
                    how = (*how, *GREEDY) if known is None else (*how, "--scores-from", str(known))
                run("prune", given.model, *how, "-o", directory, "--json")
            cuts[method] = directory
    for name in PEERS:
        if (directory := given.work / f"{dropped}-{name}").exists() and (not given.methods or name in given.methods):
            cuts[name] = directory
    return cuts


def healed(given: argparse.Namespace, dropped: int, name: str, directory: Path) -> Path:
    """Return the cut after 200 small steps on the first text."""
    target = given.work / f"{dropped}-{name}-healed"
    if not (target / "config.json").exists():
        run("finetune", directory, "--data", f"{given.data[0]}[:60%]", *HEALING, "-o", target, "--resume", "--json")
    return target


def run(*words: Any) -> None:
    command = [sys.executable, "-m", "surgeon", *map(str, words)]
    print("$ surgeon", *map(str, words), flush=True)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (Path(words[words.index("-o") + 1]).with_suffix(".json")).write_text(done.stdout)


def figures_file(given: argparse.Namespace, name: str) -> Path:
    return Path(given.work / f"{name}.figures.json")


def restore(given: argparse.Namespace) -> None:
    """Write the figures that are in the file of results to the directory of the work."""
    if given.results is not None and given.results.exists():
        for name, found in json.loads(given.results.read_text()).items():
            if not (file := figures_file(given, name)).exists():
                file.write_text(json.dumps(found))


def keep(given: argparse.Namespace) -> None:
    """Write all figures to the file of results, a cut a line."""
    if given.results is None:
        return
    paths = sorted(given.work.glob("*.figures.json"))
    lines = [f'"{path.name.removesuffix(".figures.json")}": {path.read_text()}' for path in paths]
    given.results.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def judged(given: argparse.Namespace, name: str, directory: Path) -> dict[str, Any]:
    """Return the sums of each row of both texts: loss, and KL from the whole model."""
    import surgeon

    file = figures_file(given, name)
    if not file.exists():
        found: dict[str, Any] = {}
        for text, spec in (("seen", f"{given.data[0]}[60%:]"), ("unseen", given.unseen)):
            shape: dict[str, Any] = {"data": [spec], "samples": given.rows, "sequence_length": 256}
            loss = surgeon.evaluate(directory, **shape)
            shape["samples"] //= 2  # both models run
            kl = surgeon.evaluate(directory, metric="acceptance", baseline=given.model, **shape)
            found[text] = {
                "loss": [round(each, 4) for each in loss.scored.outcomes["loss"]],  # nats, summed over a row
                "kl": [round(each, 4) for each in kl.scored.outcomes["kl"]],
                "acceptance": kl.scored.figures["acceptance"].value,
                "sizes": {"loss": loss.scored.sizes, "kl": kl.scored.sizes},
            }
        file.write_text(json.dumps(found))
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def table(given: argparse.Namespace) -> str:
    """Return all figures, and of each the difference from the search's with its paired error."""
    from surgeon.evals.compare import estimate, paired

    lines = []
    for dropped in given.dropped:
        found = {
            path.name.removesuffix(".figures.json").partition("-")[2]: json.loads(path.read_text())
            for path in sorted(given.work.glob(f"{dropped}-*.figures.json"))
        }
        for name, figures in found.items():
            best = found.get("search+-healed" if name.endswith("-healed") else "search+")
            cells = [str(dropped), name]
            for text in ("seen", "unseen"):
                own = figures[text]
                for of in ("loss", "kl"):
                    mean = estimate(own[of], own["sizes"][of])
                    cells.append(f"{mean.value:.3f}")
                    if best is not None and figures is not best:
                        difference = paired(own[of], best[text][of], own["sizes"][of])
                        cells[-1] += f" ({difference.value:+.3f} ± {difference.error or 0:.3f})"
            lines.append(cells)
    head = ["layers' worth", "method", "loss", "KL", "unseen loss", "unseen KL"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


if __name__ == "__main__":
    main()
