"""Is learned growth right on every family? Every toy with a table, grown in every way, its operator moved and written.

    python benchmarks/learned_families.py [NAME...]

Of each toy and each way to grow it is checked that the operator begins at the exact growth to the last bit, that the
first step has a gradient for every learned tensor but those that theory excepts, that the written file holds the
weights that the moved operator computes, and that transformers loads it with nothing missing. Prints a line for each,
with the difference of logits too, and the counts.
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tabled  # noqa: E402
import toys  # noqa: E402
from exact64 import HIDDEN  # noqa: E402
from later import import_late  # noqa: E402

import surgeon  # noqa: E402

WAYS: tuple[dict[str, Any], ...] = (
    {"layers": 8},
    {"intermediate_size": 72},
    {"intermediate_size": "2x"},
    {"expert_intermediate_size": 72},
    {"hidden_size": "2x"},
    {"attention_heads": "2x"},
    {"hidden_size": "2x", "head_dim": "2x"},
    {"hidden_size": "2x", "layers": 8, "intermediate_size": "2x", "width_method": "pad"},
)
CLOSE = 1e-5  # of the largest weight of a tensor


def main() -> None:
    """Check every toy, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="toys of tests/toys.py and tests/tabled.py")
    names = parser.parse_args().names
    import torch
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    configs = {**toys.TOYS, **tabled.TYPES}
    counts: Counter[str] = Counter()
    for name in names or configs:
        with tempfile.TemporaryDirectory() as place:
            config = configs[name] | HIDDEN.get(name, {})
            directory = toys.save(name.partition("-")[0], config, Path(place) / "toy")
            for number, way in enumerate(WAYS):
                verdict, why = checked(directory, way, Path(place) / str(number))
                counts[verdict] += 1
                print(f"{name:28} {verdict:10} {way} {why}", flush=True)
    print(dict(counts))


def checked(directory: Path, way: dict[str, Any], out: Path) -> tuple[str, str]:
    """Return "right", "refused" or "wrong", and why."""
    import test_learned as tests
    import torch
    from safetensors.torch import load_file

    import_late(tests)
    try:
        operator, begun, grown, made = tests.operator_of(directory, way)
    except surgeon.SurgeonError as error:
        return "refused", str(error)[:90]
    eager(operator.model)
    with torch.no_grad():
        if not torch.equal(first := logits(operator.model), logits(operator)):
            return "wrong", "it does not begin at the exact growth"
    begins = logits(operator)
    (begins * torch.randn(begins.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    if dead := tests.dead_of(operator, grown):
        return "wrong", f"no gradient: {dead[:3]}"
    tests.moved(operator)
    written = tests.written(begun, made, operator.tensors(), out)
    found, computed = load_file(written / "model.safetensors"), tests.stored(operator)
    if wrong := [
        name for name, value in computed.items() if (found[name] - value).abs().max() > CLOSE * value.abs().max()
    ]:
        return "wrong", f"the file differs: {wrong[:3]}"
    model, report = toys.load(written)
    if any(report.values()):
        return "wrong", str(report)
    with torch.no_grad():
        wanted, loaded = logits(operator), logits(model)
    top, moved = float(wanted.abs().max()), float((wanted - first).abs().max())
    difference = float((wanted - loaded).abs().max()) / top
    return "right", f"{len(operator.learned)} tensors, logits moved by {moved:.1f}, loaded within {difference:.0e}"


def eager(model: Any) -> None:
    """Let experts compute in loops: transformers' own kernel wants sizes that are multiples of 8."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"


def logits(model: Any) -> Any:
    """Return the logits of a model, or of the one that an operator holds."""
    inner = model.model if hasattr(model, "learned") else model
    return model(**toys.inputs(inner, length=20)).logits


if __name__ == "__main__":
    main()
