"""The result of a run: a summary of it, and its weights written as a checkpoint or as an adapter."""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint import output, receipt
from surgeon.checkpoint.derived import TrainedSource
from surgeon.checkpoint.receipt import model_card
from surgeon.checkpoint.source import CARD, RECEIPT, LocalSource, Source, spec_of
from surgeon.options import size_in_bytes
from surgeon.plan.expressions import Cast
from surgeon.plan.plan import FLOAT_DTYPES, STORED_DTYPES, identity
from surgeon.showing import Shown
from surgeon.surgery import Surgery
from surgeon.text import plus_minus
from surgeon.train import checkpoints
from surgeon.train.run_dir import HELD_OUT, TEACHER, TRAINED, WEIGHTS, without_nan, write_done
from surgeon.train.settings import Settings

TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")


@dataclass(frozen=True, repr=False)
class Training(Shown):
    """The summary of a run. Losses are means, in what `unit` says; of training over the last tenth of the steps.

    `train_loss` and `eval_loss` are the same quantity, for language models the cross-entropy, also with a teacher; then
    `train_kl` is the divergence from it and `objective` the mix that is minimised. Errors are standard errors, None
    where there are too few steps or batches.

    `output` is the checkpoint; None for a run that SIGTERM stopped, which `--resume` continues. `steps` and `tokens`
    are of the whole run, `seconds` and `tokens_per_second` of this process alone. `already_done` marks the summary of a
    run that was finished before it was to be resumed.

        training = surgeon.finetune("gpt2", data=["text.txt"], output="tuned", max_steps=20, sequence_length=64)
        print(training.steps, training.train_loss, training.eval_loss)
        training.draw().savefig("loss.png")
    """

    output: Path | None
    run_dir: Path
    steps: int
    tokens: int
    train_loss: float | None
    eval_loss: float | None
    learning_rate: float
    best_step: int | None
    tokens_per_second: float | None
    seconds: float
    plot: Path | None = None
    notes: tuple[str, ...] = ()
    already_done: bool = False
    unit: str = "nats a token"
    train_loss_error: float | None = None
    train_kl: float | None = None
    objective: float | None = None
    eval_loss_error: float | None = None
    run_bytes: int | None = None  # of the files in the run's directory, once it is finished

    @classmethod
    def of_finished(cls, summary: Mapping[str, Any]) -> "Training":
        """Return the summary of a finished run from its entries in JSON, also those of an older surgeon.

        Raises KeyError, TypeError.
        """
        values = {item.name: summary[item.name] for item in fields(cls) if item.name in summary}
        places = {name: None if values[name] is None else Path(values[name]) for name in ("output", "run_dir", "plot")}
        return cls(**values | places | {"notes": tuple(values["notes"]), "already_done": True})

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as `--json` prints it."""
        return {
            "output": None if self.output is None else str(self.output),
            "run_dir": str(self.run_dir),
            "steps": self.steps,
            "tokens": self.tokens,
            "train_loss": self.train_loss,
            "train_loss_error": self.train_loss_error,
            **({} if self.objective is None else {"train_kl": self.train_kl, "objective": self.objective}),
            "eval_loss": self.eval_loss,
            "eval_loss_error": self.eval_loss_error,
            "unit": self.unit,
            "run_bytes": self.run_bytes,
            "learning_rate": self.learning_rate,
            "best_step": self.best_step,
            "tokens_per_second": self.tokens_per_second,
            "plot": None if self.plot is None else str(self.plot),
            "notes": list(self.notes),
            "already_done": self.already_done,
            "seconds": round(self.seconds, 3),
        }

    def losses(self) -> list[tuple[str, str]]:
        """Return the losses for people, each under its name: with a teacher the cross-entropies, the KL and the mix."""
        is_mixed = self.objective is not None
        name = "cross-entropy" if is_mixed else "loss"
        rows: list[tuple[str, float | None, float | None]] = [
            (f"train {name}", self.train_loss, self.train_loss_error),
            (f"validation {name}", self.eval_loss, self.eval_loss_error),
            ("train KL to the teacher", self.train_kl, None),
            ("train objective", self.objective, None),
        ]
        return [(name, f"{plus_minus(loss, error)} {self.unit}") for name, loss, error in rows if loss is not None]

    @property
    def headline(self) -> str:
        """The result, its steps and its losses."""
        shown = "".join(f", {name} {loss}" for name, loss in self.losses())
        return f"{self.output}, {self.steps:,} steps, {self.tokens:,} tokens{shown}"

    def draw(self, *, x: str = "steps") -> Any:
        """Return a figure of matplotlib with the losses of the run, against "steps" or "tokens"."""
        from surgeon.plots.training import draw_losses
        from surgeon.train.run_dir import read_metrics

        return draw_losses([(self.run_dir, read_metrics(self.run_dir))], x=x)

    def to_text(self) -> str:
        """Return the summary for people."""
        if self.already_done:
            return f"already done: {self.output}  ({self.steps:,} steps; the run's files are in {self.run_dir})"
        rows = [("steps", f"{self.steps:,}  ({self.tokens:,} tokens)"), *self.losses()]
        rows += [("learning rate", f"{self.learning_rate:g}")]
        rows += [] if self.best_step is None else [("best step", f"{self.best_step:,}")]
        rows += [] if self.tokens_per_second is None else [("tokens a second", f"{self.tokens_per_second:,.0f}")]
        rows += [] if self.plot is None else [("plot", str(self.plot))]
        rows += [("note", note) for note in self.notes]
        held = "" if self.run_bytes is None else f"  ({text.size(self.run_bytes)})"
        rows += [("run's files", f"{self.run_dir}{held}")]
        rows += [("seconds", f"{self.seconds:.1f}"), ("output", str(self.output))]
        return text.rows(rows)


def concluded(trained: Training, settings: Settings) -> Training:
    """Return the summary of a run whose output is written, and keep in its directory what is still of use.

    Tokens and a teacher's answers go. Of the checkpoints the newest stays, with --keep-best the best too, without the
    optimiser's states, which are two thirds of it: it has the weights in the precision of the training. A number of
    --keep-checkpoints keeps as many whole ones. A note says what was removed; status.json then says that all is done.
    """
    run_dir, notes = trained.run_dir, list(trained.notes)
    for name in (TRAINED, HELD_OUT, TEACHER, WEIGHTS):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    if settings.keep_checkpoints is None:
        best = trained.best_step if settings.keep_best else None
        left, removed = checkpoints.settle(run_dir, [] if best is None else [best])
        if removed:
            kept = " and ".join(path.name for path in left)
            how = "--keep-checkpoints 2 keeps the last two whole"
            notes.append(f"kept {kept} without the optimiser's state, removed {text.size(removed)} ({how})")
    trained = replace(trained, notes=tuple(notes), run_bytes=checkpoints.size_of(run_dir))
    assert trained.output is not None
    write_done(run_dir, output=trained.output, summary=without_nan(trained.to_dict()), step=trained.steps, exit_code=0)
    return trained


def trained_surgery(
    source: Source, weights: Path, *, dtype: str, step: Mapping[str, Any], notes: tuple[str, ...]
) -> Surgery:
    """Return the surgery that writes the trained weights of `source`, read from the directory `weights`.

    With dtype "keep" each tensor is stored in the source's dtype; a tensor that the source does not have, in the dtype
    of most of its tensors.
    """
    trained = TrainedSource(source, LocalSource(weights, source.label))
    plan = identity(spec_of(trained), depth=read_anatomy(spec_of(trained)).depth)
    if dtype == "keep":
        dtypes = Counter(item.spec.dtype for item in source.tensors.values() if item.spec.dtype in FLOAT_DTYPES)
        usual = dtypes.most_common(1)[0][0] if dtypes else STORED_DTYPES["float32"]
        stored = {name: item.spec.dtype for name, item in source.tensors.items()}
        tensors = {name: Cast(expr, stored.get(name, usual)) for name, expr in plan.tensors.items()}
        plan = replace(plan, tensors=tensors)
    return Surgery(trained, replace(plan, steps=({"finetune": dict(step)},), notes=(*plan.notes, *notes)))


def write_adapter(
    source: Source,
    adapter: Path,
    target: Path,
    step: Mapping[str, Any],
    *,
    command: str | None,
    overwrite: bool,
    max_shard_size: int | str,
) -> None:
    """Write a directory with an adapter, as PEFT does, and the tokenizer, card and receipt."""
    assert size_in_bytes(max_shard_size), "checked by the verb; an adapter is one file"
    companions = {name: source.fetch(name) for name in source.companions if name.startswith(TOKENIZER_FILES)}
    companions |= {path.name: path for path in adapter.glob("adapter_*")}
    depth = read_anatomy(spec_of(source)).depth
    record = receipt.receipt(
        source=source.provenance(),
        steps=[{"finetune": dict(step)}],
        layer_map=range(depth),
        axis_maps={},
        options={},
        command=command,
        notes=(),
    )
    page = model_card(
        title=target.name,
        base_models=[receipt.public_name(source)],
        done=f"A LoRA adapter for `{receipt.public_name(source)}`, trained by surgeon; load it with PEFT.",
        facts={"rank": str(step["settings"]["lora"]), "steps": f"{step['steps']:,}", "tokens": f"{step['tokens']:,}"},
        command=command,
    ).replace("library_name: transformers", "library_name: peft")
    with output.staged(target, overwrite=overwrite) as stage:
        output.copy_files(stage, companions)
        output.write_files(stage, {CARD: page.encode(), RECEIPT: receipt.to_bytes(record)})
        source.check_unchanged()
