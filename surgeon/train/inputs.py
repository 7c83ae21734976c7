"""The inputs of a run: rows of data, the number of steps, a teacher, and an estimate of the cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source, spec_of
from surgeon.cost.estimate import RunEstimate, Workload, estimate, matmul_throughput
from surgeon.errors import PlanError
from surgeon.models.device import logits_bytes
from surgeon.models.loading import load_model, load_tokenizer, loadable
from surgeon.models.split import keeps_documents_apart
from surgeon.train.data import RunData, read_data
from surgeon.train.launch import is_first, processes
from surgeon.train.model import LOAD_HINT, num_trained, precision_of
from surgeon.train.settings import Settings
from surgeon.train.task import Task
from surgeon.train.teacher import CachedTeacher, Teacher, cache_top_k

if TYPE_CHECKING:
    from surgeon.cost.memory import Precision

TEACHER = "teacher"  # the directory of its answers, in the run's directory
ROW = 1024  # tokens, by default, and where the model has as many positions


@dataclass(frozen=True)
class Inputs:
    """A model, data and a task with its settings, on a device. `note` is called with sentences for the user."""

    source: Source
    specs: tuple[str, ...]
    task: Task
    device: str
    note: Callable[[str], None]
    wait: Callable[[], None]  # for the other processes, if there are any
    num_processes: int = field(default_factory=processes)

    @property
    def settings(self) -> Settings:
        """The settings of the task."""
        return self.task.settings

    @property
    def precision(self) -> "Precision":
        """The precision of weights and products on this device."""
        return precision_of(self.settings, self.device)

    @property
    def row_length(self) -> int:
        """How many tokens a row has. Raises PlanError for more than the model has positions."""
        limit, length = positions_of(self.source), self.settings.sequence_length
        if length is not None and limit is not None and length > limit:
            raise PlanError(
                f"{self.source.label} sees {limit} tokens, not {length}", hint=f"Use --sequence-length {limit} or less."
            )
        return length or min(ROW, limit or ROW)

    @property
    def rows_per_step(self) -> int:
        """How many rows one step of the optimiser has, on all devices together."""
        return self.settings.batch_size * self.settings.gradient_accumulation * self.num_processes

    def teacher_model(self) -> Any | None:
        """Return the teacher, on the device and in the precision of products; None without one."""
        source = self.task.teacher_source()
        if source is None:
            return None
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        return load_model(source, dtype=dtype, hint=LOAD_HINT, kind=self.task.kind(source)).to(self.device)

    def data(self, directory: Path, model: Any | None, teacher: Any | None) -> RunData:
        """Return the rows of the run, tokenised in `directory`.

        The models say whether documents can share a row; without one they can.
        """
        settings, attention = self.settings, "sdpa" if model is None else _attention(model)
        data = read_data(
            self.specs,
            self.task,
            load_tokenizer(*loadable(self.source)),
            directory=directory,
            sequence_length=self.row_length,
            packed=self._packs(model, teacher),
            flatten="flash" in attention and self.task.may_share_rows(attention),
            max_rows=None if settings.max_steps is None else settings.max_steps * self.rows_per_step,
            is_first=is_first(),
            wait=self.wait,
        )
        vocabulary = None if model is None else model.get_input_embeddings().weight.shape[0]
        for store in data.stores:
            if vocabulary is not None and store.largest_id >= vocabulary:
                raise PlanError(
                    f"the data holds token {store.largest_id}, and {self.source.label} knows {vocabulary} tokens",
                    hint="The tokenizer is of another model; fetch the checkpoint again.",
                )
        return data

    def steps(self, data: RunData) -> int:
        """Return how many steps the run has."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        epoch = math.ceil(len(data.rows) / self.rows_per_step)
        return max(1, math.ceil(epoch * (self.settings.epochs or 1)))

    def teacher(self, model: Any | None, data: RunData, run_dir: Path) -> Teacher | None:
        """Return the teacher: the model itself, or with --teacher-top-k its stored answers for every trained token."""
        if model is None:
            return None
        online = self.task.teacher(model)
        if self.settings.teacher_top_k is None:
            return online
        directory, store = run_dir / TEACHER, data.stores[0]
        if is_first() and not (directory.exists() and CachedTeacher(directory).store == store.digest):
            cache_top_k(online, store, directory, self.settings.teacher_top_k, temperature=self.settings.temperature)
        self.wait()
        return CachedTeacher(directory)

    def estimate(self, directory: Path) -> RunEstimate:
        """Return the cost of the run. Reads the data, and only the headers of the model."""
        settings, anatomy = self.settings, read_anatomy(spec_of(self.source))
        data = self.data(directory, None, None)
        rows, store, teacher = data.rows, data.stores[0], self.task.teacher_source()
        work = Workload(
            steps=self.steps(data),
            row_tokens=self.row_length if data.packed else int(store.lengths.max()),
            mean_tokens=rows.num_tokens / len(rows),
            document_tokens=store.num_tokens / store.num_pieces if data.packed else None,
            batch_size=settings.batch_size,
            gradient_accumulation=settings.gradient_accumulation,
            processes=self.num_processes,
            optim=settings.optim,
            trained=None if settings.lora else num_trained(self.source, settings),
            lora=settings.lora,
            stored_bf16={item.spec.dtype for item in self.source.tensors.values()} == {"BF16"},
            precision=self.precision,
            activation_checkpointing=settings.activation_checkpointing,
            logits_bytes=logits_bytes(self.device, 1 if teacher is None else 2),
            teacher=None if teacher is None else read_anatomy(spec_of(teacher)),
        )
        return estimate(anatomy, work, throughput=matmul_throughput(self.device, self.precision))

    def _packs(self, model: Any | None, teacher: Any | None) -> bool:
        """Return whether documents share rows. Raises PlanError where they must and would see each other."""
        may_share = self.task.may_share_rows("sdpa" if model is None else _attention(model))
        if self.settings.packing == "off" or not may_share:
            return False
        apart = all(keeps_documents_apart(each) for each in (model, teacher) if each is not None)
        if not apart and self.settings.packing == "on":
            raise PlanError(
                f"documents in one row of {self.source.label}, or of its teacher, would see each other",
                hint="Leave out --packing on: each then gets a row of its own.",
            )
        if not apart:
            self.note("one document a row: this model cannot keep several apart")
        return apart


def _attention(model: Any) -> str:
    return str(model.config._attn_implementation)
