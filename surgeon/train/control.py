"""What ends a run, or asks for a checkpoint: its last step, patience that runs out, SIGTERM."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch  # noqa: TID253
from transformers import TrainerCallback  # noqa: TID253

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
