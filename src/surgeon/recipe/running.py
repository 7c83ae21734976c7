"""Running a recipe: each step once, what is done is skipped, what was begun is resumed."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from surgeon.errors import RecipeError, SurgeonError
from surgeon.recipe.checking import Job, Rounds, chains, grouped, jobs_of, words_of
from surgeon.recipe.commands import Commands, Key
from surgeon.recipe.identity import digest
from surgeon.recipe.reading import Condition
from surgeon.recipe.record import Entry, Record
from surgeon.surgery import Surgery

Say = Callable[[str], None]
# What a step writes under its name: its output, a run's directory, and rows, finished and not.
SUFFIXES = ("", ".run", ".jsonl", ".jsonl.partial", ".jsonl.receipt")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step: `status` is "done", "skipped" (done by an earlier run) or "failed".

    `group` is the name without its seed of a step that runs once for each seed; "" for others. `stem` is the recipe's
    name of a step that runs once for each value of another setting; "" for others.
    """

    name: str
    command: str
    status: str
    output: str | None
    result: Mapping[str, Any]
    seconds: float
    group: str = ""
    stem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as `--json` prints it."""
        told = {"name": self.name, "command": self.command, "status": self.status, "output": self.output}
        return told | {"seconds": round(self.seconds, 3), "result": dict(self.result)}


@dataclass(slots=True, kw_only=True)
class Runner:
    """Runs the jobs of a recipe in a directory that it holds.

    `overwrite` lets steps be made anew whose inputs have changed; so are those from the step `first` on.
    """

    jobs: Sequence[Job | Rounds]
    commands: Commands
    record: Record
    say: Say
    overwrite: bool = False
    first: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    _latest: dict[str, str] = field(default_factory=dict)  # a step's name: the name of its last entry
    _is_anew: bool = False

    def run(self) -> None:
        """Run all jobs. Raises RecipeError for a step that fails, with the outcomes of those before it kept."""
        for item in grouped(self.jobs, self.commands):
            if isinstance(item, Rounds):
                self._repeat(item)
            else:
                self._carry_out(item)

    def _repeat(self, rounds: Rounds) -> None:
        for number in count():
            if self._holds(rounds.until):
                self.say(f"{rounds.name}: {', '.join(map(str, rounds.until))} after {number} rounds")
                return
            if number == rounds.at_most:
                missed = ", ".join(f"{each} (it is {self._told(each)})" for each in rounds.until)
                self.say(f"{rounds.name}: not reached after {number} rounds: {missed}")
                return
            for chain in chains(rounds.jobs, self.jobs, self.commands):
                self._carry_out(chain)

    def _holds(self, conditions: Sequence[Condition]) -> bool:
        """Return whether all conditions hold; before the steps that they name have run, they do not."""
        for condition in conditions:
            if condition.path[0] not in self._latest:
                return False
            if not condition.holds(self._figure(condition)):
                return False
        return True

    def _figure(self, condition: Condition) -> float:
        result = self.record.entries[self._latest[condition.path[0]]].result
        return figure(result, condition.path[1:], condition)

    def _told(self, condition: Condition) -> str:
        return f"{self._figure(condition):.6g}" if condition.path[0] in self._latest else "not measured"

    # --- one chain of jobs ------------------------------------------------------------------------------------

    def _carry_out(self, chain: tuple[Job, ...]) -> None:
        """Run a step, or surgeries that go in one pass, unless that is done."""
        names = self._names(chain)
        words = [self._words(job, name, chain) for job, name in zip(chain, names, strict=True)]
        inputs = {
            f"{name}.{option}": found
            for job, name in zip(chain, names, strict=True)
            for option, found in self._inputs(job).items()
        }
        key = digest({"commands": [job.command for job in chain], "inputs": _deciding(inputs)})
        self._is_anew = self._is_anew or any(
            job.name == self.first or name == self.first for job, name in zip(chain, names, strict=True)
        )
        entry = self.record.entries.get(names[-1])
        redo = self._redo(names[-1], chain[-1].command, entry, key, inputs)
        if entry is not None and redo is None:
            status = "skipped"
            self.say(f"{names[-1]}: done already")
        else:
            self._begin(chain, names, words, key, inputs, anew=redo == "anew")
            began = time.perf_counter()
            try:
                result = self._made(chain, words, redo)
            except SurgeonError:
                seconds = time.perf_counter() - began
                self.outcomes.append(Outcome(names[-1], chain[-1].command, "failed", None, {}, seconds))
                raise
            self._finish(names, result, time.perf_counter() - began)
            status = "done"
        for job, name in zip(chain, names, strict=True):
            self._latest[job.name] = name
            self.outcomes.append(self._outcome(name, status, job))
        self._check(chain[-1], names[-1])

    def _redo(self, name: str, command: str, entry: Entry | None, key: str, inputs: Mapping[str, Any]) -> str | None:
        """Return None for a step that is done, "begin", "resume" or "anew".

        Raises RecipeError where it was made of other inputs, or its output was changed, and may not be replaced.
        """
        left = self._left_by(name, self.record.entries[name].command if entry else command)
        if entry is None:
            if left:
                raise RecipeError(
                    f"{left[0]} exists, and this recipe did not make it", hint="Move it away, or choose another -o."
                )
            return "begin"
        if entry.status != "done" and entry.key == key:
            return "resume"  # also with --from, which was given before
        if self._is_anew:
            return "anew"
        if entry.key != key:
            if self.overwrite or not left:  # a figure is measured again: nothing is lost
                return "anew"
            raise RecipeError(
                f"{name} was made with {_changed(entry.inputs, inputs)}",
                hint="--overwrite makes it anew, and what follows from it; another -o keeps both.",
            )
        if entry.output is None:
            return None
        place = self.record.directory / entry.output
        if not place.exists():
            self.say(f"{name}: {place} is gone; it is made again")
            return "anew"
        if self.record.identities.of(str(place)) != entry.identity:
            if self.overwrite:
                return "anew"
            raise RecipeError(
                f"{place} has been changed since the recipe made it",
                hint="--overwrite makes it anew; another -o keeps it.",
            )
        return None

    def _begin(
        self,
        chain: Sequence[Job],
        names: Sequence[str],
        words: Sequence[list[str]],
        key: str,
        inputs: dict[str, Any],
        *,
        anew: bool,
    ) -> None:
        if anew:
            for name in names:
                if (entry := self.record.entries.get(name)) is not None:
                    self._remove(name, entry.command)
        for job, name, typed in zip(chain, names, words, strict=True):
            own = {
                option: value
                for option, value in inputs.items()
                if name == names[-1] or option.rpartition(".")[0] == name
            }
            self.record.entries[name] = Entry(command=job.command, words=typed, key=key, inputs=own)
        self.record.save()
        self.say(
            f"{names[-1]}: surgeon {chain[-1].command}"
            + (f", with {', '.join(names[:-1])} in one pass" if len(names) > 1 else "")
        )

    def _left_by(self, name: str, command: str) -> list[Path]:
        """Return what there is of what a step writes: its output, a run's directory, a file in the making."""
        if "output" not in self.commands.keys(command):
            return []
        places = (self.record.directory / f"{name}{suffix}" for suffix in SUFFIXES)
        return [place for place in places if place.exists() or place.is_symlink()]

    def _remove(self, name: str, command: str) -> None:
        """Remove what a step has written, but for an output that its command replaces once the new one is complete."""
        replaces = "overwrite" in self.commands.keys(command)
        for path in self._left_by(name, command):
            if path.name == name and replaces:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _made(self, chain: Sequence[Job], words: Sequence[list[str]], redo: str | None) -> dict[str, Any]:
        """Return the JSON object of a step that is run now, or of surgeries that are written in one pass."""
        last = chain[-1]
        keys = self.commands.keys(last.command)
        extra: list[str] = []
        if "resume" in keys and redo != "anew":
            extra.append("--resume")
        if "overwrite" in keys and redo != "begin":  # what a killed run may have written whole, or what is replaced
            extra.append("--overwrite")
        if len(chain) == 1:
            return self.commands.run(last.command, [*extra, *words[-1]])
        surgery: Surgery | None = None
        for job, typed in zip(chain, words, strict=True):
            surgery = self.commands.plan(job.command, typed, surgery, measure=True)
        assert surgery is not None, "a chain has jobs"
        return self.commands.write(last.command, [*extra, *words[-1]], surgery)

    def _finish(self, names: Sequence[str], result: dict[str, Any], seconds: float) -> None:
        for name in names:
            entry = self.record.entries[name]
            entry.status, entry.seconds = "done", seconds if name == names[-1] else 0.0
            entry.result = result if name == names[-1] else {"fused": names[-1]}
        written = result.get("output")
        if isinstance(written, str):
            entry = self.record.entries[names[-1]]
            entry.output = os.path.relpath(written, self.record.directory)
            entry.identity = self.record.identities.of(written)
        self.record.save()

    def _outcome(self, name: str, status: str, job: Job) -> Outcome:
        entry = self.record.entries[name]
        output = None if entry.output is None else str(self.record.directory / entry.output)
        stem = job.stem if job.name != job.stem and not job.group else ""
        return Outcome(name, entry.command, status, output, entry.result, entry.seconds, job.group, stem)

    def _check(self, job: Job, name: str) -> None:
        """Raise RecipeError where a figure of a step is not what the recipe requires of it."""
        result = self.record.entries[name].result
        for condition in job.require:
            found = figure(result, condition.path, condition)
            if not condition.holds(found):
                self.outcomes[-1] = replace(self.outcomes[-1], status="failed")
                raise RecipeError(
                    f"{name}: {'.'.join(condition.path)} is {found:.6g}, and {condition.sign} {condition.number:g} is "
                    f"required ({condition.place})",
                    hint="Change the steps before it, or what is required; what is done is not run again.",
                )

    # --- names, words, inputs ---------------------------------------------------------------------------------

    def _names(self, chain: Sequence[Job]) -> list[str]:
        """Return the names of the entries: a step that runs again in a loop gets a number."""
        taken = {outcome.name for outcome in self.outcomes}
        others = {job.name for item in self.jobs for job in jobs_of(item)}
        names = []
        for job in chain:
            numbered = (f"{job.name}-{number}" for number in count(2))
            name = (
                job.name
                if job.name not in taken
                else next(each for each in numbered if each not in taken and each not in others)
            )
            names.append(name)
            taken.add(name)
        return names

    def _words(self, job: Job, name: str, chain: Sequence[Job]) -> list[str]:
        """Return the words of a job: references are the outputs of steps, and what it writes lies in the directory."""
        keys = self.commands.keys(job.command)
        options = dict(job.referring(lambda step: self._output_of(step, chain)).options)
        for option, value in options.items():
            if keys[option].writes:
                items = tuple(str(self._place_of(item, job, name)) for item in value.items)
                options[option] = replace(value, items=items)
        words = words_of(options, keys)
        return [f"--output={self.record.directory / name}", *words] if "output" in keys else words

    def _place_of(self, item: str, job: Job, name: str) -> Path:
        """Return where a file goes that a step writes: of a step that runs more than once, each has its own."""
        path = self.record.directory / item
        return path.with_stem(f"{path.stem}{name.removeprefix(job.stem)}")

    def _output_of(self, step: str, chain: Sequence[Job]) -> str:
        """Return where the newest output of a step is; of a surgery of the same pass, which has none, its name."""
        name = self._latest.get(step)
        output = None if name is None else self.record.entries[name].output
        assert output is not None or step in [job.name for job in chain], f"no step made {step}"
        return step if output is None else str(self.record.directory / output)

    def _inputs(self, job: Job) -> dict[str, Any]:
        """Return the options of a job that decide its result, with the identities of what they name."""
        keys = self.commands.keys(job.command)
        found: dict[str, Any] = {}
        for option, value in job.options.items():
            key = keys[option]
            if not key.decides:
                continue
            if key.reads and value.form in ("text", "list"):
                named = job.references.get(option, ())
                found[option] = [self._identity(item, named, key) for item in value.items]
            else:
                found[option] = str(value)
        return found

    def _identity(self, item: str, named: Sequence[str], key: Key) -> Any:
        step, slash, rest = item.partition("/")
        if item not in named:
            return [item, self.record.identities.of(item, is_model=key.is_model)]
        name = self._latest.get(step)
        if name is None:  # of the same pass: its options are part of the key
            return [item]
        entry = self.record.entries[name]
        if not slash:
            return [item, entry.identity]
        return [item, self.record.identities.of(f"{self.record.directory / str(entry.output)}/{rest}")]


def figure(result: Mapping[str, Any], path: Sequence[str], condition: Condition) -> float:
    """Return the figure of a result that a path of keys leads to.

    Raises RecipeError where there is none, naming those that there are.
    """
    found: Any = result
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        there = ", ".join(".".join(names) for names, _ in figures(result))
        raise RecipeError(
            f"{condition.place}: there is no figure {'.'.join(path)} in the result{_unknown(result, path)}",
            hint=f"The result has: {there or 'none'}.",
        )
    return float(found)


def _unknown(result: Mapping[str, Any], path: Sequence[str]) -> str:
    """Return why a figure that a result names is not known, in brackets; "" for one that it does not name."""
    reason: Any = result.get(f"{path[0]}_refused")
    for key in path[1:2]:
        reason = reason.get(key) if isinstance(reason, Mapping) else reason
    if isinstance(reason, str):
        return f" ({reason})"
    return " (it is not known)" if path[-1] in result and result[path[-1]] is None else ""


def figures(result: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the figures of a result with the keys that lead to them, not those in lists."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from figures(value, (*before, key))
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield (*before, key), float(value)


def _deciding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs without the places of files: a file is what is in it, wherever it lies."""
    return {
        option: [item[1:] for item in value] if isinstance(value, list) else value for option, value in inputs.items()
    }


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what of a step's inputs has changed, as the end of a sentence."""
    for option in (*was, *(option for option in now if option not in was)):
        if was.get(option) != now.get(option):
            name, before, after = option.rpartition(".")[2], _brief(was.get(option)), _brief(now.get(option))
            if before == after:
                return f"another {name}: {after} has changed"
            return f"{name} {before}, and {after} is asked for now"
    return "other steps in one pass with it"


def _brief(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(str(item[0]) if isinstance(item, list) and item else str(item) for item in value)
    return str(value)
