"""What a run is made of before it begins: rows of data, the number of steps, a teacher, an estimate of the cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source, open_source, spec_of
from surgeon.cost.estimate import RunEstimate, Workload, estimate, matmul_throughput
from surgeon.errors import PlanError
from surgeon.gist.training import TWO_PASS, WithoutGist, gist_tokens, gists_of, implementation
from surgeon.gist.views import EncoderDecoder
from surgeon.models.loading import load_model, load_tokenizer, loadable
from surgeon.models.split import Causal, keeps_documents_apart
from surgeon.train import parameters as scope
from surgeon.train.data import RunData, read_data
from surgeon.train.export import receipt_of
from surgeon.train.launch import is_first, processes
from surgeon.train.loop import LOAD_HINT, precision_of
from surgeon.train.settings import Settings
from surgeon.train.teacher import CachedTeacher, OnlineTeacher, Teacher, cache_top_k

if TYPE_CHECKING:
    from surgeon.cost.memory import Precision

TEACHER = "teacher"  # what it said, in the run's directory
ROW = 1024  # tokens, where the user says nothing and the model sees as many


@dataclass(frozen=True)
class Inputs:
    """A request: a model, data and settings, on a device. `note` is told sentences that a user should hear."""

    source: Source
    specs: tuple[str, ...]
    settings: Settings
    device: str
    note: Callable[[str], None]
    wait: Callable[[], None]  # for the other processes, if there are any
    num_processes: int = field(default_factory=processes)

    @property
    def precision(self) -> "Precision":
        """What weights and products are computed in on this device."""
        return precision_of(self.settings, self.device)

    @property
    def row_length(self) -> int:
        """How many tokens a row has. Raises PlanError for more than the model sees."""
        most, asked = positions_of(self.source), self.settings.sequence_length
        if asked is not None and most is not None and asked > most:
            raise PlanError(
                f"{self.source.label} sees {most} tokens, not {asked}", hint=f"Use --sequence-length {most} or less."
            )
        return asked or min(ROW, most or ROW)

    @property
    def rows_a_step(self) -> int:
        """How many rows one step of the optimiser has, on all devices together."""
        return self.settings.batch_size * self.settings.gradient_accumulation * self.num_processes

    def teacher_model(self) -> Any | None:
        """Return the teacher, on the device and in the precision of products; None without one."""
        if self.settings.teacher is None and not self.settings.gist_distill:
            return None
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        source = self.source if self.settings.teacher is None else open_source(self.settings.teacher)
        return load_model(source, dtype=dtype, hint=LOAD_HINT).to(self.device)

    def data(self, directory: Path, model: Any | None, teacher: Any | None) -> RunData:
        """Return the rows of the run, tokenised in `directory`.

        The models say whether documents can share a row; without one they can.
        """
        settings = self.settings
        found = read_data(
            self.specs,
            settings,
            load_tokenizer(*loadable(self.source)),
            directory=directory,
            sequence_length=self.row_length,
            packed=self._packs(model, teacher),
            flatten=model is not None and "flash" in _attention(model) and self._gist_passes(model) != TWO_PASS,
            gists=gists_of(self.source, settings),
            max_rows=None if settings.max_steps is None else settings.max_steps * self.rows_a_step,
            is_first=is_first(),
            wait=self.wait,
        )
        vocabulary = None if model is None else model.get_input_embeddings().weight.shape[0]
        for store in found.stores:
            if vocabulary is not None and store.largest_id >= vocabulary:
                raise PlanError(
                    f"the data holds token {store.largest_id}, and {self.source.label} knows {vocabulary} tokens",
                    hint="The tokenizer is of another model; fetch the checkpoint again.",
                )
        return found

    def steps(self, data: RunData) -> int:
        """Return how many steps the run has."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        epoch = math.ceil(len(data.rows) / self.rows_a_step)
        return max(1, math.ceil(epoch * (self.settings.epochs or 1)))

    def teacher(self, model: Any | None, data: RunData, run_dir: Path) -> Teacher | None:
        """Return what answers as the teacher does: the model itself, or what it said once of every trained token."""
        if model is None:
            return None
        if self.settings.gist_distill:
            ids = gist_tokens(self.source).ids
            return WithoutGist(model, ids, layout=EncoderDecoder(ids) if self._has_encoder else Causal())
        online = OnlineTeacher(model)
        if self.settings.teacher_top_k is None:
            return online
        directory, store = run_dir / TEACHER, data.stores[0]
        if is_first() and not (directory.exists() and CachedTeacher(directory).store == store.digest):
            cache_top_k(online, store, directory, self.settings.teacher_top_k, temperature=self.settings.temperature)
        self.wait()
        return CachedTeacher(directory)

    def estimate(self, directory: Path) -> RunEstimate:
        """Return what the run will take. Reads the data, and of the model its headers."""
        settings, anatomy = self.settings, read_anatomy(spec_of(self.source))
        data = self.data(directory, None, None)
        rows, store = data.rows, data.stores[0]
        work = Workload(
            steps=self.steps(data),
            row_tokens=self.row_length if data.packed else int(store.lengths.max()),
            mean_tokens=rows.num_tokens / len(rows),
            document_tokens=store.num_tokens / store.num_pieces if data.packed else None,
            batch_size=settings.batch_size,
            gradient_accumulation=settings.gradient_accumulation,
            processes=self.num_processes,
            optim=settings.optim,
            trained=None if settings.lora else self._trained(),
            lora=settings.lora,
            stored_bf16={item.spec.dtype for item in self.source.tensors.values()} == {"BF16"},
            precision=self.precision,
            activation_checkpointing=settings.activation_checkpointing,
            teacher=None if settings.teacher is None else read_anatomy(spec_of(open_source(settings.teacher))),
        )
        return estimate(anatomy, work, throughput=matmul_throughput(self.device, self.precision))

    def _trained(self) -> int:
        """Return how many parameters are trained."""
        anatomy = read_anatomy(spec_of(self.source))
        layers = None
        if self.settings.train != "all":
            layers = scope.trained_layers(self.settings.train, receipt_of(self.source), anatomy.depth)
        tensors = anatomy.spec.tensors
        still = scope.frozen(self.settings.freeze, anatomy, list(tensors))
        chosen = scope.chosen(anatomy, list(tensors), layers=layers, ends=self.settings.train == "cut")
        return sum(tensors[name].num_parameters for name in chosen - still)

    @property
    def _has_encoder(self) -> bool:
        return bool(self.source.config.get("is_encoder_decoder"))

    def _gist_passes(self, model: Any | None) -> str | None:
        """Return how gists are trained, "mask" or "two-pass"; None where they are not."""
        if not self.settings.gist:
            return None
        attention = "sdpa" if model is None else _attention(model)
        return implementation(self.settings, attention, encoder=self._has_encoder)

    def _packs(self, *models: Any | None) -> bool:
        """Return whether documents share rows. Raises PlanError where they must and would see each other."""
        is_two_pass = self._gist_passes(models[0] if models else None) == TWO_PASS
        if self.settings.packing == "off" or is_two_pass or self._has_encoder:
            return False
        apart = all(keeps_documents_apart(model) for model in models if model is not None)
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
