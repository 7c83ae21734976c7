"""The training loop: transformers' Trainer with our loss and our checkpoints, and no silent failures.

The changes: the loss is summed over tokens and divided by the tokens of the whole step, so that accumulation and
several processes give the result of one batch; a loss or a gradient that is not finite ends the run before the weights
change; checkpoints are written whole; evaluation counts tokens instead of averaging batches.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from surgeon.errors import CheckpointError, SurgeonError, TrainingError
from surgeon.models.loading import libraries_fail
from surgeon.models.split import Plans
from surgeon.processes import totals, wait_for_all
from surgeon.progress import Stage, stage
from surgeon.train import checkpoints
from surgeon.train.data import RunData

OLDER = "Remove that checkpoint: the run then continues from the one before it."
ECHO = 5.0  # seconds in which a second SIGTERM is the first one again, passed on by a launcher


class Stop:
    """A request to stop the run. The first SIGTERM makes it; a later one, after ECHO seconds, ends the process."""

    def __init__(self) -> None:
        self.is_requested = False


@contextmanager
def stops_at_sigterm(stop: Stop) -> Iterator[None]:
    """Return a context in which SIGTERM requests a stop after the current step, instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    first: list[float] = []

    def request(signum: int, frame: Any) -> None:
        stop.is_requested = True
        first.append(time.monotonic())
        if first[-1] - first[0] > ECHO:
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Control(TrainerCallback):
    """Evaluates at the last step; stops at a request, and after `patience` evaluations without an improvement."""

    def __init__(self, stop: Stop, *, patience: int | None, history: Sequence[float] = ()) -> None:
        self.stop, self.patience = stop, patience
        self.worse, self.best = 0, float("inf")
        for loss in history:  # of the run that is resumed
            self._judge(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_stop_requested(args.world_size):
            self.stop.is_requested = True
            control.should_save = control.should_training_stop = True
        elif state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss = (metrics or {}).get("eval_validation_loss")
        if loss is not None:
            self._judge(loss)
        if self.is_over:
            control.should_training_stop = control.should_save = True

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.worse >= self.patience

    def _judge(self, loss: float) -> None:
        self.worse = 0 if loss < self.best else self.worse + 1
        self.best = min(self.best, loss)

    def _is_stop_requested(self, processes: int) -> bool:
        """Return whether any process is to stop: all must stop at the same step."""
        return self.stop.is_requested if processes == 1 else totals([int(self.stop.is_requested)]) != [0]


def warmed(step: int, *, warmup: int, after: Callable[[int], float]) -> float:
    """Return the rate of a step, counted from 0, as a share of the peak: it rises by 1 / warmup, then is `after`'s."""
    return (step + 1) / warmup if step < warmup else after(step)


COUNTS = ("num_tokens", "num_trained")  # of a batch, as Python numbers: reading tensors would wait for the GPU
TRAINING_ARGS = "training_args.bin"  # a pickle that nothing of ours reads


class DivergedError(TrainingError):
    """The loss or the gradient is not finite."""


class Counted:
    """A collator that adds to each batch its tokens, how many of them are trained, and the `plan` of the loss."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Tensor]], plan: Plans) -> None:
        self.collate, self.plan = collate, plan

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return the batch; in a process that loads data, an error is a batch of its own, named `error`.

        torch would hand on another error in its place, without its hint, and with a traceback in its sentence.
        """
        try:
            return self._counted(rows)
        except SurgeonError as error:
            if get_worker_info() is None:
                raise
            return {"error": error}

    def _counted(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        plan = self.plan(batch)
        tokens = int((batch["token_index"].numpy() >= 0).sum())
        counts = {"num_tokens": tokens, "num_trained": len(batch["trained"])}
        return {**batch, **({"plan": plan} if plan else {}), **counts}


@dataclass(frozen=True)
class EvalLosses:
    """Mean losses in nats per token at a step: of held-out rows, and of trained rows; None where there are none.

    `error` is the standard error of the validation loss, over its batches; None where there is one batch only.
    """

    step: int
    validation: float | None
    probe: float | None
    error: float | None = None


def progress(checkpoint: Path) -> tuple[int, int]:
    """Return how many steps and tokens of the run came before a checkpoint."""
    file, step = checkpoint / TRAINER_STATE_NAME, checkpoints.step_of(checkpoint)
    with libraries_fail(f"{file} is not the state of a run", hint=OLDER, error_type=CheckpointError):
        state = TrainerState.load_from_json(str(file))
    tokens, done = state.num_input_tokens_seen, state.global_step
    if done != step or type(tokens) is not int or not 0 <= tokens < 2**63:
        raise CheckpointError(f"{file} says step {done!r} and {tokens!r} tokens, at step {step}", hint=OLDER)
    return step, tokens


def _resuming(checkpoint: object, part: str) -> AbstractContextManager[None]:
    """Return a context in which an error of a library is one of a part of a checkpoint."""
    return libraries_fail(f"cannot go on from the {part} of {checkpoint}", hint=OLDER, error_type=CheckpointError)


class SurgeonTrainer(Trainer):
    """A Trainer whose model returns its own loss (train/objective.py) and counts what it was given.

    `on_step` is called with the numbers of each step, `on_evaluation` with the losses of each evaluation. Evaluating
    and saving happen in a `paused` context. The `keep` newest checkpoints are kept, with `keep_best` also the best.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        data: RunData,
        on_step: Callable[[dict[str, float]], None],
        on_evaluation: Callable[[EvalLosses], None],
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
        keep: int = 1,
        keep_best: bool = False,
    ) -> None:
        plans = replace(model._surgeon_plan, multiple=data.collate.pad_to_multiple_of or 1)
        super().__init__(
            model=model,
            args=args,
            data_collator=Counted(data.collate, plans),
            train_dataset=data.rows,
            eval_dataset=dict(data.held_out),
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.data, self.on_step, self.on_evaluation, self.paused = data, on_step, on_evaluation, paused
        self.keep, self.keep_best = keep, keep_best
        self._collate_evaluated = Counted(data.collate, plans.untaught())
        self._stage: Path | None = None
        self._step: list[tuple[Tensor, Mapping[str, Any]]] = []  # loss and batch of each part of a step
        self._losses: list[float] = []  # of the parts of a step, as they were read
        self._parts: dict[str, Any] = {}  # sums over the tokens of a step, by name; tensors until they are read

    # --- one step ---------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of one step, and how many of their tokens are trained on all processes together."""
        batches = list(islice(epoch_iterator, num_batches))
        if error := next((batch["error"] for batch in batches if "error" in batch), None):
            raise error
        counts = [sum(batch[name] for batch in batches) for name in COUNTS]
        tokens, trained = totals(counts) if self.args.world_size > 1 else counts
        self.state.num_input_tokens_seen += tokens
        self._step, self._parts = [], {"num_tokens": tokens, "num_trained": trained}
        return batches, max(1, trained)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this batch's share of the step's mean loss, times the processes whose gradients are averaged."""
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in COUNTS}, num_items=num_items_in_batch
        )
        for name, value in outputs.items():
            if name not in ("loss", *COUNTS):
                self._parts[name] = self._parts.get(name, 0.0) + value.detach()
        loss = outputs["loss"] * self.args.world_size
        self._step.append((loss.detach(), inputs))
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm, a number: with it all numbers of the step are read, in its only wait for a GPU.

        Raises DivergedError where one is not finite, before the weights change.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        losses = [loss for loss, _ in self._step]
        parts = {name: value for name, value in self._parts.items() if isinstance(value, Tensor)}
        numbers = [value.to(losses[0].dtype) for value in parts.values()]
        if self.args.world_size > 1 and numbers:
            numbers = list(self.accelerator.gather(torch.stack(numbers)[None]).sum(0))
        length = torch.as_tensor(0.0 if norm is None else norm).to(losses[0])
        read = torch.stack([*losses, length, *numbers]).tolist()
        self._losses, size = read[: len(losses)], read[len(losses)]
        self._parts |= dict(zip(parts, read[len(losses) + 1 :], strict=True))
        if not all(map(math.isfinite, (*self._losses, size))):
            self._diverged(self._losses, size)
        return None if norm is None else size

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **options: Any) -> None:
        """Log the step, with the sum of its losses as it was read: reading `tr_loss` would wait for the new weights."""
        is_logged = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if self.args.world_size > 1 or not is_logged:
            return super()._maybe_log_save_evaluate(tr_loss, *args, **options)
        loss = torch.zeros((), dtype=tr_loss.dtype)
        for each in self._losses:
            loss += each
        tr_loss.zero_()
        return super()._maybe_log_save_evaluate(loss, *args, **options)

    def _diverged(self, losses: list[float], norm: float) -> None:
        wrong = next((index for index, loss in enumerate(losses) if not abs(loss) < float("inf")), None)
        fault = f"the gradient's norm is {norm}" if wrong is None else f"the loss is {losses[wrong]}"
        batch = self._step[wrong or 0][1]
        last = self.state.global_step
        raise DivergedError(
            f"{fault} at step {last + 1}, on {self.data.describe(batch)}",
            hint="Nothing was stored since. Lower --lr, lengthen --warmup, or look at those documents.",
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: operations are counted once for the run, not in every batch."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule, whose warm-up has its first step at 1 / warm-up of the peak, not at a rate of 0."""
        made: Any = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if isinstance(made, LambdaLR) and warmup > 0:
            rates: list[Callable[[int], float]]
            rates = [partial(warmed, warmup=warmup, after=after) for after in made.lr_lambdas]
            made = self.lr_scheduler = LambdaLR(made.optimizer, rates)
        return made

    # --- reports ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the numbers of a step, per trained token: as `loss` the cross-entropy, which evaluations have too.

        With other parts, those of a teacher, the minimised sum of all is the `objective`.
        """
        if "loss" not in logs:  # the summary at the end
            return
        items = max(1, int(self._parts["num_trained"]))
        parts = {name: value / items for name, value in self._parts.items() if name not in COUNTS}
        mixed = {"objective": logs["loss"]} if len(parts) > 1 else {}
        logs = {**logs, "loss": parts.pop("cross_entropy"), **mixed, **parts}
        logs |= {
            "step": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "epoch": float(self.state.epoch or 0),
        }
        self.on_step(logs)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Return the mean losses of the held-out rows, in nats per token, and report them."""
        total = sum(map(len, self.data.held_out.values()))
        with self.paused(), stage("evaluating", total, "rows") as count:
            found = {name: self._mean_loss(rows, count) for name, rows in self.data.held_out.items()}
        losses = {name: loss for name, (loss, _) in found.items()}
        if wrong := next((name for name, loss in losses.items() if not math.isfinite(loss)), None):
            raise DivergedError(
                f"the {wrong} loss is {losses[wrong]} after step {self.state.global_step}",
                hint="The model puts out numbers that are not finite; surgeon evaluate shows since when.",
            )
        error = found.get("validation", (0.0, None))[1]
        self.on_evaluation(EvalLosses(self.state.global_step, losses.get("validation"), losses.get("probe"), error))
        metrics = {f"eval_{name}_loss": loss for name, loss in losses.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_loss(self, rows: Any, count: Stage) -> tuple[float, float | None]:
        """Return the cross-entropy of rows, in nats per token, and its standard error, each batch being one cluster.

        All processes compute the same number of batches. The error is None where there is one.
        Source of the error: Cochran 1977 (Sampling Techniques), section 6.3, as in evals/compare.py.
        """
        model, size = self.model_wrapped, self.args.per_device_eval_batch_size
        rank, world = self.args.process_index, self.args.world_size
        counts: list[int] = []
        losses: list[Tensor] = []  # read together at the end: each reading waits for a GPU
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for begin in range(rank * size, rank * size + -(-len(rows) // (size * world)) * size * world, size * world):
                chosen = list(range(begin, min(begin + size, len(rows))))
                batch = self._collate_evaluated([rows[index] for index in chosen or [0]])
                inputs = self._prepare_inputs({name: value for name, value in batch.items() if name not in COUNTS})
                outputs = model(**inputs, num_items=1, taught=False)
                if chosen:
                    losses.append(outputs["cross_entropy"])
                    counts.append(batch["num_trained"])
                count(len(chosen) * world)
        model.train(was_training)
        read = torch.stack(losses).tolist() if losses else []
        pairs = list(zip(read, counts, strict=True))
        squares = [sum(x * x for x, _ in pairs), sum(x * n for x, n in pairs), sum(n * n for n in counts)]
        sums = [float(each) for each in (sum(read), sum(counts), len(pairs), *squares)]  # one type in every process
        total, tokens, batches, xx, xn, nn = sums if world == 1 else totals(sums)
        loss = total / tokens
        if batches < 2:
            return loss, None
        spread = max(0.0, xx - 2 * loss * xn + loss * loss * nn)
        return loss, math.sqrt(batches / (batches - 1) * spread) / tokens

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, *args: Any, **options: Any) -> None:
        with _resuming(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **options)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with _resuming(checkpoint, "optimizer or schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with _resuming(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def restore(self, checkpoint: Path) -> None:
        """Load weights and progress from a checkpoint, without training."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = bool(super()._determine_best_metric(metrics, trial)) if metrics else False
        self.control.should_save |= is_best and self.keep_best
        return is_best

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, whole or not at all: Trainer's own files, staged, synced, and listed in a manifest."""
        run_dir, step, is_first = Path(str(self.args.output_dir)), self.state.global_step, self.is_world_process_zero()
        self._stage = checkpoints.begin(run_dir, step) if is_first else checkpoints.stage_path(run_dir, step)
        wait_for_all()
        try:
            with self.paused(), stage("writing a checkpoint"):
                with checkpoints.explained(run_dir):
                    super()._save_checkpoint(model, trial)
                wait_for_all()
                if is_first:
                    made = self._stage / f"checkpoint-{step}"
                    (made / TRAINING_ARGS).unlink(missing_ok=True)
                    checkpoints.commit(run_dir, step)
                    best = [self.state.best_global_step] if self.keep_best and self.state.best_global_step else []
                    checkpoints.rotate(run_dir, keep=self.keep, protect=best)
        finally:
            self._stage = None
            if is_first:
                checkpoints.abandon(run_dir, step)
        wait_for_all()
