"""Whether transformers builds from the config of a result exactly the tensors that are written.

Its own loader says so: it is given the names and shapes, as tensors that hold no numbers, and reports what it would
draw at random, leave out, or find in another shape. No byte of weights is needed, so the question is asked while they
are written. A program without transformers asks it in a process of its own, which `python -m` this module starts.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from surgeon.checkpoint.header import CheckpointSpec, TensorSpec, is_quantized
from surgeon.errors import MeasureError, PlanError
from surgeon.progress import stage

PATIENCE = 600  # seconds; the largest published checkpoints take a tenth of it
HINT = "Nothing was written. Another number of layers may do; surgeon inspect shows the layers and their kinds."
UNCHECKED = "not checked whether transformers builds this result: {}"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_KINDS = {
    "missing_keys": "draw {} at random",
    "mismatched_keys": "draw {} at random, for it has another shape",
    "unexpected_keys": "leave out {}",
}

Answer = tuple[str | None, tuple[str, ...]]  # why the result is refused, if it is, and notes for the user


@contextmanager
def building(
    source: CheckpointSpec, result: CheckpointSpec, *, config_only: bool = False
) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Yield a function that returns what is to be noted, and raises PlanError for a result that is not built whole.

    What transformers says of the source too is no fault of the surgery. With `config_only` the family's table has
    checked the tensors already, and only transformers' validators of configs are asked.
    """
    if "transformers" in sys.modules or find_spec("transformers") is None:
        answer = examine(source, result, config_only=config_only)
        yield lambda: _conclude(answer)
        return
    question = json.dumps({"config_only": config_only, "source": _packed(source), "result": _packed(result)})
    # The same modules as here, and none of the directory in which the user happens to be.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "surgeon.models.building"]
    process = subprocess.Popen(  # noqa: S603  # no shell, and the program is ours
        command, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has ended, and what it answered is read below
                process.stdin.write(question)
                process.stdin.close()
            process.stdin = None  # or `communicate` would flush it
            yield lambda: _conclude(_answer_of(process))
        finally:
            process.kill()


def examine(source: CheckpointSpec, result: CheckpointSpec, *, config_only: bool) -> Answer:
    """Return what transformers, imported here, says of a result that it does not say of its source."""
    if find_spec("transformers") is None:
        return None, (UNCHECKED.format("transformers is not installed"),)
    if refused := _refusal(lambda: _read(source)):
        return None, (UNCHECKED.format(refused),)
    if refused := _refusal(lambda: _read(result)):
        return refused, ()
    if config_only:
        return None, ()
    try:
        faults = _faults(result)
    except MeasureError as error:
        return (None, (UNCHECKED.format(error),)) if _refusal(lambda: _faults(source)) else (str(error), ())
    return _compared(faults, source)


def _refusal(act: Callable[[], object]) -> str | None:
    """Return why transformers does not do something, None where it does."""
    try:
        act()
    except MeasureError as error:
        return str(error)
    return None


def _read(spec: CheckpointSpec) -> None:
    from surgeon.models.loading import parsed_config

    parsed_config(spec.config, "the config of this result")


def _compared(faults: Mapping[str, Sequence[str]], source: CheckpointSpec) -> Answer:
    """Return the first fault of a result that its source does not have as often, in any of its layers."""
    if not any(faults.values()):
        return None, ()
    of_source = _faults(source)
    for kind, does in _KINDS.items():
        known, counts = (Counter(_NUMBER.sub("*", name) for name in names[kind]) for names in (of_source, faults))
        new = [name for name in faults[kind] if counts[pattern := _NUMBER.sub("*", name)] > known[pattern]]
        if new:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            what = does.format(f"{new[0]!r}{more}")
            return f"from the config of this result transformers would not build what is written: it would {what}", ()
    random = [*faults["missing_keys"], *faults["mismatched_keys"]]
    return None, (f"transformers draws {random[0]!r} at random, as it does in the source",) if random else ()


def _faults(spec: CheckpointSpec) -> dict[str, Sequence[str]]:
    """Return the names of tensors that the loader of transformers misses, does not expect, or finds misshapen."""
    from surgeon.models.loading import load_shapes

    report = load_shapes(spec.config, {name: tensor.shape for name, tensor in spec.tensors.items()})
    faults: dict[str, Sequence[str]] = {
        kind: sorted(name if isinstance(name, str) else name[0] for name in report[kind]) for kind in _KINDS
    }
    if not is_quantized(spec.config):
        return faults
    # The codes of a weight are stored under other names and in other shapes, in the place of its module.
    coded = {name.rpartition(".")[0] for name in faults["unexpected_keys"]}
    missing = [name for name in faults["missing_keys"] if name.rpartition(".")[0] not in coded]
    return {"missing_keys": missing, "mismatched_keys": [], "unexpected_keys": []}


def _packed(spec: CheckpointSpec) -> dict[str, Any]:
    return {"config": spec.config, "tensors": {name: tensor.shape for name, tensor in spec.tensors.items()}}


def _unpacked(packed: Mapping[str, Any]) -> CheckpointSpec:
    tensors = {name: TensorSpec("F32", tuple(shape)) for name, shape in packed["tensors"].items()}
    return CheckpointSpec(packed["config"], tensors)


def _answer_of(process: "subprocess.Popen[str]") -> Answer:
    try:
        with stage("asking transformers whether it builds the result"):
            said, _ = process.communicate(timeout=PATIENCE)
        fault, notes = json.loads(said)
    except (subprocess.TimeoutExpired, ValueError):
        ended = f"ended with status {process.poll()}" if process.poll() is not None else f"took over {PATIENCE} s"
        return None, (UNCHECKED.format(f"the process that asks it {ended}"),)
    return fault, tuple(notes)


def _conclude(answer: Answer) -> tuple[str, ...]:
    fault, notes = answer
    if fault is not None:
        raise PlanError(fault, hint=HINT)
    return notes


def main(arguments: Sequence[str] = ()) -> None:
    """Answer the question on standard input."""
    question = json.loads(sys.stdin.read())  # before anything is imported: the asking process waits until it is read
    if question["config_only"]:
        sys.modules["torch"] = None  # type: ignore[assignment]  # configs do without it, and its import takes longest
    source, result = _unpacked(question["source"]), _unpacked(question["result"])
    json.dump(examine(source, result, config_only=question["config_only"]), sys.stdout)


if __name__ == "__main__":
    main()
