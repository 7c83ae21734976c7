"""Remaking a checkpoint from its receipt, surgeon.json: byte for byte where it is surgery.

Training is run again with the same settings on the same data; on a CPU it gives the same bytes.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from surgeon import text
from surgeon.anatomy.halves import Pairing
from surgeon.checkpoint.receipt import read_receipt
from surgeon.checkpoint.source import CONFIG, INDEX, RECEIPT, SCORES, content_of
from surgeon.data.documents import documents
from surgeon.data.records import Columns, chosen_columns
from surgeon.data.rows import hashed
from surgeon.errors import DataError, RecipeError, first_line
from surgeon.measure.record import Scores, read_scores
from surgeon.options import OptionError
from surgeon.plan.grams import WORD as GRAMS_WORD
from surgeon.plan.grams import GramsFile
from surgeon.plan.operators import open_operator
from surgeon.plan.plan import Plan
from surgeon.plan.rows import open_rows
from surgeon.plan.solved import SolvedFile, open_repairs, with_repairs
from surgeon.recipe.checking import words_of
from surgeon.recipe.commands import Commands
from surgeon.recipe.reading import Place, Value, plain
from surgeon.recipe.running import Say
from surgeon.showing import Shown
from surgeon.surgery import Surgery, open_model, open_source
from surgeon.transforms.dense import mixtures_of, to_dense
from surgeon.transforms.prune import prune
from surgeon.verbs.dense import CRITERION
from surgeon.verbs.finetune import TrainingOptions
from surgeon.verbs.learning import with_learned

TRAINED = "finetune"  # the step of a receipt that is trained again
GROWN = "grow"  # the one whose maps may have been learned: they are beside the result
PRUNED = "prune"  # the one that scores decided: what they chose is in the receipt, or in the scores beside it
Beside = TypeVar("Beside", bound=SolvedFile)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Replay(Shown):
    """A checkpoint that was made again. `differing` are its files with other bytes than the first one's.

    It is None where the checkpoint is only planned.
    """

    output: Path
    original: Path
    steps: tuple[str, ...]
    differing: tuple[str, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the replay as `--json` prints it."""
        status = "planned" if self.differing is None else "done"
        step = {"name": "replay", "command": "+".join(self.steps), "status": status, "output": str(self.output)}
        same = {} if self.differing is None else {"same": not self.differing, "differing": list(self.differing)}
        return {"steps": [step | {"result": {"original": str(self.original)} | same}], "report": None}

    @property
    def headline(self) -> str:
        """The checkpoint and what it repeats."""
        return f"{self.output}, of {self.original}"

    def to_text(self) -> str:
        """Return the replay for people."""
        rows = [("steps", ", then ".join(self.steps))]
        if self.differing is None:
            return text.rows([*rows, ("output", f"{self.output} (not written)")])
        same = f"other bytes in {text.few(self.differing)}" if self.differing else "the same bytes"
        return text.rows([*rows, ("weights and config", same), ("output", str(self.output))])


def replay(path: Path, output: Path | None, commands: Commands, say: Say, *, overwrite: bool, dry_run: bool) -> Replay:
    """Make the checkpoint again whose receipt is `path`, at `output` (default: its name with "-replay").

    Raises RecipeError where it cannot be: its source or its data is gone or has changed.
    """
    original = path.parent
    record = read_receipt(original)
    if record is None or not _is_sound(record):
        raise RecipeError(f"{path} is no receipt of a surgery", hint="surgeon.json of a checkpoint that surgeon wrote.")
    place = original.resolve()
    target = output or place.with_name(f"{place.name or 'model'}-replay")
    if target.resolve() == place:
        raise RecipeError(f"{target} is what is to be compared with", hint="Choose another place with -o.")
    steps = [next(iter(step.items())) for step in record["steps"]]
    for number, (name, _) in enumerate(steps):
        is_known = len(steps) == 1 if name == TRAINED else commands.is_surgery(name)
        if not is_known or (name == PRUNED and number):
            raise RecipeError(
                f"{path}: the step {name} is not replayed", hint=f"Type it again: {record.get('command')}"
            )
    names = tuple(name for name, _ in steps)
    if not dry_run:
        say(f"replay: {', then '.join(names)}")
    try:
        _made(steps, record, path, target, commands, overwrite=overwrite, dry_run=dry_run)
    except (KeyError, TypeError, AttributeError, ValueError, OptionError) as error:  # of what a receipt never has
        raise RecipeError(f"{path} is damaged: {first_line(error)}", hint="Type its command again.") from error
    differing = None if dry_run else tuple(_differing(original, target))
    return Replay(output=target, original=original, steps=names, differing=differing)


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Return whether a receipt names a source, options, and steps with one name each."""
    steps, source, options = record.get("steps") or [], record.get("source"), record.get("options")
    return (
        bool(steps) and isinstance(source, dict) and isinstance(options, dict) and all(len(step) == 1 for step in steps)
    )


def _made(
    steps: Sequence[tuple[str, Mapping[str, Any]]],
    record: Mapping[str, Any],
    path: Path,
    target: Path,
    commands: Commands,
    *,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Make the checkpoint of a receipt, or plan it."""
    source, options = record["source"], record["options"]
    begun = "config" in source  # without a model
    model, revision = ("", None) if begun else _source(source, path)
    if steps[0][0] == TRAINED:
        words = _words_of(steps[0][1], options, commands, path)
        words += [] if revision is None else [f"--revision={revision}"]
        words += ["--overwrite"] if overwrite else []
        if not dry_run:
            commands.run(TRAINED, [*words, f"--output={target}", "--", model])
        return
    surgery = None if begun else open_model(model, revision=revision)
    for name, step in steps:
        if name == PRUNED and surgery is not None:
            surgery = _pruned(surgery, step, path.parent)
        elif name == GROWN and surgery is not None and (sha256 := (step.get("learned") or {}).get("sha256")):
            surgery = with_learned(surgery, step, _unchanged(open_operator(path.parent), sha256))
        else:
            surgery = commands.repeat(name, _with_files(step, path.parent), surgery)
    assert surgery is not None, "a receipt has steps"
    if not begun:
        _check_parents(surgery, source, path)
    known = {key: options[key] for key in ("dtype", "max_shard_size", "block") if key in options}
    if dry_run:
        surgery.prepare(target, **known)
    else:
        surgery.save(target, **known, overwrite=overwrite, command=f"surgeon run {path}")


def _source(source: Mapping[str, Any], path: Path) -> tuple[str, str | None]:
    """Return the model that a receipt began with, checked to be the same. Raises RecipeError where it is not."""
    if "id" in source:
        return str(source["id"]), str(source["commit"])
    place = str(source.get("path"))
    if not os.path.exists(place):  # noqa: PTH110  # Path.exists raises for a name that is too long
        raise RecipeError(
            f"{path}: its source {place} is gone", hint="Put it back; or replay the source's surgeon.json."
        )
    found = open_source(place).provenance()
    if found.get("fingerprint") != source.get("fingerprint"):
        raise RecipeError(f"{path}: its source {place} has changed since", hint="Put the one back that it was made of.")
    return place, None


def _with_files(step: Mapping[str, Any], original: Path) -> Mapping[str, Any]:
    """Return a step with the files beside its result that stand for what was read: Gram matrices, and new rows."""
    if "rows" in step:
        _unchanged(open_rows(original), step["rows"]["sha256"])
        return {**step, "rows_from": str(original)}
    if "grams" in step:
        file = _unchanged(GramsFile.at(original, str(original)), step["grams"])
        return {**step, "data": [str(file.path) if each == GRAMS_WORD else each for each in step["data"]]}
    return step


def _check_parents(surgery: Surgery, source: Mapping[str, Any], path: Path) -> None:
    """Raise RecipeError where a model that was merged, or gave layers, is not what it was."""
    found = surgery.source.provenance()
    for word, known in source.items():
        other = found.get(word)
        if isinstance(known, dict) and isinstance(other, dict) and known.get("fingerprint") != other.get("fingerprint"):
            hint = "Put the one back that it was made of."
            raise RecipeError(f"{path}: its source {known.get('path')} has changed since", hint=hint)


def _pruned(surgery: Surgery, step: Mapping[str, Any], original: Path) -> Surgery:
    """Return the cut that a receipt describes: what was chosen is in it, or in the scores beside it."""
    file = original / SCORES
    scores = read_scores(file) if file.is_file() else None
    criterion = step.get("width_criterion") or "uniform"
    halves = step.get("pairing")
    plan = (
        _dense(surgery, scores)
        if step.get("dense")
        else prune(
            surgery.anatomy,
            dropped=step["dropped"],
            pairing=None if halves is None else Pairing(**{half: tuple(kept) for half, kept in halves.items()}),
            sizes=step["sizes"],
            criterion=criterion,
            values=None if scores is None else scores.widths.get(criterion),
            seed=step["seed"],
        )
    )
    attachments = {**surgery.attachments, **({SCORES: content_of(file)} if scores is not None else {})}
    plan = replace(plan, steps=({"prune": dict(step)},))
    made = replace(surgery, plan=surgery.plan.then(plan), attachments=attachments)
    solved = (step.get("compensation") or step.get("merging") or {}).get("sha256")
    if solved is None:
        return made
    repairs = _unchanged(open_repairs(original), solved)
    source, whole = with_repairs(made.source, made.plan, repairs)
    return replace(made, source=source, plan=whole)


def _unchanged(file: Beside, sha256: str) -> Beside:
    """Return a file beside a result. Raises RecipeError where it is not the one that the result was made of."""
    if file.sha256 != sha256:
        raise RecipeError(f"{file.path} has changed since", hint="Put the one back that it was made of.")
    return file


def _dense(surgery: Surgery, scores: Scores | None) -> Plan:
    """Return the plan of a dense model that was made of experts: which neurons stayed is in the scores beside it."""
    if scores is None or CRITERION not in scores.widths:
        hint = "Put the scores.json back that it was made with."
        raise RecipeError("the scores of a dense model are gone", hint=hint)
    return to_dense(surgery.anatomy, mixtures_of(surgery.anatomy, scores.widths[CRITERION]))


def _words_of(step: Mapping[str, Any], options: Mapping[str, Any], commands: Commands, path: Path) -> list[str]:
    """Return the settings of a training as they are typed: those that a run records, and no other option.

    Raises RecipeError where the data is gone or has changed.
    """
    for data in [*step["data"], *step.get("selection", {}).get("data", ())]:
        try:
            found = _sha256(data["data"], data["documents"], chosen_columns(step["settings"].get("columns")))
        except DataError as error:
            hint = "Paths are relative to where you are."
            raise RecipeError(f"{path}: its data is gone: {error}", hint=hint) from error
        if found != data["sha256"]:
            hint = "Put the one back that it was made of."
            raise RecipeError(f"{path}: its data {data['data']} has changed since", hint=hint)
    keys = commands.keys(TRAINED)
    recorded = {item.name for item in fields(TrainingOptions)}
    place = Place(str(path), 0)
    settings = {
        key: _value(value, place)
        for name, value in step["settings"].items()
        if name in recorded and (key := name.replace("_", "-")) in keys
    }
    words = [f"--data={data['data']}" for data in step["data"]]
    words += words_of(settings, keys)
    return words + ([f"--dtype={options['dtype']}"] if "dtype" in options else [])


def _value(value: Any, place: Place) -> Value:
    """Return a setting of a receipt as a recipe has it."""
    if value is None or isinstance(value, bool):
        return plain("null" if value is None else str(value).lower(), place)
    items = value if isinstance(value, list) else [value]
    return Value("list" if isinstance(value, list) else "text", tuple(map(str, items)), place)


def _sha256(data: str, count: int, columns: Columns | None) -> str:
    """Return the hash of the first `count` texts of a data argument, as a run's receipt has it."""
    found = hashlib.sha256()
    for number, document in enumerate(islice(documents(data, columns), count)):
        found.update(hashed(document, number))
    return found.hexdigest()


def _differing(original: Path, target: Path) -> Sequence[str]:
    """Return the names of the weight files, and of config.json, that are not the same in two checkpoints."""
    names = {file.name for file in chain(original.glob("*.safetensors"), target.glob("*.safetensors"))}
    names |= {name for name in (CONFIG, INDEX) if (original / name).exists() or (target / name).exists()}
    return sorted(name for name in names if _digest(original / name) != _digest(target / name))


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_receipt(path: Path) -> bool:
    """Return whether a path names a receipt rather than a recipe."""
    return path.name == RECEIPT
