"""The settings of a training run: options of `surgeon finetune`, each with its default, help text and limits."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from surgeon.data.records import chosen_columns
from surgeon.options import Checked, OptionError, Words, check_seed, columns_option, flag_of, option
from surgeon.train.selecting import SelectionSettings

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # ours: transformers'
_HALF = "gradients vanish in float16; bf16 has their range"
PRECISIONS = Words(
    ("auto", "bf16", "float32", "pure-bf16"),
    aliases={"bfloat16": "bf16", "fp32": "float32", "f32": "float32", "pure-bfloat16": "pure-bf16"},
    refused=dict.fromkeys(("float16", "fp16", "half"), _HALF),
)


def _attentions() -> list[str]:
    """Return the kernels of transformers that are usual, and those that this process has registered with it."""
    loaded = sys.modules.get("transformers.modeling_utils")
    registered = () if loaded is None else loaded.ALL_ATTENTION_FUNCTIONS.valid_keys()
    return list(dict.fromkeys(("sdpa", "varlen", "eager", "flash_attention_2", "flex_attention", *registered)))


ATTENTIONS = Words(
    _attentions,
    others=r"flash_attention_\d+|\w+_paged|paged\|\w+|[\w.-]+/[\w.@:-]+",  # of transformers, and kernels on the Hub
)
TRAINED = ("all", "new", "cut")
FROZEN = Words(("embeddings", "head"), others=r"layers=\d+(-\d+)?", many=True)
TRAIN_ON = ("completion", "all")
LORA_TARGETS = ("all", "attention", "ffn")
PACKING = ("auto", "on", "off")
KL_DIRECTIONS = ("forward", "reverse")
TRACKERS = ("tensorboard", "wandb", "trackio")
AUTO, SEQUENCES = "auto", 8  # the default batch, and how many sequences a device's step then has, times accumulation
FULL_LR, LORA_LR = 2e-5, 2e-4  # the defaults; a cut model may need another rate, which --lr auto searches


def _optimisers() -> Sequence[str]:
    """Return the optimisers of transformers' Trainer, as its file lists them: to import that would import torch."""
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return ()
    text = Path(found.origin).with_name("training_args.py").read_text(encoding="utf-8")
    listed = re.search(r"^class OptimizerNames\b.*?(?=^\S)", text, re.DOTALL | re.MULTILINE)
    return re.findall(r'^ +[A-Z]\w* = "([\w-]+)"', listed[0] if listed else "", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LearningSettings(Checked):
    """Which data a run reads, how long and how fast it trains, which parameters, and which teacher it follows."""

    # data
    data_weights: str | None = option(
        "Passes over each --data in an epoch, in their order: 1,0.5. Default: 1 of each.",
        None,
        metavar="W",
        group="data",
    )
    sequence_length: int | None = option(
        "Tokens per sequence. Default: 1024, or the model's maximum if smaller.", None, metavar="T", group="data"
    )
    packing: str = option(
        "Pack several documents into a sequence, each attending only to itself: auto, on, off.",
        "auto",
        metavar="WHEN",
        choices=PACKING,
        group="data",
    )
    train_on: str = option(
        "Train on the answer only (completion) or on prompt and answer (all).",
        "completion",
        metavar="M",
        choices=TRAIN_ON,
        group="data",
    )
    eval_data: tuple[str, ...] = option(
        "Held-out data. Repeatable. Default: a part of --data.", (), metavar="DATA", reads=True, group="data"
    )
    eval_fraction: float = option(
        "Without --eval-data: the fraction of documents to hold out.", 0.01, metavar="F", group="data"
    )
    eval_rows: int = option(
        "Evaluate at most N held-out sequences, and as many trained ones.", 64, metavar="N", group="data"
    )
    columns: str | None = columns_option()
    # length and rate
    max_steps: int | None = option(
        "Number of optimiser steps. Default: as many as --epochs are.", None, metavar="N", group="length and rate"
    )
    epochs: float | None = option(
        "Passes over the data. Default: 1, unless steps are given.", None, metavar="E", group="length and rate"
    )
    batch_size: int | Literal["auto"] = option(
        "Sequences per device and batch; auto: 8 a step, in as large batches as fit the memory.",
        AUTO,
        metavar="N",
        parse=lambda typed: batch_size_of(typed),
        group="length and rate",
    )
    gradient_accumulation: int = option(
        "Batches per optimiser step; multiplies the 8 of auto.", 1, metavar="N", group="length and rate"
    )
    lr: str = option(
        f"Peak learning rate; auto: the better of two, by short runs. Default: {FULL_LR:g}; with --lora {LORA_LR:g}.",
        "",
        metavar="LR",
        group="length and rate",
    )
    warmup: float = option(
        "Steps until the peak rate; below 1, a fraction of all steps.", 0.03, metavar="N", group="length and rate"
    )
    schedule: str = option(
        "Learning rate after the warm-up: cosine, linear or constant.",
        "cosine",
        metavar="NAME",
        choices=tuple(SCHEDULES),
        group="length and rate",
    )
    optim: str = option(
        "Any optimiser of transformers' Trainer; TAB lists them.",
        "adamw_torch_fused",
        metavar="NAME",
        choices=_optimisers,
        group="length and rate",
    )
    weight_decay: float = option(
        "Weight decay of matrices; norms and biases have none.", 0.0, metavar="W", group="length and rate"
    )
    max_grad_norm: float = option("Clip gradients to this norm; 0: never.", 1.0, metavar="G", group="length and rate")
    # what is trained
    train: str = option(
        "Parameters to train: all, new (added by surgery), cut (beside removed layers; final norm, head).",
        "all",
        metavar="P",
        choices=TRAINED,
        group="what is trained",
    )
    freeze: str | None = option(
        "Parts not to train: embeddings, head, layers=0-11, comma-separated. Default: none.",
        None,
        metavar="PARTS",
        choices=FROZEN,
        group="what is trained",
    )
    lora: int | None = option(
        "Train low-rank adapters of this rank; they are merged at the end.", None, metavar="R", group="what is trained"
    )
    lora_alpha: float | None = option(
        "Scale of the adapters is alpha / rank. Default: 2 x rank.", None, metavar="A", group="what is trained"
    )
    lora_dropout: float = option("Dropout before the adapters.", 0.0, metavar="P", group="what is trained")
    lora_targets: str = option(
        "Linear maps that get adapters: all, attention or ffn.",
        "all",
        metavar="PART",
        choices=LORA_TARGETS,
        group="what is trained",
    )
    keep_adapter: bool = option(
        "Write only the adapter, as PEFT does, instead of merging it.", False, group="what is trained"
    )
    qlora: bool = option(
        "Hold the base model in 4 bits (bitsandbytes); goes with --lora.", False, group="what is trained"
    )
    # distillation
    teacher: str | None = option(
        "Distil from this model: a directory or Hub id.", None, metavar="MODEL", reads=True, group="distillation"
    )
    kd_weight: float = option(
        "With --teacher: objective = (1 - W) cross-entropy + W KL.", 0.5, metavar="W", group="distillation"
    )
    temperature: float = option(
        "Divide the logits of both models by T, and multiply KL by T².", 1.0, metavar="T", group="distillation"
    )
    kl: str = option(
        "Direction of KL: forward is KL(teacher, student), reverse KL(student, teacher).",
        "forward",
        metavar="WAY",
        choices=KL_DIRECTIONS,
        group="distillation",
    )
    hidden_weight: float = option(
        "Weight of the distance between hidden states of layers matched by the surgery's layer map.",
        0.0,
        metavar="W",
        group="distillation",
    )
    teacher_top_k: int | None = option(
        "Run the teacher once, and store its K likeliest tokens per trained token on disk.",
        None,
        metavar="K",
        group="distillation",
    )


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Checked):
    """How a run computes, and how often it evaluates and saves."""

    # numbers
    precision: str = option(
        "auto (bf16 on CUDA, else float32), bf16 (float32 weights, bf16 products), float32, pure-bf16.",
        "auto",
        metavar="P",
        choices=PRECISIONS,
        group="numbers",
    )
    activation_checkpointing: bool | None = option(
        "Recompute activations to save memory. Default: where the run would not fit otherwise.",
        None,
        names=("--activation-checkpointing/--no-activation-checkpointing",),
        group="numbers",
    )
    compile: bool | None = option(
        "Compile the layers with torch.compile. Default: on a GPU, for long runs whose layers need no mask.",
        None,
        names=("--compile/--no-compile",),
        group="numbers",
    )
    attention: str | None = option(
        "sdpa, varlen, eager, or another. Default: varlen on CUDA in 16 bits if it can be, else sdpa.",
        None,
        metavar="NAME",
        choices=ATTENTIONS,
        group="numbers",
    )
    seed: int = option("Seed of every random draw.", 0, metavar="N", group="numbers")
    deterministic: bool = option("Use only deterministic kernels on a GPU; slower.", False, group="numbers")
    # how often
    eval_every: int | None = option(
        "Steps between evaluations. Default: a tenth of the run, or more where they cost too much.",
        None,
        metavar="N",
        group="length and rate",
    )
    save_every: int | None = option(
        "Steps between checkpoints; 0: none. Default: --eval-every, else a tenth of the run.",
        None,
        metavar="N",
        group="output",
    )
    keep_checkpoints: int | None = option(
        "Checkpoints to keep, and the best with --keep-best. Default: 2; once finished 1, without optimiser.",
        None,
        metavar="N",
        at_resume=True,
        group="output",
    )
    keep_best: bool = option("Write the step with the lowest validation loss, not the last one.", False, group="output")
    patience: int | None = option(
        "Stop after N evaluations without an improvement.", None, metavar="N", group="length and rate"
    )
    workers: int | None = option(
        "Processes that load data. Default: 0, on CUDA 2.", None, metavar="N", at_resume=True, group="run"
    )
    track: tuple[str, ...] = option(
        "Also log to tensorboard, wandb or trackio. Repeatable.",
        (),
        metavar="TOOL",
        at_resume=True,
        choices=TRACKERS,
        group="output",
    )


@dataclass(frozen=True, kw_only=True)
class Settings(ComputeSettings, SelectionSettings, LearningSettings):  # dataclasses take the last base's fields first
    """The settings of any run, checked alone and together."""

    def __post_init__(self) -> None:
        """Raise OptionError for a value that makes no sense, alone or beside another."""
        super().__post_init__()
        chosen_columns(self.columns)
        self._check_numbers()
        self._check_pairs()
        self.check_selection()
        self.learning_rate()
        self.weights(None)

    @property
    def sequences(self) -> int:
        """How many sequences one step has on each device."""
        return self.gradient_accumulation * (SEQUENCES if isinstance(self.batch_size, str) else self.batch_size)

    @property
    def batch(self) -> int:
        """How many sequences a batch has, once that is chosen."""
        assert isinstance(self.batch_size, int), "the split of a step is chosen before its first batch"
        return self.batch_size

    def learning_rate(self) -> float | None:
        """Return the peak learning rate, None for a search. Raises OptionError for text that is no rate."""
        if self.lr == "auto":
            return None
        if not self.lr:
            return LORA_LR if self.lora else FULL_LR
        try:
            rate = float(self.lr)
        except ValueError as error:
            raise OptionError(
                "lr", f"--lr {self.lr!r} is no number", hint="Such as --lr 1e-4, or --lr auto."
            ) from error
        if not 0 < rate < 100:
            raise OptionError("lr", f"--lr is {rate:g}; a rate is above 0", hint="Such as --lr 1e-4, or --lr auto.")
        return rate

    def weights(self, count: int | None) -> tuple[float, ...]:
        """Return how often each of `count` data arguments is seen in an epoch; with None, the numbers as given."""
        hint = "As many numbers as there are --data, such as --data-weights 1,0.5"
        if self.data_weights is None:
            return (1.0,) * (count or 0)
        try:
            weights = tuple(float(word) for word in self.data_weights.split(","))
        except ValueError as error:
            raise OptionError(
                "data_weights", f"--data-weights {self.data_weights!r} is no list of numbers", hint=hint
            ) from error
        if any(not 0 <= weight <= 1000 for weight in weights) or not any(weights):
            raise OptionError(
                "data_weights", f"--data-weights {self.data_weights!r}: a weight is from 0 to 1000", hint=hint
            )
        if count is not None and len(weights) != count:
            raise OptionError(
                "data_weights", f"--data-weights has {len(weights)} numbers for {count} --data", hint=hint
            )
        return weights

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide numbers of the result: a run is resumed only with the same ones."""
        return deciding(self)

    def _check_numbers(self) -> None:
        least: Mapping[str, float] = {
            "sequence_length": 2, "eval_rows": 1, "max_steps": 1, "batch_size": 1, "gradient_accumulation": 1,
            "lora": 1, "teacher_top_k": 1, "eval_every": 1, "save_every": 0, "keep_checkpoints": 1, "patience": 1,
            "workers": 0, "warmup": 0, "weight_decay": 0, "max_grad_norm": 0, "hidden_weight": 0,
        }  # fmt: skip
        if isinstance(self.batch_size, str) and self.batch_size != AUTO:
            raise OptionError(
                "batch_size", f"--batch-size {self.batch_size!r} is no number", hint="Such as --batch-size 4, or auto."
            )
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value != AUTO and not lowest <= value < math.inf:
                raise OptionError(
                    name, f"{flag_of(name)} is {value:g}; {lowest:g} is the least", hint=_floor_hint(name, lowest)
                )
        above_zero = {"epochs": self.epochs, "temperature": self.temperature, "lora_alpha": self.lora_alpha}
        for name, value in above_zero.items():
            if value is not None and not 0 < value < math.inf:
                raise OptionError(
                    name,
                    f"{flag_of(name)} is {value:g}; it must be above 0, and finite",
                    hint=f"Such as {flag_of(name)} 1.",
                )
        check_range(self, {"eval_fraction": 0.5, "kd_weight": 1.0, "lora_dropout": 0.9})
        check_seed(self.seed)

    def _check_pairs(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise OptionError(
                "max_steps", "--max-steps and --epochs both say how long to train", hint="Give one of them."
            )
        needs = {"keep_adapter": "lora", "qlora": "lora", "lora_alpha": "lora"}
        needs |= {"teacher_top_k": "teacher", "hidden_weight": "teacher"}
        for name, other in needs.items():
            if getattr(self, name) and not getattr(self, other):
                raise OptionError(
                    name, f"{flag_of(name)} has no effect without {flag_of(other)}", hint=f"Add {flag_of(other)}."
                )
        if self.lora and (self.train != "all" or self.freeze):
            raise OptionError(
                "lora", "--lora trains adapters alone; nothing else is to be frozen", hint="Leave out --train."
            )
        if self.train == "new" and self.weight_decay:
            raise OptionError(
                "weight_decay", "weight decay would change the rows of old tokens too", hint="Leave out --weight-decay."
            )
        if self.hidden_weight and self.teacher_top_k:
            raise OptionError(
                "hidden_weight",
                "hidden states are not kept on disk",
                hint="Leave out --teacher-top-k or --hidden-weight.",
            )
        if (self.keep_best or self.patience) and not self.eval_data and not self.eval_fraction:
            raise OptionError(
                "", "the best step is found on held-out data", hint="Give --eval-data or --eval-fraction."
            )


def batch_size_of(typed: str) -> int | Literal["auto"]:
    """Return the value of --batch-size: a number, or auto. Raises ValueError for anything else."""
    if typed == "auto":
        return "auto"
    try:
        return int(typed)
    except ValueError:
        raise ValueError(f"{typed!r} is neither a number nor auto") from None


def deciding(options: Any) -> dict[str, Any]:
    """Return the options of a dataclass that decide numbers of the result, as JSON holds them."""
    names = [item.name for item in fields(options) if not item.metadata["flag"].at_resume]
    values = {name: getattr(options, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_range(settings: Any, tops: Mapping[str, float]) -> None:
    """Raise OptionError where a setting is not between 0 and its largest value."""
    for name, top in tops.items():
        if not 0 <= getattr(settings, name) <= top:
            said = f"{flag_of(name)} is {getattr(settings, name):g}; it lies between 0 and {top:g}"
            raise OptionError(name, said, hint=f"Such as {flag_of(name)} {top / 2:g}.")


def _floor_hint(name: str, lowest: float) -> str:
    return f"Set {flag_of(name)} to {lowest:g} or more."
