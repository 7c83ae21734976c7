"""Growth that is learned: the operator trained on a text, judged on another, and joined to the plan of the growth."""

import inspect
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.header import TensorSpec
from surgeon.checkpoint.output import check_apart
from surgeon.data.documents import check_there
from surgeon.errors import TrainingError
from surgeon.growth.settings import LearnOptions
from surgeon.options import reads_of
from surgeon.plan.operators import PREFIX, OperatorFile, after, with_operator
from surgeon.plan.plan import Plan
from surgeon.plan.solved import SolvedWriter, bytes_of
from surgeon.surgery import Surgery
from surgeon.text import plus_minus, size
from surgeon.train.run_dir import Request
from surgeon.train.settings import Settings
from surgeon.transforms.grow import Growth, growth
from surgeon.transforms.learned import Learned, learned

if TYPE_CHECKING:
    from surgeon.growth.training import LearnedOperator

HELD_OUT = 0.05  # of the documents, where no text is given that decides
WARMUP = 0.1  # of the steps: the maps are shared by all layers, so the first steps move everything at once


class LearningStoppedError(TrainingError):
    """SIGTERM has stopped the learning before its last step."""


@dataclass(frozen=True)
class Learning:
    """What was learned, as the receipt has it: `record`, None where nothing is learned yet.

    `numbers` are those that are trained, in so many `tensors`, for so many `steps`. `weights` are the numbers of both
    models, which are in memory in float32 meanwhile, beside what is computed between them.
    """

    steps: int
    tensors: int
    numbers: int
    weights: int
    record: Mapping[str, Any] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was learned on which text and what it is worth, in sentences for the card."""
        if self.record is None:
            return ()
        texts = ", ".join(str(item["data"]) for item in self.record["data"])
        what = f"{self.numbers:,} numbers of the growth's maps for {self.steps:,} steps on {texts}"
        kept = "the learned growth is kept" if self.is_kept else "it is no better, so the exact growth is kept"
        return (
            (f"learned {what}: {self._losses} on held-out text; {kept}",)
            if self.steps
            else ("nothing was learned: no step was asked for",)
        )

    @property
    def is_kept(self) -> bool:
        """Whether the result has the learned growth, and not the exact one."""
        return self.record is not None and self.record["kept"] == "learned"

    @property
    def _losses(self) -> str:
        assert self.record is not None, "it was measured"
        held = self.record["held_out"]
        exact, made = (plus_minus(held[name], held[f"{name}_error"]) for name in ("exact", "learned"))
        return f"{made} nats a token, exact growth {exact}"

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what was learned, or would be, as rows for people and as entries for JSON."""
        entries = {"steps": self.steps, "tensors": self.tensors, "parameters": self.numbers}
        if self.record is None:
            would = f"would train {self.numbers:,} numbers in {self.tensors} tensors for {self.steps:,} steps"
            held = f"more than {size(4 * self.weights)} in memory while it learns, the weights of both models alone"
            return [("learning", f"{would}; {held}")], {"learning": entries}
        rows = (
            [("learned", f"{self._losses} (held-out text)"), ("kept", str(self.record["kept"]))] if self.steps else []
        )
        return rows, {"learning": entries | dict(self.record)}

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return nothing: all is known before the result is written."""
        return [], {}


@dataclass(frozen=True, kw_only=True, repr=False)
class Growing(Surgery):
    """A growth whose maps were learned, or are to be.

    `learning` says what was learned, and what it is worth on held-out text.

    text = {"data": ["text.txt"], "sequence_length": 64}
    growing = surgeon.grow("gpt2", layers=14, learn=20, **text)
    print(growing.learning.is_kept, growing.learning.record["held_out"])
    """

    learning: Learning


def learn(begun: Surgery, grown: Growth, options: LearnOptions, *, seed: int) -> Growing:
    """Return the growth with its maps trained as `options` say, or the exact one where that is no worse.

    Without `measure` nothing is trained, and the plan is that of the exact growth.

    Raises PlanError for a model that is not saved yet or that no loss trains, DataError for a text that cannot be read.
    """
    begun.check_saved()
    made = learned(grown, PREFIX)
    learning = Learning(
        steps=options.learn or 0,
        tensors=len(made.starts),
        numbers=sum(prod(each.shape) for each in made.starts.values()),
        weights=begun.spec.num_parameters + grown.plan.result(begun.spec).num_parameters,
    )
    exact = replace(begun, plan=begun.plan.then(grown.plan), reads={**begun.reads, **reads_of(options)})
    source, plan = exact.source, exact.plan
    if options.measure and options.learn:
        operator = _trained(begun, plan, replace(made, plan=after(begun.plan, made.plan)), options, seed)
        learning = replace(learning, record=_record(operator))
        if learning.is_kept:
            file = _written(operator, learning)
            learning = replace(learning, record={**(learning.record or {}), **file.provenance()})
            source, plan = with_operator(begun.source, begun.plan, made.plan, file)
    elif options.measure:
        learning = replace(learning, record={"data": [], "held_out": {}, "kept": "exact", "tokens": 0})
    step = plan.steps[-1]["grow"]
    if learning.record is not None:
        step = {**step, "learned": {"steps": learning.steps, "parameters": learning.numbers, **learning.record}}
    plan = replace(plan, steps=(*plan.steps[:-1], {"grow": step}), notes=(*plan.notes, *learning.notes))
    return Growing(**{**vars(exact), "source": source, "plan": plan, "learning": learning})


def with_learned(begun: Surgery, step: Mapping[str, Any], operator: OperatorFile) -> Surgery:
    """Return the learned growth of a receipt's step, with the operator that lies beside its result."""
    known = inspect.signature(growth).parameters
    grown = growth(begun.anatomy, **{name: value for name, value in step.items() if name in known})
    plan = replace(learned(grown, PREFIX).plan, steps=({"grow": dict(step)},))
    source, whole = with_operator(begun.source, begun.plan, plan, operator)
    return replace(begun, source=source, plan=whole)


def _trained(begun: Surgery, exact: Plan, made: Learned, options: LearnOptions, seed: int) -> "LearnedOperator":
    """Return the operator after its training."""
    from surgeon.growth.training import train_operator
    from surgeon.models.loading import runs
    from surgeon.verbs.finetune import TrainingOptions, task_of

    check_there([*options.data, *options.eval_data])
    if options.run_dir is not None:
        check_apart(Path(options.run_dir), {**begun.reads, **reads_of(options)})
    training = TrainingOptions(
        max_steps=options.learn,
        lr=f"{options.lr:g}",
        eval_data=tuple(options.eval_data),
        eval_fraction=HELD_OUT,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size or "auto",
        warmup=WARMUP,
        precision="float32",
        activation_checkpointing=False,
        compile=False,
        seed=seed,
    )
    task = task_of(begun.source, training)
    settings = {**training.of(Settings).deciding(), "grow": exact.steps[-1]["grow"]}
    request = Request(model=begun.source.provenance(), data=list(options.data), settings=settings)
    place = nullcontext(options.run_dir) if options.run_dir else tempfile.TemporaryDirectory(prefix="surgeon-learn-")
    with place as run_dir, runs(begun.source.label):
        operator = train_operator(
            begun.source,
            exact,
            made,
            task,
            tuple(options.data),
            request=request,
            run_dir=Path(run_dir),
            device=options.device,
        )
    if operator.tensors is None:
        kept = "the same command goes on" if options.run_dir else "nothing is kept of it; --run-dir keeps it"
        raise LearningStoppedError(f"stopped at step {operator.steps:,}", hint=kept)
    return operator


def _record(operator: "LearnedOperator") -> dict[str, Any]:
    """Return what was learned as the receipt has it; losses are in nats a token."""
    first, last = operator.held_out
    assert first.validation is not None, "rows are held out"
    assert last.validation is not None, "rows are held out"
    is_better = last.validation < first.validation
    return {
        "data": operator.data,
        "tokens": operator.tokens,
        "held_out": {
            "exact": first.validation,
            "exact_error": first.error,
            "learned": last.validation,
            "learned_error": last.error,
        },
        "kept": "learned" if is_better else "exact",
        "settings": dict(operator.settings),
    }


def _written(operator: "LearnedOperator", learning: Learning) -> OperatorFile:
    """Return the file of an operator, in a temporary place that lasts as long as it."""
    assert operator.tensors is not None, "it was not stopped"
    writer = SolvedWriter(OperatorFile, "the operator")
    for name, tensor in operator.tensors.items():
        writer.add(name, TensorSpec("F32", tuple(tensor.shape)), bytes_of(tensor))
    record = {"steps": operator.steps, **(learning.record or {})}
    file = writer.finish(record)
    assert file is not None, "a growth has something to learn"
    return file
