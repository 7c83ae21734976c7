"""Which verb works on which model type: a toy of every type of the installed transformers, every verb, and a judge.

    python benchmarks/families.py [--types NAME...] [--third N] [--jobs N] [--write]

Each result is judged by transformers alone: it must load with nothing missing, and compute what the claim says (see
tests/oracle.py). `--write` puts the table into docs/models.md and its counts into README.md. Every type runs in a
process of its own, with a limit of time and memory.
"""

import argparse
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import every_type  # noqa: E402
import oracle  # noqa: E402
from coverage_table import write_table  # noqa: E402

import surgeon  # noqa: E402
from surgeon.checkpoint.json_files import read_json  # noqa: E402
from surgeon.errors import SurgeonError  # noqa: E402

SECONDS = 120  # of computing for one type, all verbs; ten times as long by the clock, for a machine that others use
BYTES = 8 << 30  # of address space
SHORTER, LONGER = every_type.DEPTH - 2, every_type.DEPTH + 3


@dataclass(frozen=True)
class Cell:
    """What came of a verb on a type: "exact", "within", "refused", "wrong" or "crash", and the sentence behind it."""

    verdict: str
    why: str = ""


Rows = dict[str, dict[str, dict[str, Cell]]]  # type, variant ("" or "as published"), verb


@dataclass
class Toy:
    """A toy of a type in a directory, its model as transformers loads it, and a place for results."""

    directory: Path
    model: Any

    def result(self, surgery: Any) -> Path:
        """Return the directory of a surgery's result."""
        target = self.directory.parent / "result"
        if target.exists():
            shutil.rmtree(target)
        surgery.save(target)
        return target


def inspect(toy: Toy) -> str:
    """Return the verdict on what inspect says: the parameters of the files, and a text."""
    str(surgeon.inspect(toy.directory))
    return oracle.EXACT


def _depth(toy: Toy, surgery: Any) -> str:
    layer_map = surgery.plan.layer_map
    return oracle.judge_depth(toy.model, toy.result(surgery), layer_map)


def _worst(verdicts: Iterable[str]) -> str:
    return oracle.WITHIN if oracle.WITHIN in list(verdicts) else oracle.EXACT


def truncate(toy: Toy) -> str:
    """Return the verdict on the first layers."""
    return _depth(toy, surgeon.truncate(toy.directory, layers=SHORTER))


def cut(toy: Toy) -> str:
    """Return the verdict on layers that are dropped from the middle and from the start."""
    from surgeon.surgery import Surgery, open_model
    from surgeon.transforms.layers import keep_layers

    model = open_model(toy.directory)
    verdicts, refusal = [], None
    for kept in ([0, 2, 4, 5], [0, 3, 4, 5], [1, 2, 5]):
        try:
            verdicts.append(_depth(toy, Surgery(model.source, keep_layers(model.anatomy, kept))))
        except SurgeonError as error:  # whole periods may still go where single layers may not
            refusal = refusal or error
    if not verdicts and refusal is not None:
        raise refusal
    return _worst(verdicts)


def stack(toy: Toy) -> str:
    """Return the verdict on a stack whose first layers come again at its end."""
    return _depth(toy, surgeon.grow(toy.directory, layers=LONGER, depth_method="stack"))


def _narrowed(toy: Toy, **sizes: Any) -> str:
    surgery = surgeon.prune(toy.directory, score="random", evaluate=False, **sizes)
    result = toy.result(surgery)
    if "hidden_size" in sizes or surgery.plan.approximate:  # norms take the mean over fewer channels
        return oracle.judge_loading(result)
    return oracle.judge_removal(toy.directory, result)


def _grown(toy: Toy, **sizes: Any) -> str:
    return oracle.judge_growth(toy.directory, toy.result(surgeon.grow(toy.directory, noise=0.0, **sizes)))


def gist(toy: Toy) -> str:
    """Return the verdict on a model with a gist token."""
    result = toy.result(surgeon.add_gist(toy.directory, tokens=2))
    new = read_json(result / "config.json")["gist"]["token_ids"]
    return oracle.judge_new_tokens(toy.model, result, new)


def evaluate(toy: Toy) -> str:
    """Return the verdict on the perplexity of a text: transformers' own loss to 1e-4."""
    rows, length = 3, 16
    words = [f"w{(7 * i * i + i) % 90}" for i in range(rows * length)]
    text = toy.directory.parent / "text.txt"
    text.write_text(" ".join(words))
    evaluation = surgeon.evaluate(toy.directory, data=[str(text)], sequence_length=length, samples=rows)
    expected = oracle.loss(toy.model, [int(word[1:]) + 3 for word in words], length)
    got = evaluation.scored.figures["loss"].value
    if not abs(got - expected) <= 1e-4:
        raise oracle.Wrong(f"loss {got:.5f} for {expected:.5f}")
    return oracle.EXACT


Verb = Callable[[Toy], str]
VERBS: Mapping[str, Verb] = {
    "inspect": inspect,
    "truncate": truncate,
    "cut": cut,
    "stack": stack,
    "prune MLP": lambda toy: _narrowed(toy, intermediate_size=_smaller(toy, "ffn")),
    "prune heads": lambda toy: _narrowed(toy, attention_heads=_smaller(toy, "heads")),
    "prune hidden": lambda toy: _narrowed(toy, hidden_size=_smaller(toy, "hidden")),
    "grow MLP": lambda toy: _grown(toy, intermediate_size="2x"),
    "grow heads": lambda toy: _grown(toy, attention_heads="2x"),
    "grow hidden": lambda toy: _grown(toy, hidden_size="2x"),
    "gist": gist,
    "evaluate": evaluate,
}


DEPTH_VERBS = ("inspect", "truncate", "cut", "stack")


def _smaller(toy: Toy, quantity: str) -> int:
    """Return a smaller size: three quarters, half of the heads."""
    from surgeon.anatomy.config import size_of

    size = size_of(read_json(toy.directory / "config.json"), quantity) or 8
    return size // 2 if quantity == "heads" else size * 3 // 4


def judged(verb: Verb, toy: Toy) -> Cell:
    """Return what came of a verb."""
    try:
        return Cell(verb(toy))
    except SurgeonError as error:
        return Cell("refused", str(error))
    except oracle.Wrong as wrong:
        return Cell("wrong", str(wrong))
    except Exception as error:  # noqa: BLE001  # a traceback is a result of this benchmark
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Cell("crash", f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})")


# --- one type, in a process of its own ----------------------------------------------------------------------------


def run_type(model_type: str, verbs: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """Return the cells of a type, by variant and verb; a variant "as published" where its config says less."""
    rows: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory(dir=_fast_disk()) as folder:
        for variant in ("", "as published"):
            directory = Path(folder) / (variant or "whole") / "toy"
            directory.parent.mkdir()
            try:
                every_type.build(model_type, directory, published=bool(variant))
                if variant and same_config(directory, Path(folder) / "whole/toy"):
                    continue
                every_type.add_tokenizer(directory)
                toy = Toy(directory, oracle.loaded(directory))
                every_type.logits(toy.model)
            except Exception as error:  # noqa: BLE001  # what cannot be built is a row of the table
                rows[variant] = {"build": Cell("refused", f"{type(error).__name__}: {' '.join(str(error).split())}")}
                continue
            asked = [verb for verb in verbs if not variant or verb in DEPTH_VERBS]  # lists of layers change no width
            rows[variant] = {verb: judged(VERBS[verb], toy) for verb in asked}
    return rows


def same_config(one: Path, other: Path) -> bool:
    """Return whether two checkpoints have the same config.json."""
    return read_json(one / "config.json") == read_json(other / "config.json")


def _fast_disk() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _in_child(model_type: str, verbs: Sequence[str], pipe: int) -> None:
    """Write the cells of a type to a pipe, and end this process."""
    signal.alarm(10 * SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with open(os.devnull, "w") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    rows = run_type(model_type, verbs)
    cells = {variant: {verb: asdict(cell) for verb, cell in row.items()} for variant, row in rows.items()}
    with os.fdopen(pipe, "w") as stream:
        json.dump(cells, stream)
    os._exit(0)


def run_all(types: Sequence[str], verbs: Sequence[str], jobs: int) -> Iterator[tuple[str, dict[str, dict[str, Cell]]]]:
    """Yield each type with its cells, `jobs` at a time. One that dies or takes too long crashes alone."""
    waiting, running = list(reversed(types)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            reading, writing = os.pipe()
            if (child := os.fork()) == 0:
                os.close(reading)
                try:
                    _in_child(name, verbs, writing)
                finally:
                    os._exit(1)
            os.close(writing)
            running[child] = (name, reading)
        ready, _, _ = select.select([reading for _, reading in running.values()], [], [])
        child = next(child for child, (_, reading) in running.items() if reading in ready)
        name, reading = running.pop(child)
        with os.fdopen(reading) as stream:
            said = stream.read()
        _, status = os.waitpid(child, 0)
        if said:
            yield name, from_json(json.dumps({name: json.loads(said)}))[name]
        else:
            too_long = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU)
            why = f"took more than {SECONDS} s" if too_long else f"died ({status})"
            yield name, {"": {"build": Cell("crash", f"the process {why}")}}


def from_json(text: str) -> Rows:
    """Return the rows that --json wrote."""
    return {
        name: {variant: {verb: Cell(**cell) for verb, cell in cells.items()} for variant, cells in variants.items()}
        for name, variants in json.loads(text).items()
    }


def warm_up() -> None:
    """Import what every type needs, once, before the processes part. No model is loaded: that starts threads."""
    import transformers.generation
    import transformers.models.auto.modeling_auto

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        every_type.build("qwen3", Path(folder) / "toy")
        for surgery in (surgeon.truncate, surgeon.grow, surgeon.prune):
            surgery(Path(folder) / "toy", layers=6, **({"score": "random"} if surgery is surgeon.prune else {}))


def main() -> None:
    """Run what the command line says, and print a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="*", metavar="NAME", help="only these types")
    parser.add_argument("--kinds", nargs="*", default=list(every_type.KINDS), help="only types of these kinds")
    parser.add_argument("--verbs", nargs="*", default=list(VERBS), choices=list(VERBS), help="only these verbs")
    parser.add_argument("--third", type=int, choices=(0, 1, 2), help="only every third type, from this one on")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", type=Path, help="write all cells to this file, after each type")
    parser.add_argument("--from", nargs="*", type=Path, default=[], dest="earlier", help="begin with these files")
    parser.add_argument("--write", action="store_true", help="write docs/models.md's table and README.md's counts")
    args = parser.parse_args()
    rows: Rows = {}
    for path in args.earlier:
        rows |= from_json(path.read_text())
    warm_up()
    types = args.types if args.types is not None else every_type.every_type(*args.kinds)
    types = [name for name in (types if args.third is None else types[args.third :: 3]) if name not in rows]
    begun = time.perf_counter()
    for name, variants in run_all(types, args.verbs, args.jobs):
        rows[name] = variants
        for variant, cells in variants.items():
            print(f"{name}{variant and ' ' + variant}: {_line(cells)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, default=asdict, indent=1))
    all_cells = [cells for variants in rows.values() for cells in variants.values()]
    for verb in args.verbs:
        print(f"{verb:14}", dict(Counter(cells[verb].verdict for cells in all_cells if verb in cells)))
    print(f"{len(types)} types in {time.perf_counter() - begun:.0f} s")
    if args.write:
        write_table(rows, ROOT / "docs/models.md", ROOT / "README.md")
    if any(cell.verdict in ("wrong", "crash") for cells in all_cells for cell in cells.values()):
        raise SystemExit(1)


def _line(cells: Mapping[str, Cell]) -> str:
    return " | ".join(f"{verb} {cell.verdict}{cell.why and ': ' + cell.why}" for verb, cell in cells.items())


if __name__ == "__main__":
    main()
