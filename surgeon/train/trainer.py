"""The training loop: transformers' Trainer with our loss, our checkpoints, and nothing that fails in silence.

What is changed, and why: the loss is summed over tokens and divided by the tokens of the whole step, so that
accumulation and several processes give what one batch gives; a loss or a gradient that is not finite ends the run
before the weights are touched; checkpoints appear whole; evaluation counts tokens instead of averaging batches.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from surgeon.errors import TrainingError
from surgeon.train import checkpoints
from surgeon.train.data import RunData

ECHO = 5.0  # seconds; launchers pass a SIGTERM on that the whole group of processes got already


class Stop:
    """Whether the run was asked to stop. The first SIGTERM asks; one that is no echo of it ends the process."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stops_at_sigterm(stop: Stop) -> Iterator[None]:
    """Return a context in which SIGTERM asks for a stop after the step that runs, instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    first: list[float] = []

    def ask(signum: int, frame: Any) -> None:
        stop.asked = True
        first.append(time.monotonic())
        if first[-1] - first[0] > ECHO:
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Control(TrainerCallback):
    """Evaluates at the last step, stops when asked, and when validation has not been better for `patience` times."""

    def __init__(self, stop: Stop, trainer: Any, *, patience: int | None, history: Sequence[float] = ()) -> None:
        self.stop, self.trainer, self.patience = stop, trainer, patience
        self.worse, self.best = 0, float("inf")
        for loss in history:  # of the run that is resumed
            self._judge(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._anyone_asked(args.world_size):
            self.stop.asked = True
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

    def _anyone_asked(self, processes: int) -> bool:
        """Return whether any process was asked to stop: all must stop at the same step."""
        if processes == 1:
            return self.stop.asked
        accelerator = self.trainer.accelerator
        asked = torch.tensor([int(self.stop.asked)], device=accelerator.device)
        return bool(accelerator.gather(asked).any())


COUNTS = ("num_tokens", "num_trained")  # of a batch, as numbers of Python: on a GPU, counting tensors waits for it
TRAINING_ARGS = "training_args.bin"  # a pickle that nothing of ours reads


class DivergedError(TrainingError):
    """The loss, or the gradient, is no finite number."""


class Counted:
    """A collator that says of each batch how many tokens it has, and how many of them are trained."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        tokens, trained = int((batch["token_index"] >= 0).sum()), int((batch["labels"] != -100).sum())
        return {**batch, "num_tokens": tokens, "num_trained": trained}


@dataclass(frozen=True)
class Evaluated:
    """Mean losses in nats a token at a step: of held-out rows, and of trained ones; None where there are none."""

    step: int
    validation: float | None
    probe: float | None


class SurgeonTrainer(Trainer):
    """A Trainer whose model returns its own loss (train/objective.py) and counts what it was given.

    `told` is called with the numbers of each step, `evaluated` with the losses of each evaluation, which like saving
    happens in a `paused` context. `keep` is how many checkpoints are kept, with `keep_best` the best one beside.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        data: RunData,
        told: Callable[[dict[str, float]], None],
        evaluated: Callable[[Evaluated], None],
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
        keep: int = 1,
        keep_best: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=Counted(data.collate),
            train_dataset=data.rows,
            eval_dataset=dict(data.held_out),
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.data, self.told, self.evaluated, self.paused = data, told, evaluated, paused
        self.keep, self.keep_best = keep, keep_best
        self._stage: Path | None = None
        self._step: list[tuple[Tensor, Mapping[str, Any]]] = []  # loss and batch of each part of a step
        self._parts: dict[str, Tensor | float] = {}  # sums over the tokens of a step, by name

    # --- one step ---------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of one step, and how many of their tokens are trained on all processes together."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.tensor([[batch[name] for name in COUNTS] for batch in batches]).view(-1, 2).sum(0)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.to(device)[None]).sum(0).cpu()
        tokens, trained = counts.tolist()
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
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        losses = torch.stack([loss for loss, _ in self._step])
        length = torch.as_tensor(0.0 if norm is None else norm).to(losses.device)
        if not bool(torch.isfinite(losses).all() & torch.isfinite(length)):  # one wait for the GPU in a step
            self._diverged(losses.tolist(), float(length))
        return norm

    def _diverged(self, losses: list[float], norm: float) -> None:
        wrong = next((index for index, loss in enumerate(losses) if not abs(loss) < float("inf")), None)
        what = f"the gradient's norm is {norm}" if wrong is None else f"the loss is {losses[wrong]}"
        batch = self._step[wrong or 0][1]
        last = self.state.global_step
        raise DivergedError(
            f"{what} at step {last + 1}, on {self.data.describe(batch)}",
            hint="Nothing was stored since. Lower --lr, lengthen --warmup, or look at those documents.",
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: counted once for the run (train/speed.py), not in every batch."""
        return 0

    # --- what is told -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the numbers of a step on: the loss that was trained, and its parts per trained token."""
        if "loss" not in logs:  # the summary at the end
            return
        items = max(1, int(self._parts["num_trained"]))
        parts = {name: value for name, value in self._parts.items() if isinstance(value, Tensor)}
        if self.args.world_size > 1:
            parts = {name: self.accelerator.gather(value.view(1)).sum() for name, value in parts.items()}
        logs = {**logs, **{name: float(value) / items for name, value in parts.items()}}
        logs |= {
            "step": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "epoch": float(self.state.epoch or 0),
        }
        self.told(logs)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Return the mean losses of the held-out rows, in nats a token, and tell them."""
        with self.paused():
            found = {name: self._mean_loss(rows) for name, rows in self.data.held_out.items()}
        if wrong := next((name for name, loss in found.items() if not math.isfinite(loss)), None):
            raise DivergedError(
                f"the {wrong} loss is {found[wrong]} after step {self.state.global_step}",
                hint="The model puts out numbers that are not finite; surgeon evaluate shows since when.",
            )
        self.evaluated(Evaluated(self.state.global_step, found.get("validation"), found.get("probe")))
        metrics = {f"eval_{name}_loss": loss for name, loss in found.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_loss(self, rows: Any) -> float:
        """Return the cross-entropy of rows, in nats a token. Each process takes its share, all as many batches."""
        model, size = self.model_wrapped, self.args.per_device_eval_batch_size
        rank, world = self.args.process_index, self.args.world_size
        sums = torch.zeros(2, dtype=torch.float64)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for begin in range(rank * size, rank * size + -(-len(rows) // (size * world)) * size * world, size * world):
                chosen = list(range(begin, min(begin + size, len(rows))))
                batch = self.data_collator([rows[index] for index in chosen or [0]])
                inputs = self._prepare_inputs({name: value for name, value in batch.items() if name not in COUNTS})
                outputs = model(**inputs, num_items=1)
                if chosen:
                    sums += torch.tensor([float(outputs["cross_entropy"]), batch["num_trained"]], dtype=torch.float64)
        model.train(was_training)
        if world > 1:
            sums = self.accelerator.gather(sums.float().to(self.args.device)[None]).double().sum(0).cpu()
        return float(sums[0] / sums[1])

    def take(self, checkpoint: Path) -> None:
        """Take weights and progress from a checkpoint, and train no further."""
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
        self.accelerator.wait_for_everyone()
        try:
            with self.paused():
                with checkpoints.explained(run_dir):
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
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
        self.accelerator.wait_for_everyone()
