"""A training run from its request to its result, in the order in which things happen."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.cost.fitting import Split, too_large
from surgeon.cost.flops import flops_per_token, peak_flops
from surgeon.cost.laws import in_a_line
from surgeon.cost.memory import lora_parameters
from surgeon.errors import DataError, SurgeonError, TrainingError
from surgeon.models import adapters
from surgeon.models.device import computes_bfloat16, resolve_device
from surgeon.models.loading import code_is_trusted, load_model, quiet_transformers
from surgeon.plots.training import plot_losses
from surgeon.processes import check_meeting, is_first, is_launched, is_loss, least, processes, wait_for_all
from surgeon.progress import stage
from surgeon.train import checkpoints
from surgeon.train.arguments import check_names, is_launched_by_plugin, set_environment
from surgeon.train.data import RunData, only
from surgeon.train.inputs import Inputs, Pool, Select
from surgeon.train.model import LOAD_HINT, load_trainable, num_trained, trained_model
from surgeon.train.pace import PaceMeter, most_memory_used
from surgeon.train.reporter import Reporter
from surgeon.train.result import Training, concluded, trained_surgery, write_adapter
from surgeon.train.run_dir import (
    BATCH,
    DATA,
    RATE,
    SELECTED,
    WEIGHTS,
    Request,
    claim,
    read_json,
    read_metrics,
    write_json,
    write_result,
)
from surgeon.train.selecting import Selected
from surgeon.train.settings import AUTO, FULL_LR, LORA_LR, Settings
from surgeon.train.steps import TrainedSteps, loss_after, run_steps
from surgeon.train.task import Task
from surgeon.train.trainer import (
    Stop,
    progress,
    stops_at_sigterm,
)

if TYPE_CHECKING:
    from surgeon.train.run_dir import TrainingWatcher

PLOT = "loss.png"
PROBE_STEPS = 50  # of each of the two runs of --lr auto, or a tenth of the run
FACTOR = 10.0  # between their rates
MEMORY_HINT = (
    "Lower --batch-size (and raise --gradient-accumulation by as much), lower --sequence-length, "
    "or add --activation-checkpointing or --lora 16."
)


class Runner:
    """Carries out one request: `fit`, `write` and `finished` in this order, inside `held`."""

    def __init__(
        self,
        source: Source,
        specs: tuple[str, ...],
        task: Task,
        *,
        run_dir: Path,
        device: str,
        watcher: "TrainingWatcher | None" = None,
        select: Select | None = None,
    ) -> None:
        self.source, self.specs, self.task, self.run_dir = source, specs, task, run_dir
        self.select = select
        self.selected: Selected | None = None
        self.settings = task.settings
        self.device, self.watcher = resolve_device(device), watcher
        self.began = time.perf_counter()
        self.stop = Stop()
        self.inputs = Inputs(source, specs, task, self.device, self._note, self.wait)
        set_environment(self.settings, self.device)
        self.settings.weights(len(specs))
        check_names(self.settings)

    # --- the run's directory ----------------------------------------------------------------------------------

    @contextmanager
    def held(self, request: Request, *, resume: bool) -> Iterator[None]:
        """Return a context that holds the run directory, and writes into status.json how the run ended.

        Raises OutputError for a directory with a run without `resume`, PlanError where that run had another request.
        """
        self.wait()
        with ExitStack() as stack:
            if is_first():
                stack.enter_context(checkpoints.held(self.run_dir))
                claim(self.run_dir, request, resume=resume)
            self.reporter = Reporter(self.run_dir, self.watcher)
            stack.push(self._ended)
            with memory_explained(lambda: self.settings, lambda: self.reporter.last_step), self._losses_explained():
                self.wait()
                yield

    def _ended(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Report a run that failed, and remove the weights that were on their way to the output."""
        if error is not None:
            self.reporter.failed(error)
        if is_first():
            shutil.rmtree(self.run_dir / WEIGHTS, ignore_errors=True)

    @contextmanager
    def _losses_explained(self) -> Iterator[None]:
        """Turn torch's error of a process that has ended into one that says so."""
        try:
            yield
        except RuntimeError as error:
            if not is_loss(error):
                raise
            hint = "Its own error says why; the same command with --resume continues from the newest checkpoint."
            raise TrainingError("another process of the run has ended", hint=hint) from error

    def _note(self, text: str) -> None:
        self.reporter.note(text)

    def wait(self) -> None:
        """Wait for the other processes, if there are any."""
        if is_launched():
            from accelerate import PartialState

            uses_cpu = self.device == "cpu" and not is_launched_by_plugin()  # as in `arguments`
            check_meeting(PartialState(cpu=uses_cpu).num_processes)
            wait_for_all()

    # --- training ---------------------------------------------------------------------------------------------

    def fit(self) -> "TrainedSteps":
        """Train, and keep the trained model for `write`. With --lr auto the learning rate is searched for first."""
        self.reporter.status("preparing")
        with stage("looking for a checkpoint"):
            resume_from = checkpoints.newest(self.run_dir, self.reporter.note)
        self.wait()
        free = self.inputs.free_memory()
        free = None if free is None else least(free)  # all processes take the same batches
        self.inputs.check_fits(free)
        model, teacher_model = self._loaded(), self.inputs.teacher_model()
        self.inputs.attend(model, teacher_model)
        self.attention = str(model.config._attn_implementation)
        data = self.inputs.data(self.run_dir, model, teacher_model)
        for note in (*data.notes, *self._warnings()):
            self.reporter.note(note)
        self._check_data(data, resumed=resume_from is not None)
        teacher = self.inputs.teacher(teacher_model, data, self.run_dir)
        data = self._of_selected(data, teacher)
        self._settle_batches(self._chosen(data, model, free))
        steps = self.inputs.steps(data)
        if resume_from is None:
            self._advise(data, steps)
        self.compiles = self.inputs.compiles(model, steps)
        self.rate = self.settings.learning_rate() or self._searched_rate(data, steps, teacher)
        model = self._trained(model, teacher)
        step, tokens = (0, 0) if resume_from is None else progress(resume_from)
        meter = self._pace_meter(model, data, steps, done=step, tokens=tokens)
        self.reporter.begin(steps=steps, step=step, tokens=tokens, meter=meter)
        with stops_at_sigterm(self.stop):
            self.trainer, trained = run_steps(
                model,
                data,
                self.settings,
                run_dir=self.run_dir,
                lr=self.rate,
                steps=steps,
                device=self.device,
                resume_from=resume_from,
                reporter=self.reporter,
                stop=self.stop,
            )
        self.reporter.end()
        return trained

    def _advise(self, data: RunData, steps: int) -> None:
        """Say in one line what so many passes over so much data come to, where the loss is that of a language model."""
        if self.task.unit != Task.unit:
            return
        anatomy, lora = read_anatomy(spec_of(self.source)), self.settings.lora
        trained = num_trained(self.source, self.settings) if lora is None else lora_parameters(anatomy, lora)
        epochs = steps * self.inputs.rows_per_step / len(data.rows)
        self.reporter.say(in_a_line(trained, data.rows.num_tokens, epochs))

    def _check_data(self, data: RunData, *, resumed: bool) -> None:
        """Record the data of the run, or raise DataError where a resumed run would read other texts."""
        self.provenance, file = data.provenance(), self.run_dir / DATA
        if is_first() and not resumed:
            write_json(file, {"data": self.provenance})
        self.wait()
        content = read_json(file) if file.exists() else {"data": self.provenance}
        began = content.get("data") if isinstance(content, dict) else None
        if not isinstance(began, list):
            raise DataError(f"{file} does not say what the run read", hint="Begin anew with another --run-dir.")
        if began != self.provenance:
            changed = [now["data"] for was, now in zip(began, self.provenance, strict=False) if was != now]
            raise DataError(
                f"{(changed or self.specs)[0]} is not what it was when the run in {self.run_dir} began",
                hint="Bring the old texts back, or begin anew with another --run-dir.",
            )

    def _of_selected(self, data: RunData, teacher: Any) -> RunData:
        """Return the rows that the first process selects, or selected before a resume; all without --select."""
        if self.select is None:
            return data
        file, settings = self.run_dir / SELECTED, self.settings
        if is_first() and not file.exists():
            rate = settings.learning_rate() or (LORA_LR if settings.lora else FULL_LR)
            make = partial(trained_model, source=self.source, task=self.task, teacher=teacher)
            pool = Pool(data, lambda: make(self._loaded()), self.inputs, rate)
            write_json(file, self.select(pool).to_dict())
        self.wait()
        self.selected = Selected.read(read_json(file), str(file))
        self.reporter.note(str(self.selected))
        return only(data, self.selected.pieces, settings, sequence_length=self.inputs.row_length)

    def _chosen(self, data: RunData, model: Any, free: int | None) -> Split:
        """Return the batches of a step: those of the run that is resumed, else what fits the memory.

        Raises TrainingError where nothing does, and DataError where the record of them is damaged.
        """
        file = self.run_dir / BATCH
        if file.exists():
            content = read_json(file)
            names = ("batch_size", "gradient_accumulation")
            if isinstance(content, dict) and all(
                type(content.get(name)) is int and content[name] > 0 for name in names
            ):
                with suppress(TypeError):
                    return Split(**content)
            raise DataError(f"{file} holds no batches", hint="Remove it: they are chosen again.")
        can_recompute = bool(getattr(model, "supports_gradient_checkpointing", False))
        found = self.inputs.split(data, free, can_recompute=can_recompute)
        if not found.fits and self.settings.batch_size == AUTO:
            anatomy, work = read_anatomy(spec_of(self.source)), self.inputs.workload(data)
            raise too_large(anatomy, work, found, label=self.source.label, device=self.device)
        self.wait()
        if is_first():
            write_json(file, asdict(found))
        self.wait()
        return found

    def _settle_batches(self, found: Split) -> None:
        """Train with these batches, and say so where they are not what the user would expect."""
        asked, self.batches = self.settings, found
        self.settings = replace(asked, **found.settings())
        self.task = replace(self.task, settings=self.settings)
        self.inputs = replace(self.inputs, task=self.task)
        is_split = asked.batch_size == AUTO and found.gradient_accumulation > asked.gradient_accumulation
        if is_split or (asked.activation_checkpointing is None and found.activation_checkpointing):
            self.reporter.note(str(found))

    def _pace_meter(self, model: Any, data: RunData, steps: int, *, done: int, tokens: int) -> PaceMeter:
        """Return the meter of the run, which knows the operations per token where it knows the devices' peak."""
        is_gpu = self.device.startswith("cuda")
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if is_gpu else None
        flops = None
        if peak is not None:
            total = sum(parameter.numel() for parameter in model.parameters())
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / total
            length = max(1, round(float(data.stores[0].lengths.mean())))
            flops = flops_per_token(read_anatomy(spec_of(self.source)), length, trained=trained)
        return PaceMeter(
            steps,
            done=done,
            tokens=tokens,
            flops_per_token=flops,
            peak=None if peak is None else peak * processes(),
            memory=lambda: most_memory_used(self.device),
        )

    def _warnings(self) -> list[str]:
        """Return warnings about the settings and the devices."""
        warnings = []
        if self.inputs.precision == "pure-bf16":
            warnings.append("weights of 16 bits lose small steps: at a rate of 1e-5 most of them never change")
        if self.inputs.precision != "float32" and self.device.startswith("cuda") and not computes_bfloat16(self.device):
            warnings.append("this GPU only emulates bfloat16, slowly: --precision float32 is faster")
        if self.device == "cuda" and torch.cuda.device_count() > 1 and not is_launched():
            count = torch.cuda.device_count()
            warnings.append(f"one of {count} GPUs is used; --num-processes {count} uses all")
        return warnings

    def _loaded(self) -> Any:
        return load_trainable(self.source, self.task, precision=self.inputs.precision)

    def _trained(self, model: Any, teacher: Any) -> Any:
        return trained_model(model, self.source, self.task, teacher, compiles=self.compiles)

    def _searched_rate(self, data: RunData, steps: int, teacher: Any) -> float:
        """Return the better of two rates, each tried for a few steps from the same weights; a resume takes the same."""
        file = self.run_dir / RATE
        if file.exists():
            content = read_json(file)
            chosen = content.get("chosen") if isinstance(content, dict) else None
            if not isinstance(chosen, int | float) or not 0 < chosen < math.inf:
                raise DataError(f"{file} holds no learning rate", hint="Remove it: the rate is searched for again.")
            return float(chosen)
        low = LORA_LR if self.settings.lora else FULL_LR
        length = max(2, min(PROBE_STEPS, steps // 10))
        losses: dict[float, float] = {}
        for rate in (low, low * FACTOR):
            loaded = self._loaded()
            loaded.config._attn_implementation = self.attention
            model = self._trained(loaded, teacher)
            losses[rate] = loss_after(model, data, self.settings, lr=rate, steps=length, device=self.device)
        chosen = min(losses, key=lambda rate: losses[rate])
        listed = ", ".join(f"{rate:g} → {loss:.4f}" for rate, loss in losses.items())
        self.reporter.note(f"learning rate {chosen:g}: losses after {length} steps were {listed}")
        if is_first():
            tried = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}
            write_json(file, {"chosen": chosen, "steps": length, "losses": tried})
        self.wait()
        return chosen

    # --- the end ----------------------------------------------------------------------------------------------

    def write(self, trained: TrainedSteps, output: Path, *, dtype: str, command: str | None, **options: Any) -> None:
        """Write the weights of the last step, or with --keep-best the best one; with --keep-adapter only adapters.

        All processes call this, for each may hold a part of the weights; the first one writes.
        """
        with stage("storing the trained weights"):
            weights = self._weights(trained)
        if not is_first():
            return
        summary = self._summary(trained, output).to_dict()
        write_result(self.run_dir, source=self.source.provenance(), step=self._step(trained), summary=summary)
        if self.settings.keep_adapter:
            write_adapter(self.source, weights, output, self._step(trained), command=command, **options)
            return
        if self.settings.lora is not None:
            with stage("merging the adapters"):
                weights = self._merged(weights)
        listed = ", ".join(f"{name} {figure}" for name, figure in self._summary(trained, output).losses())
        notes = (f"trained for {trained.steps:,} steps on {trained.tokens:,} tokens: {listed}",)
        surgery = trained_surgery(self.source, weights, dtype=dtype, step=self._step(trained), notes=notes)
        surgery.save(output, dtype=dtype, command=command, **options)

    def _weights(self, trained: TrainedSteps) -> Path:
        """Return a directory with the weights, or adapters, of the resulting step."""
        weights = self.run_dir / WEIGHTS
        if self._best(trained) != trained.steps:
            return self.run_dir / f"checkpoint-{trained.best_step}"
        with quiet_transformers(), checkpoints.explained(self.run_dir):
            self.trainer.save_model(str(weights))
        self.wait()
        return weights

    def _best(self, trained: TrainedSteps) -> int:
        return trained.best_step if self.settings.keep_best and trained.best_step is not None else trained.steps

    def _step(self, trained: TrainedSteps) -> dict[str, Any]:
        """Return the step of the receipt."""
        return {
            "data": self.provenance,
            "steps": trained.steps,
            "tokens": trained.tokens,
            "result_of_step": self._best(trained),
            "learning_rate": self.rate,
            "settings": self.task.record() | self.batches.settings(),
            **({} if self.selected is None else {"selection": self.selected.recorded()}),
            **({"trust_remote_code": True} if code_is_trusted() else {}),
        }

    def _merged(self, adapter: Path) -> Path:
        """Return a directory with the base's weights in float32 and the adapter added to them."""
        merged = self.run_dir / WEIGHTS / "merged"
        model = load_model(self.source, dtype=torch.float32, hint=LOAD_HINT)
        with quiet_transformers(), checkpoints.explained(self.run_dir):
            adapters.merged(model, adapter).save_pretrained(merged)
        return merged

    def stopped(self, trained: TrainedSteps) -> Training:
        """Return the summary of a run that was stopped before its end."""
        self.reporter.status("stopped", exit_code=143)
        return self._summary(trained, None)

    def _summary(self, trained: TrainedSteps, output: Path | None) -> Training:
        return Training(
            output=output,
            run_dir=self.run_dir,
            steps=trained.steps,
            tokens=trained.tokens,
            train_loss=trained.train_loss,
            train_loss_error=trained.train_loss_error,
            train_kl=trained.train_kl,
            objective=trained.objective,
            eval_loss=trained.eval_loss,
            eval_loss_error=trained.eval_loss_error,
            learning_rate=self.rate,
            best_step=trained.best_step,
            tokens_per_second=self.reporter.tokens_per_second,
            seconds=time.perf_counter() - self.began,
            plot=self._plot(),
            notes=tuple(self.reporter.notes),
            unit=self.task.unit,
        )

    def finished(self, trained: TrainedSteps, output: Path) -> Training:
        """Return the summary of a run whose output is written, and remove what is of no more use."""
        summary = self._summary(trained, output)
        if is_first():
            summary = concluded(summary, self.settings)
        self.wait()
        return summary

    def _plot(self) -> Path | None:
        """Draw the losses into the run's directory, where matplotlib is installed."""
        if not is_first():
            return None
        try:
            return plot_losses([(self.run_dir, read_metrics(self.run_dir))], self.run_dir / PLOT)
        except SurgeonError as error:  # a run without a picture has not failed
            self.reporter.note(f"no plot: {error}")
            return None


@contextmanager
def memory_explained(settings: Callable[[], Settings], step: Callable[[], int]) -> Iterator[None]:
    """Turn an out-of-memory error into one that says what to lower. `step` returns how many steps are done."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(settings(), step()) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):  # the CPU's allocator
            raise
        raise _out_of_memory(settings(), step()) from error


def _out_of_memory(settings: Settings, step: int) -> TrainingError:
    rows = "rows" if isinstance(settings.batch_size, str) else f"{settings.batch_size} rows"
    return TrainingError(f"the memory is full after step {step}, with {rows} a batch", hint=MEMORY_HINT)
