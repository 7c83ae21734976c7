"""One training run: the model made ready, the Trainer set up from the settings, and what came of it."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import PlanError, TrainingError
from surgeon.gist.training import gist_tokens, view_of
from surgeon.models import adapters
from surgeon.models.loading import load_model, quiet_transformers
from surgeon.train import checkpoints
from surgeon.train import parameters as scope
from surgeon.train.data import RunData
from surgeon.train.export import receipt_of
from surgeon.train.objective import Objective, attach_loss
from surgeon.train.reporter import Reporter
from surgeon.train.settings import SCHEDULES, Settings
from surgeon.train.trainer import Control, DivergedError, Evaluated, Stop, SurgeonTrainer

if TYPE_CHECKING:
    from surgeon.cost.memory import Precision

LOAD_HINT = "surgeon inspect shows what the checkpoint holds; finetune needs a language model that transformers knows."
MEMORY_HINT = (
    "Lower --batch-size (and raise --gradient-accumulation by as much), lower --sequence-length, "
    "or add --activation-checkpointing or --lora 16."
)


@dataclass(frozen=True)
class Outcome:
    """What the whole run came to. Losses are in nats a token; `train_loss` is of the last tenth of steps."""

    steps: int
    tokens: int
    train_loss: float | None
    eval_loss: float | None
    best_step: int | None
    is_stopped: bool


def precision_of(settings: Settings, device: str) -> "Precision":
    """Return "bf16", "float32" or "pure-bf16": what "auto" means on this device."""
    if settings.precision == "pure-bf16":
        return "pure-bf16"
    if settings.precision == "float32":
        return "float32"
    halves = settings.precision == "bf16" or (device.startswith("cuda") and torch.cuda.is_bf16_supported())
    return "bf16" if halves else "float32"


def ready_model(source: Source, settings: Settings, *, precision: str) -> Any:
    """Return the model to train: weights in float32 (of adapters' base: as stored), frozen parts, adapters, its loss.

    Weights in 16 bits lose what a small step adds: at a rate of 1e-5 most of them never change. So they are float32,
    and only products are computed in 16 bits, unless "pure-bf16" was asked for.
    """
    stored_bf16 = {item.spec.dtype for item in source.tensors.values()} <= {"BF16"}
    is_frozen_base = settings.lora is not None and precision == "bf16" and stored_bf16
    dtype = torch.bfloat16 if precision == "pure-bf16" or is_frozen_base else torch.float32
    options: dict[str, Any] = {"attn_implementation": settings.attention} if settings.attention else {}
    if settings.qlora:
        options["quantization_config"] = _four_bits()
    model = load_model(source, dtype=dtype, hint=LOAD_HINT, **options)
    model.config.use_cache = False  # with a cache, packed documents see each other
    return model


def trained_model(model: Any, source: Source, settings: Settings, objective: Objective, teacher: Any) -> Any:
    """Return the model with its loss attached and with what is trained set: parts of it, or adapters around it."""
    anatomy = read_anatomy(spec_of(source))
    set_seed(settings.seed)  # adapters are drawn
    attach_loss(model, objective, teacher, layout=view_of(model, source, settings))
    if settings.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # transformers before 5.20
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        model.get_decoder().compile()
    if settings.lora is not None:
        if settings.activation_checkpointing:
            model.enable_input_require_grads()
        rows = gist_tokens(source).ids if settings.gist else ()
        return adapters.add_adapters(model, anatomy, settings, tokens=rows)
    receipt = receipt_of(source)
    layers = None if settings.train == "all" else scope.trained_layers(settings.train, receipt, anatomy.depth)
    count = scope.choose(model, anatomy, layers=layers, freeze=settings.freeze, ends=settings.train == "cut")
    if settings.train == "new" and (tokens := scope.new_token_ids(receipt)):
        count += scope.train_rows(model, tokens)
    if not count:
        raise PlanError("nothing is left to train", hint="Freeze less.")
    return model


def arguments(
    settings: Settings, data: RunData, *, run_dir: Path, lr: float, steps: int, device: str, resumed: bool
) -> TrainingArguments:
    """Return the arguments of the Trainer for a run of so many steps."""
    every, saves = cadence(settings, steps)
    uses_cpu = device == "cpu" and not is_launched_by_plugin()
    made = TrainingArguments(
        output_dir=str(run_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
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
        logging_nan_inf_filter=False,  # it shows a loss of 0 for one that is no number, and goes on
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
        dataloader_num_workers=settings.workers,
        report_to=list(settings.track) or "none",
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # two GPUs in one process would be torch's DataParallel: slower than one
    return made


def check_names(settings: Settings) -> None:
    """Raise PlanError for an optimiser or a tracker that there is not here."""
    known = [item.value for item in OptimizerNames]
    if settings.optim not in known:
        raise PlanError(f"unknown --optim {settings.optim!r}", hint=f"One of: {', '.join(known)}.")
    if missing := next((tool for tool in settings.track if find_spec(tool) is None), None):
        raise PlanError(f"{missing} is needed for --track {missing}", hint=f"pip install {missing}")


def _check_optimizer(trainer: SurgeonTrainer, settings: Settings) -> None:
    """Raise PlanError for an optimiser whose package is missing, or that wants more than its name."""
    model: Any = trainer.model
    try:
        trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    except (ImportError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise PlanError(
            f"--optim {settings.optim} cannot be used: {said}", hint="Leave it out for fused AdamW."
        ) from error


def cadence(settings: Settings, steps: int) -> tuple[int, int]:
    """Return how many steps lie between evaluations, and between checkpoints (0: none are written)."""
    every = settings.eval_every or max(1, math.ceil(steps / 10))
    return every, every if settings.save_every is None else settings.save_every


def is_launched_by_plugin() -> bool:
    """Return whether accelerate was told to use DeepSpeed or FSDP, which `use_cpu` would silently switch off."""
    return any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"))


def train(
    model: Any,
    data: RunData,
    settings: Settings,
    *,
    run_dir: Path,
    lr: float,
    steps: int,
    device: str,
    resume_from: Path | None,
    reporter: Reporter,
    stop: Stop,
) -> tuple[SurgeonTrainer, Outcome]:
    """Train, and return the trainer with the model in it and what came of it.

    Raises TrainingError for a run that diverges, OutputError for a full disk.
    """
    resumed = resume_from is not None
    trainer = SurgeonTrainer(
        model,
        arguments(settings, data, run_dir=run_dir, lr=lr, steps=steps, device=device, resumed=resumed),
        data=data,
        told=reporter.step,
        evaluated=reporter.evaluated,
        paused=reporter.paused,
        keep=settings.keep_checkpoints,
        keep_best=settings.keep_best,
    )
    _check_optimizer(trainer, settings)
    control = Control(stop, trainer, patience=settings.patience, history=reporter.validations())
    trainer.add_callback(control)
    with quiet_transformers():
        if resume_from is not None and (checkpoints.step_of(resume_from) >= steps or control.is_over):
            trainer.take(resume_from)  # it was over, and only the result was not written
        else:
            trainer.train(resume_from_checkpoint=str(resume_from) if resumed else None)
    tail = reporter.losses[-max(1, len(reporter.losses) // 10) :]
    validations = reporter.validations()
    return trainer, Outcome(
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        train_loss=sum(tail) / len(tail) if tail else None,
        eval_loss=validations[-1] if validations else None,
        best_step=trainer.state.best_global_step,
        is_stopped=stop.asked,
    )


def loss_after(model: Any, data: RunData, settings: Settings, *, lr: float, steps: int, device: str) -> float:
    """Return the loss of the held-out rows (of the trained ones where none are) after a short run at a rate.

    A run that diverges has an infinite one. Nothing of it is kept.
    """
    found: list[Evaluated] = []
    short = replace(
        settings, max_steps=steps, epochs=None, eval_every=steps, save_every=0, keep_best=False, patience=None
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = SurgeonTrainer(
            model,
            arguments(short, data, run_dir=Path(directory), lr=lr, steps=steps, device=device, resumed=True),
            data=data,
            told=lambda logs: None,
            evaluated=found.append,
        )
        try:
            with quiet_transformers():
                trainer.train()
        except DivergedError:
            return math.inf
    last = found[-1]
    loss = last.probe if last.validation is None else last.validation
    return math.inf if loss is None or not math.isfinite(loss) else loss


@contextmanager
def memory_explained(settings: Settings, step: Callable[[], int]) -> Iterator[None]:
    """Turn a memory that is full into an error that says what to lower. `step` is how many steps were done."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(settings, step()) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):  # the CPU's allocator
            raise
        raise _out_of_memory(settings, step()) from error


def _out_of_memory(settings: Settings, step: int) -> TrainingError:
    return TrainingError(
        f"the memory is full after step {step}, with {settings.batch_size} rows a batch", hint=MEMORY_HINT
    )


def _four_bits() -> Any:
    if find_spec("bitsandbytes") is None:
        raise PlanError("bitsandbytes is needed for --qlora", hint='pip install "surgeon[quant]"')
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def objective_of(settings: Settings, source: Source) -> Objective:
    """Return what is trained for, with the layer map of the surgery's receipt where hidden states are compared."""
    known = (receipt_of(source) or {}).get("layer_map") if settings.hidden_weight else None
    return Objective(
        kd_weight=settings.kd_weight if settings.teacher else settings.gist_distill,
        temperature=settings.temperature,
        direction="forward" if settings.kl == "forward" else "reverse",
        hidden_weight=settings.hidden_weight,
        layer_map=None if known is None else tuple(known),
    )
