"""The inputs of a run: rows of data, the number of steps, a teacher, and an estimate of the cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source, spec_of
from surgeon.cost.estimate import RunEstimate, estimate, matmul_throughput
from surgeon.cost.fitting import Split, split, too_large
from surgeon.cost.memory import Workload
from surgeon.errors import PlanError
from surgeon.models.device import available_memory, computes_bfloat16, logits_bytes
from surgeon.models.documents import breaks_graph, keeps_documents_apart, without_lengths
from surgeon.models.loading import load_model, load_tokenizer, loadable
from surgeon.models.varlen import VARLEN, reads_lengths
from surgeon.processes import is_first, processes
from surgeon.progress import TOKENS, stage
from surgeon.train.arguments import is_launched_by_plugin
from surgeon.train.data import RunData, drawn, only, read_data
from surgeon.train.model import LOAD_HINT, attention_options, num_trained, precision_of
from surgeon.train.run_dir import TEACHER
from surgeon.train.selecting import Selected, count
from surgeon.train.settings import AUTO, Settings
from surgeon.train.task import Task
from surgeon.train.teacher import CachedTeacher, Teacher, cache_top_k

if TYPE_CHECKING:
    from surgeon.cost.memory import Precision

COMPILED_STEPS = 300  # compiling takes a minute or two; assumed, not measured on a GPU
GPU_MULTIPLE = 64  # widths of batches on a GPU: each new width is another kernel to choose, and a compiler's new case
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
        return self.settings.sequences * self.num_processes

    def teacher_model(self) -> Any | None:
        """Return the teacher, on the device and in the precision of products; None without one."""
        source = self.task.teacher_source()
        if source is None:
            return None
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        attention = attention_options(self.settings)  # rows without a mask are for both
        model = load_model(source, dtype=dtype, hint=LOAD_HINT, kind=self.task.kind(source), **attention)
        return model.to(self.device)

    def attend(self, model: Any, teacher: Any | None) -> None:
        """Let model and teacher attend by the lengths of documents, where that is asked for, or faster and possible.

        It is faster on a GPU in 16 bits: a mask rules out the fast kernels. Raises PlanError where it is asked for and
        a model cannot.
        """
        if self.settings.attention == VARLEN and not self.task.reads_lengths:
            raise PlanError(f"--attention {VARLEN} is not for this task", hint="Use --attention sdpa.")
        if not self._wants_lengths:
            return
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        for each in (model, teacher):
            if each is None:
                continue
            with stage("trying attention by the lengths of documents"):
                reason = without_lengths(each, self.device, dtype)
            if reason is not None:
                if self.settings.attention == VARLEN:
                    raise PlanError(reason, hint="Use --attention sdpa.")
                self.note(f"attention behind masks, which is slower: {reason}")
                return
        for each in (model, teacher):
            if each is not None:
                each.config._attn_implementation = VARLEN

    def compiles(self, model: Any, steps: int) -> bool:
        """Return whether the layers are compiled: as asked, else on a GPU where that pays and the graph is one.

        Without lengths a compiled model is given a mask, even where it needs none.
        """
        if self.settings.compile is not None:
            return self.settings.compile
        is_worth_it = self.device.startswith("cuda") and steps >= COMPILED_STEPS and find_spec("triton") is not None
        is_plain = not self.settings.qlora and not is_launched_by_plugin()
        by_lengths = model.config._attn_implementation == VARLEN
        return is_worth_it and is_plain and by_lengths and not breaks_graph(model)

    @property
    def _wants_lengths(self) -> bool:
        if self.settings.attention is not None:
            return self.settings.attention == VARLEN
        is_fast = self.precision != "float32" and computes_bfloat16(self.device)
        # Whether the kernel's gradients are the same in each run has not been seen on a GPU.
        return is_fast and self.task.reads_lengths and not self.settings.deterministic

    def data(self, directory: Path, model: Any | None, teacher: Any | None) -> RunData:
        """Return the rows of the run, tokenised in `directory`.

        The models say whether documents can share a row; without one they can.
        """
        settings, (packed, flatten) = self.settings, self._rows(model, teacher)
        data = read_data(
            self.specs,
            self.task,
            load_tokenizer(*loadable(self.source)),
            directory=directory,
            sequence_length=self.row_length,
            packed=packed,
            flatten=flatten,
            pad_to_multiple_of=GPU_MULTIPLE if self.device.startswith("cuda") else None,
            max_rows=None if settings.max_steps is None or settings.select else settings.max_steps * self.rows_per_step,
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
            how = {"temperature": self.settings.temperature}
            with stage("asking the teacher", store.num_tokens, TOKENS) as count:
                cache_top_k(online, store, directory, self.settings.teacher_top_k, **how, progress=count)
        self.wait()
        return CachedTeacher(directory)

    def estimate(self, directory: Path) -> RunEstimate:
        """Return the cost of the run. Reads the data, and only the headers of the model."""
        anatomy = read_anatomy(spec_of(self.source))
        data = self._as_selected(self.data(directory, None, None))
        work, found = self.workload(data), self.split(data, self.free_memory())
        with stage("measuring this machine"):
            throughput = matmul_throughput(self.device, self.precision)
        made = estimate(anatomy, replace(work, **found.settings()), throughput=throughput)
        notes = made.notes
        if not found.fits:
            error = too_large(anatomy, work, found, label=self.source.label, device=self.device)
            notes = (f"{error}", f"{error.hint}", *notes)
        if self.settings.select:
            notes = (*notes, "the selection of rows takes time of its own, about one step for each batch of all rows")
        return replace(made, split=found, notes=notes)

    def _as_selected(self, data: RunData) -> RunData:
        """Return the data of an estimate: where rows will be selected, as many that are drawn at random."""
        if self.settings.select is None:
            return data
        pieces = np.unique(data.rows.packing.pieces)
        chosen = drawn(pieces, count(self.settings.select, len(pieces)), self.settings.seed)
        return only(data, chosen, self.settings, sequence_length=self.row_length)

    def free_memory(self) -> int | None:
        """Return the bytes that each process of the run may take; None where the estimate does not hold for them.

        Processes on a CPU share what there is. FSDP and DeepSpeed divide the states in ways of their own, and 4 bits
        are not estimated.
        """
        if is_launched_by_plugin() or self.settings.qlora:
            return None
        sharing = self.num_processes if self.device == "cpu" else 1
        return available_memory(self.device) // sharing

    def check_fits(self, free: int | None) -> None:
        """Raise TrainingError where weights, gradients and states alone take more memory than there is.

        Called before anything is loaded. An explicit --batch-size is tried whatever the estimate says.
        """
        if free is None or self.settings.batch_size != AUTO:
            return
        anatomy, work = read_anatomy(spec_of(self.source)), replace(self.workload(None), batch_size=1)
        way: dict[str, Any] = {"free": free, "splits": True, "checkpointing": self.settings.activation_checkpointing}
        found = split(anatomy, work, **way, can_recompute=self.task.can_recompute)
        if not found.fits:
            work = replace(work, row_tokens=self.row_length)
            found = split(anatomy, work, **way, can_recompute=self.task.can_recompute)
            raise too_large(anatomy, work, found, label=self.source.label, device=self.device)

    def split(self, data: RunData, free: int | None, *, can_recompute: bool = True) -> Split:
        """Return how each device computes its rows of a step, so that they fit; as asked where that is a number."""
        return split(
            read_anatomy(spec_of(self.source)),
            self.workload(data),
            free=free,
            splits=self.settings.batch_size == AUTO,
            checkpointing=self.settings.activation_checkpointing,
            can_recompute=can_recompute and self.task.can_recompute,
        )

    @cached_property
    def _teacher_anatomy(self) -> Anatomy | None:
        source = self.task.teacher_source()
        return None if source is None else read_anatomy(spec_of(source))

    def workload(self, data: RunData | None) -> Workload:
        """Return the facts of the run that its cost depends on; without data those of the shortest rows."""
        settings, teacher = self.settings, self._teacher_anatomy
        facts: dict[str, Any] = {"steps": 1, "row_tokens": 2}
        if data is not None:
            rows, store = data.rows, data.stores[0]
            facts = {
                "steps": self.steps(data),
                "row_tokens": self.row_length if data.packed else int(store.lengths.max()),
                "mean_tokens": rows.num_tokens / len(rows),
                "document_tokens": store.num_tokens / store.num_pieces if data.packed else None,
            }
        is_auto = isinstance(settings.batch_size, str)
        return Workload(
            **facts,
            batch_size=settings.sequences if is_auto else settings.batch,
            gradient_accumulation=1 if is_auto else settings.gradient_accumulation,
            processes=self.num_processes,
            optim=settings.optim,
            trained=None if settings.lora else num_trained(self.source, settings),
            lora=settings.lora,
            stored_bf16={item.spec.dtype for item in self.source.tensors.values()} == {"BF16"},
            precision=self.precision,
            activation_checkpointing=bool(settings.activation_checkpointing),
            logits_bytes=logits_bytes(self.device, 1 if teacher is None else 2),
            teacher=teacher,
        )

    def _rows(self, model: Any | None, teacher: Any | None) -> tuple[bool, bool]:
        """Return whether documents share rows, and whether all rows of a batch become one, with lengths.

        Raises PlanError where documents must share rows and may see each other.
        """
        attention = "sdpa" if model is None else str(model.config._attn_implementation)
        is_off, by_lengths = self.settings.packing == "off", reads_lengths(attention)
        if not self.task.may_share_rows(attention) or (is_off and not by_lengths):
            return False, False
        with stage("trying several documents in one row"):
            apart = all(keeps_documents_apart(each) for each in (model, teacher) if each is not None)
        if not apart and self.settings.packing == "on":
            raise PlanError(
                f"documents in one row of {self.source.label}, or of its teacher, may see each other",
                hint="Leave out --packing on: each then gets a row of its own.",
            )
        if not apart and not is_off:
            self.note("one document a row: this model is not known to keep several apart")
        return apart and not is_off, apart and by_lengths


@dataclass(frozen=True, eq=False)
class Pool:
    """What rows are selected from: the data of a run, its inputs, and a function that makes its untrained model.

    `rate` is the learning rate of a warm-up.
    """

    data: RunData
    make_model: Callable[[], Any]
    inputs: Inputs
    rate: float


Select = Callable[[Pool], Selected]
