"""Draw the picture at the top of README.md from a real run: the layers of a model before, cut and healed.

    surgeon prune SmolLM2-135M --layers 24 --data text.txt[:90%] -o cut
    surgeon evaluate cut --baseline SmolLM2-135M --data text.txt[90%:] --json > cut.json
    surgeon finetune cut --teacher SmolLM2-135M --data text.txt[:90%] --max-steps 300 -o healed
    surgeon evaluate healed --baseline SmolLM2-135M --data text.txt[90%:] --json > healed.json
    python scripts/readme_picture.py SmolLM2-135M cut healed cut.json healed.json -o docs/images/surgeon.png

Every figure is read: layers, parameters and which layers went from the checkpoints and the receipt of the cut, steps
from the receipt of the healed model, perplexities with their errors from the evaluations. Where these do not belong
together the picture is refused.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import surgeon
from surgeon.plots.figure import BLUE, GREEN, GREY, RED, new_figure, save

ROOT = Path(__file__).resolve().parent.parent
CARD = "#fbfbfd"  # light, and opaque: it is read on a white page and on a black one
INK = "#1d2433"
WIDE = 2.0  # standard errors
MISSING = {"facecolor": "none", "edgecolor": GREY, "linestyle": (0, (2, 2)), "linewidth": 0.9}


@dataclass(frozen=True)
class Model:
    """A model in the picture. `layers` are those of the source that it holds; perplexity has an error."""

    title: str
    layers: frozenset[int]
    parameters: int
    perplexity: float
    error: float | None
    colour: str


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "cut", "healed", "cut_json", "healed_json"):
        parser.add_argument(name, type=Path)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/images/surgeon.png")
    given = parser.parse_args()
    models, about, depth = read(given.source, given.cut, given.healed, given.cut_json, given.healed_json)
    save(drawn(models, about, depth), given.output)
    print(given.output)


def read(source: Path, cut: Path, healed: Path, cut_json: Path, healed_json: Path) -> tuple[list[Model], str, int]:
    """Return the three models, a line about what was measured, and the depth of the source. Exits where they differ."""
    whole, short, trained = (surgeon.inspect(place) for place in (source, cut, healed))
    evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in (cut_json, healed_json)]
    for place, evaluation in zip((cut, healed), evaluations, strict=True):
        if not same(evaluation["model"], place) or not same(evaluation["baseline"]["model"], source):
            sys.exit(f"the evaluation of {evaluation['model']} is none of {place} against {source}")
    first, second = evaluations
    if first["data"] != second["data"] or first["baseline"]["perplexity"] != second["baseline"]["perplexity"]:
        sys.exit("the two evaluations are of different texts")
    kept = frozenset(layer for layer in (short.receipt or {}).get("layer_map", []) if layer is not None)
    if len(kept) != short.anatomy.depth or trained.anatomy.depth != short.anatomy.depth:
        sys.exit(f"{cut} and {healed} are not one cut of {source}, and that trained on")
    steps = [step["finetune"] for step in (trained.receipt or {}).get("steps", []) if "finetune" in step]
    if not steps:
        sys.exit(f"{healed} has no receipt of a training")
    how = f"{steps[-1]['steps']:,} steps" + (" with the whole model as teacher" if has_teacher(steps[-1]) else "")
    depth = whole.anatomy.depth
    models = [
        Model(source.name, frozenset(range(depth)), *sizes(whole, first["baseline"]), colour=BLUE),
        Model(f"cut: {depth - len(kept)} layers go", kept, *sizes(short, first), colour=RED),
        Model(f"healed: {how}", kept, *sizes(trained, second), colour=GREEN),
    ]
    data = ", ".join(Path(str(item)).name for item in first["data"])
    about = f"perplexity on {first['rows']} rows of {first['sequence_length']} tokens of {data} (± {WIDE:g} errors)"
    return models, about, depth


def same(label: str, place: Path) -> bool:
    """Return whether a label of an evaluation names a directory, from wherever it was run."""
    return Path(label).name == place.name


def sizes(inspection: surgeon.Inspection, figures: dict[str, Any]) -> tuple[int, float, float | None]:
    """Return a model's parameters, and its perplexity with the error."""
    return inspection.anatomy.spec.num_parameters, figures["perplexity"], figures.get("perplexity_error")


def has_teacher(step: dict[str, Any]) -> bool:
    """Return whether a training had a teacher."""
    return bool(step.get("settings", {}).get("teacher"))


def drawn(models: list[Model], about: str, depth: int) -> Any:
    """Return the figure: a row for each model, with a block for each layer of the source, and its figures."""
    from matplotlib.patches import FancyBboxPatch

    figure = new_figure(10.0, 3.7)
    figure.patch.set_facecolor(CARD)
    axes = figure.subplots()
    axes.set_facecolor(CARD)
    for row, model in enumerate(models):
        top = -1.45 * row
        axes.text(0, top + 0.92, model.title, fontsize=11, fontweight="bold", color=model.colour, va="bottom")
        for layer in range(depth):
            is_there = layer in model.layers
            style = {"facecolor": model.colour, "edgecolor": "none"} if is_there else MISSING
            box = FancyBboxPatch((layer + 0.08, top), 0.84, 0.8, boxstyle="round,pad=0,rounding_size=0.12", **style)
            axes.add_patch(box)
            colour = "white" if is_there else GREY
            axes.text(layer + 0.5, top + 0.4, str(layer), fontsize=6.5, color=colour, ha="center", va="center")
        text = f"{len(model.layers)} layers, {model.parameters / 1e6:.1f} M parameters"
        axes.text(depth + 0.6, top + 0.62, text, fontsize=9.5, va="center", color=INK)
        axes.text(depth + 0.6, top + 0.18, perplexity(model), fontsize=11, va="center", color=INK, fontweight="bold")
    axes.text(0, -1.45 * (len(models) - 1) - 0.42, about, fontsize=8.5, color=GREY, va="top")
    axes.set_xlim(-0.2, depth + 0.36 * depth + 0.6)
    axes.set_ylim(-1.45 * (len(models) - 1) - 0.85, 1.5)
    axes.set_axis_off()
    return figure


def perplexity(model: Model) -> str:
    """Return the perplexity with as many digits as its error allows."""
    if model.error is None:
        return f"perplexity {model.perplexity:.3g}"
    error = WIDE * model.error
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 2
    return f"perplexity {model.perplexity:,.{min(digits, 2)}f} ± {error:,.{min(digits, 2)}f}"


if __name__ == "__main__":
    main()
