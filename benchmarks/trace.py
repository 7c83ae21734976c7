"""What `surgeon trace` finds of children that were made of one model: layers, axes, what was done, bytes and errors.

    python benchmarks/trace.py MODEL --data wikitext2-valid.txt tinyshakespeare.txt --work DIR

MODEL is a Llama with at least 30 layers, such as SmolLM2-135M. Children are made by surgeon's own commands, and by
children.py; some are trained for a few steps at a large learning rate on the data. An error is a layer, an axis or a
word that is not what was done. "quick" is the MB that --quick reads, with the layers that it takes for others. Children
are kept in DIR, and made again only where they are not there.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import children
import torch

import surgeon

Layers = Sequence[int | None]


@dataclass(frozen=True)
class Case:
    """A child: how it is made of what is in a directory, its candidates, and the truth."""

    name: str
    make: Callable[[Path], Any]
    layers: Layers | None
    looks_like: Sequence[str]
    of: Sequence[str] = ("base",)
    axes: Mapping[str, str] = field(default_factory=dict)
    nearest: str | None = "base"
    weights: Mapping[str, float] = field(default_factory=dict)
    back: str | None = None  # the candidate that the nearest one is nearest to


def saved(surgery: Any, out: Path, **options: Any) -> None:
    """Write a surgery."""
    surgery.save(out, progress=False, **options)


def finetuned(model: Path, out: Path, data: str, *, steps: int = 4, lr: float = 8e-4, seed: int = 0) -> None:
    """Write a model that was trained for a few steps."""
    shutil.rmtree(out.with_name(f"{out.name}.run"), ignore_errors=True)  # of an earlier child
    surgeon.finetune(
        model, data=[data], output=out, max_steps=steps, batch_size=2, sequence_length=64, lr=lr, seed=seed,
        device="cpu", progress=False,
    )  # fmt: skip


KEPT = (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 21, 22, 23, 24, 25, 26, 27, 28)
WIDTHS = {"hidden_size": 432, "intermediate_size": 1024, "attention_heads": 6, "score": "random"}
CUT = {"hidden": "subset", "ffn": "subset", "heads": "subset"}


def cases(data: Sequence[str]) -> list[Case]:
    """Return all children, those that others are made of first."""
    own, eight = range(30), range(8)

    def of(name: str) -> Callable[[Path], Path]:
        return lambda work: work / name

    def act(function: Callable[..., Any], source: str, **options: Any) -> Callable[[Path], Any]:
        return lambda work: function(of(source)(work), work / "making", **options)

    def do(verb: str, source: str, **options: Any) -> Callable[[Path], Any]:
        def make(work: Path) -> None:
            given = {
                name: [work / each for each in value] if name == "models" else value for name, value in options.items()
            }
            saved(getattr(surgeon, verb)(work / source, **given), work / "making")

        return make

    def train(source: str, text: str, **options: Any) -> Callable[[Path], Any]:
        return lambda work: finetuned(work / source, work / "making", text, **options)

    grown = [layer for i in own for layer in ((i, i) if i in (4, 9, 14, 19, 24, 29) else (i,))]
    return [
        # Those of the reference table.
        Case("truncate", do("truncate", "base", layers=15), range(15), ["depth cut"]),
        Case("prune", do("prune", "base", keep=list(KEPT)), KEPT, ["depth cut"]),
        Case("identity growth", do("grow", "base", layers=36), grown, ["layers repeated"]),
        Case("stack growth", do("grow", "base", layers=45, depth_method="stack"), [*own, *range(15)], ["stacked"]),
        Case("width prune", do("prune", "base", **WIDTHS), own, ["width cut"], axes=CUT),
        Case(
            "clone 2x",
            do("grow", "base", hidden_size="2x", intermediate_size="2x", attention_heads="2x", key_value_heads="2x"),
            own,
            ["width grown"],
            axes={"hidden": "clone", "ffn": "clone"},
        ),
        Case("eight", do("truncate", "base", layers=8), eight, ["depth cut"]),
        Case(
            "permuted",
            act(children.permuted, "eight"),
            eight,
            ["permuted"],
            ["eight"],
            {"hidden": "permutation", "ffn": "permutation", "heads": "identity"},
            "eight",
        ),
        Case(
            "two layers fresh",
            act(children.refreshed, "eight", layers=(3, 6)),
            [0, 1, 2, None, 4, 5, None, 7],
            ["layers replaced"],
            ["eight"],
            nearest="eight",
        ),
        Case("lora 8", act(children.merged_lora, "eight", rank=8), eight, ["lora rank 8"], ["eight"], nearest="eight"),
        Case("lora 2", act(children.merged_lora, "eight", rank=2), eight, ["lora rank 2"], ["eight"], nearest="eight"),
        Case(
            "lora 32, all maps",
            act(children.merged_lora, "eight", rank=32, roles=children.ROLES),
            eight,
            ["lora rank 32"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "int8 g64",
            act(children.dequantized, "eight", bits=8, group=64),
            eight,
            ["int8 group 64"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "int4 g64",
            act(children.dequantized, "eight", bits=4, group=64),
            eight,
            ["int4 group 64"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "int8 row",
            act(children.dequantized, "eight", bits=8, group=None),
            eight,
            ["int8 per row"],
            ["eight"],
            nearest="eight",
        ),
        Case("finetune a", train("eight", data[0]), eight, ["finetune"], ["eight"], nearest="eight"),
        Case(
            "finetune b", train("eight", data[1], seed=1), eight, ["finetune"], ["eight", "finetune a"], nearest="eight"
        ),
        Case(
            "mean 0.6 0.4",
            do("merge", "finetune a", models=["finetune b"], weights=["0.6,0.4"]),
            eight,
            ["mixture"],
            ["finetune a", "finetune b", "eight"],
            nearest="finetune a",
            weights={"finetune a": 0.6, "finetune b": 0.4},
        ),
        Case(
            "random",
            lambda work: saved(surgeon.init(work / "eight" / "config.json", seed=1), work / "making"),
            None,
            [],
            ["eight", "base"],
            nearest=None,
        ),
        Case(
            "another family",
            lambda work: saved(surgeon.init("qwen3", set=SMALL), work / "making"),
            None,
            [],
            ["eight", "base"],
            nearest=None,
        ),
        Case(
            "cut",
            do("prune", "eight", keep=[0, 1, 4, 5, 7]),
            [0, 1, 4, 5, 7],
            ["depth cut"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "cut, trained",
            train("cut", data[0]),
            [0, 1, 4, 5, 7],
            ["depth cut", "finetune"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "cut, trained, of both",
            train("cut", data[1]),
            range(5),
            ["finetune"],
            ["eight", "cut", "base"],
            nearest="cut",
            back="eight",
        ),
        Case("narrow", do("prune", "eight", **WIDTHS), eight, ["width cut"], ["eight"], CUT, "eight"),
        Case("narrow, trained", train("narrow", data[0]), eight, ["width cut", "finetune"], ["eight"], CUT, "eight"),
        Case(
            "deep",
            do("grow", "eight", layers=11),
            [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7],
            ["layers repeated"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "deep, trained",
            train("deep", data[0]),
            [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7],
            ["layers repeated", "finetune"],
            ["eight"],
            nearest="eight",
        ),
        # Others.
        Case(
            "trimmed vocabulary",
            do("trim", "eight", data=[data[0]], keep_top=16000),
            eight,
            ["vocabulary cut"],
            ["eight"],
            {"vocab": "subset"},
            "eight",
        ),
        Case(
            "gist tokens",
            do("add_gist", "eight", tokens=4, distinct=True),
            eight,
            ["tokens added"],
            ["eight"],
            {"vocab": "pad"},
            "eight",
        ),
        Case(
            "float16",
            lambda work: saved(surgeon.open_model(work / "eight"), work / "making", dtype="float16"),
            eight,
            ["cast to float16"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "slices of two",
            do("merge", "finetune a", models=["finetune b"], method="passthrough", slices="A:0-4,B:3-7"),
            [0, 1, 2, 3, 4, None, None, None, None, None],
            ["layers of several models"],
            ["finetune a", "finetune b"],
            nearest="finetune a",
        ),
        Case(
            "reordered",
            do("merge", "eight", method="passthrough", slices="A:0-2,A:5-5,A:3-4,A:6-7"),
            [0, 1, 2, 5, 3, 4, 6, 7],
            ["layers reordered"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "heads only",
            do("prune", "eight", attention_heads=6, score="random"),
            eight,
            ["width cut"],
            ["eight"],
            {"heads": "subset", "ffn": "identity"},
            "eight",
        ),
        Case(
            "torchao int8",
            act(children.in_codes, "eight", form="torchao"),
            eight,
            ["int8 per row"],
            ["eight"],
            nearest="eight",
        ),
        Case(
            "compressed int4 g64",
            act(children.in_codes, "eight", form="compressed-tensors", group=64),
            eight,
            ["int4 group 64"],
            ["eight"],
            nearest="eight",
        ),
    ]


SMALL = [
    "num_hidden_layers=8",
    "hidden_size=576",
    "intermediate_size=1536",
    "num_attention_heads=9",
    "num_key_value_heads=3",
]


def main() -> None:
    """Print a line for each child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", nargs=2, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "base").exists():
        saved(surgeon.open_model(options.model), options.work / "base", dtype="bfloat16")
    print("| child | candidates | layers | looks like | p | z | MB read | quick | MB of the child | CPU s | errors |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    errors, layers, told = 0, 0, {}
    for case in cases(options.data):
        if options.only and case.name not in options.only:
            continue
        if not (options.work / case.name).exists():
            case.make(options.work)
            (options.work / "making").rename(options.work / case.name)
        child, candidates = options.work / case.name, [str(options.work / name) for name in case.of]
        quick = surgeon.trace(child, candidates=candidates, quick=True, progress=False)
        began = time.process_time()
        found = surgeon.trace(child, candidates=candidates, progress=False)
        seconds = time.process_time() - began
        wrong = faults(case, found)
        errors, layers = errors + len(wrong), layers + len(found.layers)
        told[case.name] = found.to_dict()
        print(line(case, found, quick, seconds, wrong), flush=True)
    print(f"\n{errors} errors in {layers} layers of {len(told)} children")
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


def faults(case: Case, found: Any) -> list[str]:
    """Return what was found that is not so."""
    nearest = None if found.nearest is None else Path(found.nearest).name
    wrong = [] if nearest == case.nearest else [f"nearest {nearest}"]
    truth = [None] * len(found.layers) if case.layers is None else list(case.layers)
    wrong += [
        f"layer {j}: {is_there}"
        for j, (is_there, so) in enumerate(zip(found.layers, truth, strict=True))
        if is_there != so
    ]
    wrong += [] if list(found.looks_like) == list(case.looks_like) else [f"looks like {', '.join(found.looks_like)}"]
    wrong += [f"{axis} {found.axes.get(axis)}" for axis, kind in case.axes.items() if found.axes.get(axis) != kind]
    weights = {} if found.mixture is None else {Path(name).name: w for name, w in found.mixture.weights.items()}
    wrong += [
        f"weight {weights.get(name)} of {name}"
        for name, w in case.weights.items()
        if abs(weights.get(name, 9) - w) > 0.005
    ]
    back = [Path(link.nearest).name for link in found.chain]
    return wrong + ([f"further back {back}"] if case.back is not None and back[:1] != [case.back] else [])


def line(case: Case, found: Any, quick: Any, seconds: float, wrong: Sequence[str]) -> str:
    """Return a line of the table."""
    from surgeon.lineage.record import layer_words

    told = found.candidates[found.nearest] if found.nearest else {}
    others = sum(a != b for a, b in zip(quick.layers, found.layers, strict=True))
    missed = f" ({others} other layers)" if others else ""
    z = told.get("z")
    cells = [
        case.name, ", ".join(case.of), layer_words(found.layers, found.depth) if found.nearest else "unrelated",
        ", ".join(found.looks_like) or "-", f"{found.p:.3f}", "-" if z is None else f"{z:.0f}",
        f"{found.bytes_read / 1e6:.1f}", f"{quick.bytes_read / 1e6:.2f}{missed}", f"{found.child_bytes / 1e6:.0f}",
        f"{seconds:.1f}", "; ".join(wrong) or "0",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
