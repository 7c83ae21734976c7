"""What the Trainer is told: its arguments for a run, on the device that the user named, and what must be installed."""

import math
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from surgeon.errors import PlanError
from surgeon.processes import processes
from surgeon.train.data import RunData
from surgeon.train.model import precision_of
from surgeon.train.settings import SCHEDULES, Settings

SHARED_MEMORY, LEAST_SHARED = Path("/dev/shm"), 1 << 30  # noqa: S108  # a large batch with stored answers has 50 MB
WORKERS = 2


@dataclass
class RunArguments(TrainingArguments):
    """TrainingArguments of a process that computes on `gpu`, such as "cuda:1"; without it transformers chooses.

    Of several GPUs transformers takes the first, whatever the model is on, and would use torch's DataParallel, which
    is slower than one GPU.
    """

    gpu: str | None = None

    @cached_property
    def _setup_devices(self) -> torch.device:
        chosen: torch.device = super()._setup_devices
        if self._n_gpu > 1:
            self._n_gpu = 1
        if self.gpu is None or chosen.type != "cuda" or self.distributed_state.distributed_type != DistributedType.NO:
            return chosen
        device = torch.device(self.gpu)
        torch.cuda.set_device(device)
        self.distributed_state.device = device  # from which accelerate takes it
        return device


def set_environment(settings: Settings, device: str) -> None:
    """Set what libraries read once, before the first product on a GPU, which may be a teacher's.

    What the user has set stays. Segments that grow waste less memory where each batch has another width; not run on a
    card yet.
    """
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.startswith("cuda") and sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def num_workers(settings: Settings, device: str) -> int:
    """Return how many processes load data: by default none, and with CUDA two, which work while it computes.

    They hand batches on through shared memory. Containers often have too little of it; there the default is none.
    """
    if settings.workers is not None:
        return settings.workers
    if not device.startswith("cuda") or not SHARED_MEMORY.is_dir():
        return 0
    return WORKERS if shutil.disk_usage(SHARED_MEMORY).free >= LEAST_SHARED else 0


def arguments(
    settings: Settings, data: RunData, *, run_dir: Path, lr: float, steps: int, device: str, resumed: bool
) -> TrainingArguments:
    """Return the arguments of the Trainer for a run of so many steps."""
    rows = settings.sequences * processes()
    every, saves = cadence(settings, steps, evaluated=sum(map(len, data.held_out.values())) / rows)
    uses_cpu = device == "cpu" and not is_launched_by_plugin()
    return RunArguments(
        output_dir=str(run_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=lr,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=precision_of(settings, device) == "bf16",
        use_cpu=uses_cpu,
        seed=settings.seed,
        data_seed=settings.seed,
        full_determinism=settings.deterministic,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it logs a loss of 0 for a NaN, and goes on
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=not resumed,
        save_strategy="steps" if saves else "no",
        save_steps=saves or 500,
        metric_for_best_model=f"eval_{'validation' if 'validation' in data.held_out else 'probe'}_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        include_num_input_tokens_seen="no",  # it waits for the GPU in every batch; we count in the collator
        dataloader_drop_last=False,
        dataloader_num_workers=num_workers(settings, device),
        accelerator_config={"non_blocking": device.startswith("cuda")},  # from pinned memory, as Trainer asks for it
        report_to=list(settings.track) or "none",
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,
        gpu=device if device.startswith("cuda:") else None,
    )


SHARE = 0.2  # of the time of the steps, that evaluations between them may take by default


def cadence(settings: Settings, steps: int, *, evaluated: float) -> tuple[int, int]:
    """Return how many steps lie between evaluations, and between checkpoints (0: none are written).

    By default both are a tenth of the run, but evaluations are not closer than their cost allows: one of `evaluated`
    times the rows of a step takes about a third of that many steps, for it has no backward pass.
    """
    tenth = max(1, math.ceil(steps / 10))
    every = settings.eval_every or max(tenth, math.ceil(evaluated / 3 / SHARE))
    saves = settings.save_every if settings.save_every is not None else settings.eval_every or tenth
    return every, saves


def is_launched_by_plugin() -> bool:
    """Return whether accelerate uses DeepSpeed or FSDP, which `use_cpu` would silently switch off."""
    return any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"))


def check_names(settings: Settings) -> None:
    """Raise PlanError for an unknown optimiser, or a tracker that is not installed."""
    known = [item.value for item in OptimizerNames]
    if settings.optim not in known:
        raise PlanError(f"unknown --optim {settings.optim!r}", hint=f"One of: {', '.join(known)}.")
    if missing := next((tool for tool in settings.track if find_spec(tool) is None), None):
        raise PlanError(f"{missing} is needed for --track {missing}", hint=f"pip install {missing}")


def check_optimizer(trainer: Trainer, settings: Settings) -> None:
    """Raise PlanError for an optimiser whose package is missing, or that needs more arguments."""
    model: Any = trainer.model
    try:
        trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PlanError(
            f"--optim {settings.optim} cannot be used: {reason}", hint="Leave it out for fused AdamW."
        ) from error
