"""A run from its request to trained weights: everything around the loop, in the order in which it happens."""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.cost.flops import flops_per_token, peak_flops
from surgeon.errors import DataError, SurgeonError, TrainingError
from surgeon.models import adapters
from surgeon.models.device import resolve_device
from surgeon.models.loading import load_model, quiet_transformers
from surgeon.plots.figure import require_matplotlib
from surgeon.plots.training import plot_runs
from surgeon.train import checkpoints
from surgeon.train import loop as run
from surgeon.train.data import HELD_OUT, TRAINED, RunData
from surgeon.train.export import trained_surgery, write_adapter
from surgeon.train.inputs import TEACHER, Inputs
from surgeon.train.launch import is_first, is_launched, is_loss, processes
from surgeon.train.pace import Meter, peak_memory
from surgeon.train.reporter import Reporter
from surgeon.train.result import Training
from surgeon.train.run_dir import DATA, RATE, claim, read_json, write_json
from surgeon.train.settings import FULL_LR, LORA_LR, Settings
from surgeon.train.trainer import Stop, stops_at_sigterm

if TYPE_CHECKING:
    from surgeon.train.run_dir import Watcher

PLOT = "loss.png"
WEIGHTS = ".weights"  # trained weights on their way to the output
PROBE_STEPS = 50  # of each of the two runs of --lr auto, or a tenth of the run
FACTOR = 10.0  # between their rates


class Runner:
    """One request, carried out: `train`, `write` and `finished` in this order, inside `held`."""

    def __init__(
        self,
        source: Source,
        specs: tuple[str, ...],
        settings: Settings,
        *,
        run_dir: Path,
        device: str,
        watcher: "Watcher | None" = None,
    ) -> None:
        self.source, self.specs, self.settings, self.run_dir = source, specs, settings, run_dir
        self.device, self.watcher = resolve_device(device), watcher
        self.began = time.perf_counter()
        self.stop = Stop()
        self.inputs = Inputs(source, specs, settings, self.device, self._note, self.wait)
        settings.weights(len(specs))
        run.check_names(settings)

    # --- the run's directory ----------------------------------------------------------------------------------

    @contextmanager
    def held(self, *, resume: bool) -> Iterator[None]:
        """Return a context in which the run directory is ours, and says how the run ended.

        Raises OutputError for one that holds a run without `resume`, PlanError where that run was asked something else.
        """
        with ExitStack() as stack:
            if is_first():
                stack.enter_context(checkpoints.held(self.run_dir))
                model = self.source.provenance()
                settings = self.settings.deciding() | {"num_processes": processes()}  # their rows make the step
                claim(self.run_dir, resume=resume, model=model, data=self.specs, settings=settings)
            self.reporter = Reporter(self.run_dir, self.watcher)
            stack.push(self._ended)
            with run.memory_explained(self.settings, lambda: self.reporter.last_step), self._losses_explained():
                self.wait()
                yield

    def _ended(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Say how the run ended, where it did not end well, and remove what was on its way to the output."""
        if error is not None:
            self.reporter.failed(error)
        if is_first():
            shutil.rmtree(self.run_dir / WEIGHTS, ignore_errors=True)

    @contextmanager
    def _losses_explained(self) -> Iterator[None]:
        """Turn what torch raises when another process has ended into an error that says so."""
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

            uses_cpu = self.device == "cpu" and not run.is_launched_by_plugin()  # as run.arguments says later
            PartialState(cpu=uses_cpu).wait_for_everyone()

    # --- training ---------------------------------------------------------------------------------------------

    def train(self) -> run.Outcome:
        """Train, and keep the trained model for `result`. Looks for the learning rate first, where that is asked."""
        self.reporter.status("preparing")
        resume_from = checkpoints.newest(self.run_dir, self.reporter.note)
        self.wait()
        model, teacher_model = self._ready(), self.inputs.teacher_model()
        data = self.inputs.data(self.run_dir, model, teacher_model)
        for note in (*data.notes, *self._warnings()):
            self.reporter.note(note)
        self._check_data(data, resumed=resume_from is not None)
        steps = self.inputs.steps(data)
        teacher = self.inputs.teacher(teacher_model, data, self.run_dir)
        self.rate = self.settings.learning_rate() or self._found_rate(data, steps, teacher)
        model = self._trained(model, teacher)
        step, tokens = (0, 0) if resume_from is None else _progress(resume_from)
        meter = self._meter(model, data, steps, done=step, tokens=tokens)
        self.reporter.begin(steps=steps, step=step, tokens=tokens, meter=meter)
        with stops_at_sigterm(self.stop):
            self.trainer, outcome = run.train(
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
        return outcome

    def _check_data(self, data: RunData, *, resumed: bool) -> None:
        """Note what a run reads, or refuse to go on with other texts than those it began with."""
        self.provenance, file = data.provenance(), self.run_dir / DATA
        if is_first() and not resumed:
            write_json(file, {"data": self.provenance})
        self.wait()
        began = read_json(file)["data"] if file.exists() else self.provenance
        if began != self.provenance:
            changed = [now["data"] for was, now in zip(began, self.provenance, strict=False) if was != now]
            raise DataError(
                f"{(changed or self.specs)[0]} is not what it was when the run in {self.run_dir} began",
                hint="Bring the old texts back, or begin anew with another --run-dir.",
            )

    def _meter(self, model: Any, data: RunData, steps: int, *, done: int, tokens: int) -> Meter:
        """Return what measures the pace: with the operations of a token, and the devices' peak where it is known."""
        everything = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / everything
        anatomy, kind = read_anatomy(spec_of(self.source)), self.device.partition(":")[0]
        length = float(data.stores[0].lengths.mean())
        peak = peak_flops(torch.cuda.get_device_name()) if kind == "cuda" else None
        return Meter(
            steps,
            done=done,
            tokens=tokens,
            flops_per_token=flops_per_token(anatomy, max(1, round(length)), trained=trained),
            peak=None if peak is None else peak * processes(),
            memory=lambda: peak_memory(kind),
        )

    def _warnings(self) -> list[str]:
        """Return what a user should hear of the settings."""
        found = []
        if self.inputs.precision == "pure-bf16":
            found.append("weights of 16 bits lose small steps: at a rate of 1e-5 most of them never change")
        if self.device == "cuda" and torch.cuda.device_count() > 1 and not is_launched():
            count = torch.cuda.device_count()
            found.append(f"one of {count} GPUs is used; --num-processes {count} uses all")
        return found

    def _ready(self) -> Any:
        return run.ready_model(self.source, self.settings, precision=self.inputs.precision)

    def _trained(self, model: Any, teacher: Any) -> Any:
        objective = run.objective_of(self.settings, self.source)
        return run.trained_model(model, self.source, self.settings, objective, teacher)

    def _found_rate(self, data: RunData, steps: int, teacher: Any) -> float:
        """Return the better of two rates, each tried for a few steps from the same weights; kept for a resume."""
        file = self.run_dir / RATE
        if file.exists():
            return float(read_json(file)["chosen"])
        low = LORA_LR if self.settings.lora else FULL_LR
        length = max(2, min(PROBE_STEPS, steps // 10))
        losses: dict[float, float] = {}
        for rate in (low, low * FACTOR):
            model = self._trained(self._ready(), teacher)
            losses[rate] = run.loss_after(model, data, self.settings, lr=rate, steps=length, device=self.device)
        chosen = min(losses, key=lambda rate: losses[rate])
        told = ", ".join(f"{rate:g} → {loss:.4f}" for rate, loss in losses.items())
        self.reporter.note(f"learning rate {chosen:g}: losses after {length} steps were {told}")
        if is_first():
            tried = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}
            write_json(file, {"chosen": chosen, "steps": length, "losses": tried})
        self.wait()
        return chosen

    # --- the end ----------------------------------------------------------------------------------------------

    def write(self, outcome: run.Outcome, output: Path, *, dtype: str, command: str | None, **options: Any) -> None:
        """Write what was trained: the last step, or with --keep-best the best one; with --keep-adapter adapters alone.

        All processes call this, for each may hold a part of the weights; the first one writes.
        """
        weights = self._weights(outcome)
        if not is_first():
            return
        if self.settings.keep_adapter:
            write_adapter(self.source, weights, output, self._step(outcome), command=command, **options)
            return
        if self.settings.lora is not None:
            weights = self._merged(weights)
        losses = [("train", outcome.train_loss), ("validation", outcome.eval_loss)]
        told = ", ".join(f"{name} loss {loss:.4f}" for name, loss in losses if loss is not None)
        notes = (f"trained for {outcome.steps:,} steps on {outcome.tokens:,} tokens: {told} nats a token",)
        surgery = trained_surgery(self.source, weights, dtype=dtype, step=self._step(outcome), notes=notes)
        surgery.save(output, dtype=dtype, command=command, **options)

    def _weights(self, outcome: run.Outcome) -> Path:
        """Return a directory with the weights, or adapters, of the step that is the result."""
        weights = self.run_dir / WEIGHTS
        if self._best(outcome) != outcome.steps:
            return self.run_dir / f"checkpoint-{outcome.best_step}"
        with quiet_transformers(), checkpoints.explained(self.run_dir):
            self.trainer.save_model(str(weights))
        self.wait()
        return weights

    def _best(self, outcome: run.Outcome) -> int:
        return outcome.best_step if self.settings.keep_best and outcome.best_step is not None else outcome.steps

    def _step(self, outcome: run.Outcome) -> dict[str, Any]:
        """Return what the receipt says of the run."""
        return {
            "data": self.provenance,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "result_of_step": self._best(outcome),
            "learning_rate": self.rate,
            "settings": self.settings.deciding(),
        }

    def _merged(self, adapter: Path) -> Path:
        """Return a directory with the base's weights in float32 and the adapter added to them."""
        merged = self.run_dir / WEIGHTS / "merged"
        model = load_model(self.source, dtype=torch.float32, hint=run.LOAD_HINT)
        with quiet_transformers(), checkpoints.explained(self.run_dir):
            adapters.merged(model, adapter).save_pretrained(merged)
        return merged

    def told(self, outcome: run.Outcome, output: Path | None) -> Training:
        """Return what the run came to, for one that was stopped too."""
        if output is None:
            self.reporter.status("stopped", exit_code=143)
        return Training(
            output=output,
            run_dir=self.run_dir,
            steps=outcome.steps,
            tokens=outcome.tokens,
            train_loss=outcome.train_loss,
            eval_loss=outcome.eval_loss,
            learning_rate=self.rate,
            best_step=outcome.best_step,
            tokens_per_second=self.reporter.tokens_per_second,
            seconds=time.perf_counter() - self.began,
            plot=self._plot(),
            notes=tuple(self.reporter.notes),
        )

    def finished(self, outcome: run.Outcome, output: Path) -> Training:
        """Return what the run came to, and clear away what only a resume would need again but checkpoints."""
        found = self.told(outcome, output)
        if is_first():
            for name in (TRAINED, HELD_OUT, TEACHER):
                shutil.rmtree(self.run_dir / name, ignore_errors=True)
            self.reporter.status("done", exit_code=0, output=str(output))
        self.wait()
        return found

    def _plot(self) -> Path | None:
        """Draw the losses into the run's directory, where matplotlib is installed."""
        if not is_first():
            return None
        try:
            require_matplotlib()
            return plot_runs([self.run_dir], self.run_dir / PLOT)
        except SurgeonError as error:  # a run is no worse for want of a picture
            self.reporter.note(f"no plot: {error}")
            return None


def _progress(checkpoint: Path) -> tuple[int, int]:
    """Return how many steps and tokens of the run are behind a checkpoint."""
    state = read_json(checkpoint / "trainer_state.json")
    return checkpoints.step_of(checkpoint), int(state["num_input_tokens_seen"])
