"""What a recipe will do, before it does it: sizes, tokens, time and disk of every step.

A surgery is planned from headers. What later steps read of a result that is not there yet is a stand-in: a directory
with its config, tokenizer and receipt, and weight files that have headers and no content, so that they take no disk.
"""

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.checkpoint import receipt
from surgeon.checkpoint.header import format_header
from surgeon.checkpoint.output import existing_parent
from surgeon.checkpoint.source import CARD, CONFIG, RECEIPT, spec_of
from surgeon.draft import Draft
from surgeon.errors import OutputError, RecipeError, SurgeonError
from surgeon.recipe.checking import Job, Rounds, chains, grouped, words_of
from surgeon.recipe.commands import Commands
from surgeon.surgery import open_source

STATE_BYTES = 12  # of a checkpoint of a run, for each parameter: weights and two states of the optimizer, in float32
SPARE = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """What a step will do. `disk` are bytes that it keeps, `facts` its entries for JSON, `rows` those for people.

    `rounds` is how often it runs at most.
    """

    name: str
    command: str
    rows: tuple[tuple[str, str], ...]
    facts: Mapping[str, Any]
    disk: int
    seconds: float | None
    rounds: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the step as `--dry-run --json` prints it."""
        told = {"name": self.name, "command": self.command, "status": "planned", "output": None}
        return told | {"rounds": self.rounds, "bytes": self.disk, "seconds": self.seconds, "result": dict(self.facts)}


def plan(jobs: Sequence[Job | Rounds], commands: Commands, directory: Path, *, estimates: bool) -> list[PlannedStep]:
    """Return what each step will do.

    With `estimates` commands that train say how long it takes, which reads the data. Raises RecipeError for a surgery
    that is impossible.
    """
    steps: list[PlannedStep] = []
    with tempfile.TemporaryDirectory(prefix="surgeon-plan-") as scratch:
        planner = _Planner(commands, directory, Path(scratch), estimates)
        for item in grouped(jobs, commands):
            inside, rounds = (
                (chains(item.jobs, jobs, commands), item.at_most) if isinstance(item, Rounds) else ([item], 1)
            )
            for chain in inside:
                planned = (planner.step(job, is_kept=job is chain[-1]) for job in chain)
                steps += [replace(step, rounds=rounds) for step in planned]
    return steps


def check_disk(steps: Sequence[PlannedStep], directory: Path, done: Collection[str]) -> None:
    """Raise OutputError where the disk has less room than the steps need at least that are not `done`."""
    needed = round(SPARE * sum(step.disk for step in steps if step.name not in done))
    place = existing_parent(directory)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"{place} has {text.size(free)} free, and the recipe needs {text.size(needed)} at least",
            hint="Free some space, or choose another disk with -o.",
        )


@dataclass(slots=True)
class _Planner:
    commands: Commands
    directory: Path
    scratch: Path
    estimates: bool
    places: dict[str, str] = field(default_factory=dict)  # of the newest stand-ins, by the names of their steps

    def step(self, job: Job, *, is_kept: bool) -> PlannedStep:
        """Return what a job will do, and remember where its output, or a stand-in of it, is."""
        keys = self.commands.keys(job.command)
        unknown = sorted(set(job.reads) - self.places.keys() or self._without_file(job))
        if unknown:
            return self._unknown(job, f"known when {', '.join(unknown)} is made")
        words = self._words(job)
        if self.commands.is_surgery(job.command):
            return self._surgery(job, words, is_kept=is_kept)
        model = next((option for option, key in keys.items() if key.is_argument and key.reads), None)
        trains = "resume" in keys and "run-dir" in keys
        if not trains or model is None:
            return self._unknown(job, "not estimated")
        return self._training(job, words, self._place_of(job, model))

    def _without_file(self, job: Job) -> set[str]:
        """Return the steps of which a job reads a file that only their run writes, such as scores.json."""
        named = (item.partition("/") for items in job.references.values() for item in items)
        return {step for step, slash, rest in named if slash and not (Path(self.places[step]) / rest).exists()}

    def _place_of(self, job: Job, option: str) -> str:
        item = job.options[option].items[0]
        return self.places.get(item, item)

    def _words(self, job: Job) -> list[str]:
        return words_of(job.referring(self.places.__getitem__).options, self.commands.keys(job.command))

    def _surgery(self, job: Job, words: list[str], *, is_kept: bool) -> PlannedStep:
        target = self.directory / job.name
        words = [f"--output={target}", *words]
        try:
            draft = self.commands.draft(job.command, words, self.commands.plan(job.command, words, None))
        except SurgeonError as error:
            raise RecipeError(f"{job.place}: {job.name}: {error}", hint=error.hint) from error
        summary = draft.summary
        place = Path(tempfile.mkdtemp(dir=self.scratch)) / job.name  # a step of a loop may have the name of another
        stand_in(draft, place)
        self.places[job.name] = str(place)
        facts = summary.to_dict()
        rows = [
            ("layers", f"{summary.layers[0]} → {summary.layers[1]}"),
            ("parameters", f"{summary.parameters[0]:,} → {summary.parameters[1]:,}"),
            ("writes", text.size(summary.bytes_written) if is_kept else "nothing: in one pass with the next step"),
        ]
        disk = summary.bytes_written if is_kept else 0
        return PlannedStep(name=job.name, command=job.command, rows=tuple(rows), facts=facts, disk=disk, seconds=None)

    def _training(self, job: Job, words: list[str], model: str) -> PlannedStep:
        """Return what a step that trains will do; its result has the shape of its model, which stands in for it."""
        self.places[job.name] = model
        spec = spec_of(open_source(model))
        nbytes, parameters = spec.nbytes, spec.num_parameters
        disk = nbytes + (0 if "lora" in job.options else STATE_BYTES * parameters)
        rows = [("parameters", f"{parameters:,}"), ("writes", f"{text.size(disk)}, with a checkpoint of the run")]
        facts: dict[str, Any] = {"parameters": parameters}
        seconds = None
        if self.estimates:
            facts = self.commands.run(job.command, ["--dry-run", *words])
            seconds = facts.get("seconds")
            rows = [("steps", f"{facts['steps']:,}"), ("tokens", f"{facts['tokens']:,}"), *rows]
            rows.append(("memory", f"about {text.size(facts['memory']['peak'])}"))
            rows += [] if seconds is None else [("time", f"about {text.duration(seconds)}")]
        return PlannedStep(
            name=job.name, command=job.command, rows=tuple(rows), facts=facts, disk=disk, seconds=seconds
        )

    def _unknown(self, job: Job, why: str) -> PlannedStep:
        return PlannedStep(name=job.name, command=job.command, rows=(("", why),), facts={}, disk=0, seconds=None)


def stand_in(draft: Draft, directory: Path) -> None:
    """Write a directory that has the headers, config and other files of a result, and holes for its numbers."""
    directory.mkdir()
    for shard in draft.shards:
        header = format_header(shard.tensors)
        with (directory / shard.file).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in shard.tensors.values()))
    companions = {name: draft.source.fetch(name) for name in draft.companions if name != CARD}
    for name, path in companions.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, directory / name)
    record = receipt.receipt(
        source=draft.source.provenance(),
        steps=draft.plan.steps,
        layer_map=draft.plan.layer_map,
        mlp_map=draft.plan.mlp_map,
        axis_maps=draft.plan.axis_runs(),
        options=draft.options,
        command=None,
        notes=(),
    )
    files = {**draft.attached, RECEIPT: receipt.to_bytes(record), CONFIG: receipt.to_bytes(draft.plan.config)}
    for name, content in files.items():
        (directory / name).write_bytes(content)
