"""Recipes checked against the commands, before anything starts: names of options, references, settings, files."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from surgeon.errors import RecipeError
from surgeon.mistyped import close_to, hint_beside
from surgeon.recipe.commands import RESERVED, Commands, Key, UsageError
from surgeon.recipe.reading import Condition, Loop, Place, Recipe, Step, Value, plain, substituted
from surgeon.text import place_of

# What a missing local file looks like, rather than a model or a dataset on the Hub.
_LOCAL = re.compile(r"[./~].*|.*\.(txt|jsonl?|parquet|[ct]sv|yaml|gguf|bin|safetensors|gz|zst)|.*/.*/.*")
MOST_LETTERS = 100  # of the name of a step with its values
SEED = "seed"  # the setting over whose values the report takes means


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A step that can be run: its settings are in place, and what it reads of other steps is known.

    `references` are the names of steps whose outputs its options name, by option and text: "cut", or "cut/file".
    """

    name: str
    command: str
    options: Mapping[str, Value]
    references: Mapping[str, tuple[str, ...]]
    require: tuple[Condition, ...]
    place: Place
    stem: str  # the name in the recipe
    group: str = ""  # the name without its seed, of a step that runs once for each seed

    @property
    def reads(self) -> Counter[str]:
        """How many of its options name the output of each step."""
        return Counter(item.partition("/")[0] for items in self.references.values() for item in items)

    def referring(self, place: Callable[[str], str]) -> "Job":
        """Return the job with `place` of a step's name wherever it refers to one: in "cut/file" that of "cut"."""

        def placed(item: str) -> str:
            name, slash, rest = item.partition("/")
            return f"{place(name)}{slash}{rest}"

        options = dict(self.options)
        for option, named in self.references.items():
            items = options[option].items
            options[option] = replace(
                options[option], items=tuple(placed(item) if item in named else item for item in items)
            )
        references = {option: tuple(map(placed, named)) for option, named in self.references.items()}
        return replace(self, options=options, references=references)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Jobs that are repeated until the conditions hold, `at_most` times."""

    name: str
    jobs: tuple[Job, ...]
    until: tuple[Condition, ...]
    at_most: int
    place: Place


def checked(recipe: Recipe, commands: Commands) -> tuple[Job | Rounds, ...]:
    """Return the jobs of a recipe. Raises RecipeError, with the line, for the first that could not run."""
    done: list[Job | Rounds] = []
    names = _all_names(recipe)
    known: dict[str, str] = {}
    for item in recipe.steps:
        if isinstance(item, Step):
            job = _job(item, recipe.settings, known, names, commands)
            _add(job, known)
            done.append(job)
        elif item.settings:
            for bound, settings in _bindings(item, recipe.settings):
                for job in _renamed(item.steps, bound, settings, known, names, commands):
                    _add(job, known)
                    done.append(job)
        else:
            done.append(_rounds(item, recipe.settings, known, names, commands))
            known |= {step.name: step.command for step in item.steps}
    return tuple(done)


def jobs_of(item: Job | Rounds) -> tuple[Job, ...]:
    """Return the jobs of a loop, or the one job."""
    return item.jobs if isinstance(item, Rounds) else (item,)


def words_of(options: Mapping[str, Value], keys: Mapping[str, Key]) -> list[str]:
    """Return options as one would type them: the arguments first."""
    placed = (options[name] for name, key in keys.items() if key.is_argument and name in options)  # in their own order
    arguments = [item for value in placed if value.form not in ("null", "false") for item in value.items]
    words: list[str] = []
    for name, value in options.items():
        key = keys[name]
        if value.form == "null" or (value.form == "false" and key.kind != "switch"):
            continue
        if key.kind == "switch":
            words += [key.flag] if value.form == "true" else [key.off] if key.off else []
        elif key.is_argument:
            continue
        elif key.is_list:
            words += [f"{key.flag}={item}" for item in value.items]
        else:
            words.append(f"{key.flag}={','.join(value.items)}")
    is_odd = any(item.startswith("-") for item in arguments)
    return [*words, "--", *arguments] if is_odd else [*arguments, *words]


def _add(job: Job, known: dict[str, str]) -> None:
    if job.name in known:
        raise job.place.error(f"a step is named {job.name} already")
    if len(job.name) > MOST_LETTERS:
        raise job.place.error(f"{job.name[:20]}... is too long for the name of a directory", hint="Use shorter values.")
    known[job.name] = job.command


def _all_names(recipe: Recipe) -> dict[str, Step]:
    """Return all steps by their names, also those in loops."""
    steps = itertools.chain.from_iterable(item.steps if isinstance(item, Loop) else (item,) for item in recipe.steps)
    return {step.name: step for step in steps}


def _job(
    step: Step, settings: Mapping[str, Value], known: Mapping[str, str], names: Mapping[str, Step], commands: Commands
) -> Job:
    keys = commands.keys(step.command)
    for name, value in step.options.items():
        if name in RESERVED:
            raise value.place.error(
                f"{name} is not for recipes: surgeon run says where results go and what is resumed",
                hint="Leave it out.",
            )
        _check_name(step.command, name, value, [key for key in keys if key not in RESERVED])
    options = {name: substituted(value, settings) for name, value in step.options.items()}
    options = check_options(step.command, options, keys)
    try:
        commands.check(step.command, words_of(options, keys))
    except UsageError as error:
        named = next((name for name in options if re.search(rf"--{name}\b", f"{error.option} {error}")), None)
        place = step.place if named is None else options[named].place
        raise RecipeError(f"{place}: {step.command}: {error}", hint=error.hint) from error
    references = {
        name: found
        for name, key in keys.items()
        if name in options and (found := _references(step, key, options[name], known, names, commands))
    }
    for name, value in options.items():
        if keys[name].reads:
            others = [item for item in value.items if item not in references.get(name, ())]
            _check_there(others, value.place)
    return Job(
        name=step.name,
        command=step.command,
        options=options,
        references=references,
        require=step.require,
        place=step.place,
        stem=step.name,
    )


def check_options(command: str, options: Mapping[str, Value], keys: Mapping[str, Key]) -> dict[str, Value]:
    """Return options with each as its key takes it: `off` is a word where it is one of the option's, and not false.

    Raises RecipeError, with the line, for an option that the command does not have, and for a value of another form.
    """
    for name, value in options.items():
        _check_name(command, name, value, keys)
    found = {
        name: replace(value, form="text", items=(value.word,)) if value.word in keys[name].words else value
        for name, value in options.items()
    }
    for name, value in found.items():
        _check_form(command, value, keys[name])
    return found


def _check_name(command: str, name: str, value: Value, known: Collection[str]) -> None:
    if name not in known:
        close, hint = close_to(name, known), f"surgeon {command} --help lists them."
        raise value.place.error(f"{command} has no option {name}{close}", hint=hint)


def _check_form(command: str, value: Value, key: Key) -> None:
    """Raise RecipeError for a switch that is no switch, or a list where one text belongs."""
    if key.kind != "switch" and value.form in ("null", "false"):
        return  # left out
    if (key.kind == "switch") != (value.form in ("true", "false")) and value.form != "null":
        wanted = {"switch": "true or false", "integer": "an integer"}.get(key.kind, f"a {key.kind}")
        raise value.place.error(f"{key.name} of {command} is {value}; it is {wanted}")
    if key.kind == "switch" and value.form == "null":
        raise value.place.error(f"{key.name} of {command} is null; it is true or false")
    if key.reads and value.form == "list" and not key.is_list:
        raise value.place.error(f"{key.name} of {command} is one text, not a list")


def _references(
    step: Step, key: Key, value: Value, known: Mapping[str, str], names: Mapping[str, Step], commands: Commands
) -> tuple[str, ...]:
    """Return those texts of a value that name the output of an earlier step. Raises RecipeError for a later one."""
    if not key.reads:
        return ()
    found = []
    for item in value.items:
        name = item.partition("/")[0]
        if name in known:
            if os.path.lexists(item):
                raise value.place.error(
                    f"{key.name} of {step.name} is {item}: a step's name, and a path",
                    hint=f"Write ./{item} for the path, or rename the step.",
                )
            if "output" not in commands.keys(known[name]):
                raise value.place.error(
                    f"{key.name} of {step.name}: {name} ({known[name]}) has no output",
                    hint="Name a step that writes a model or data.",
                )
            found.append(item)
        elif name in names and not os.path.lexists(item):
            when = "itself" if name == step.name else f"{name}, which comes later (line {names[name].place.line})"
            raise value.place.error(f"{key.name} of {step.name} refers to {when}", hint="Steps run in their order.")
    return tuple(found)


def _check_there(items: Sequence[str], place: Place) -> None:
    """Raise RecipeError for a local file that is missing."""
    for written in items:
        item = place_of(written)
        if _LOCAL.fullmatch(item) and not os.path.lexists(os.path.expanduser(item)):  # noqa: PTH111
            hint = hint_beside(item, "Paths are relative to where you are.")
            raise place.error(f"no such file or directory: {item}", hint=hint)


# --- loops --------------------------------------------------------------------------------------------------------


def _bindings(loop: Loop, settings: Mapping[str, Value]) -> Iterator[tuple[dict[str, str], dict[str, Value]]]:
    """Yield, for each combination of a loop's values, these by their names, and all settings."""
    lists = [substituted(value, settings) for value in loop.settings.values()]
    for name, value in zip(loop.settings, lists, strict=True):
        if value.form != "list" or not value.items:
            raise value.place.error(f"{name} in with is no list of values")
    for items in itertools.product(*(value.items for value in lists)):
        bound = dict(zip(loop.settings, items, strict=True))
        values = {name: plain(item, loop.settings[name].place) for name, item in bound.items()}
        yield bound, {**settings, **values}


def _suffix(values: Iterable[str]) -> str:
    return "".join(f"-{re.sub(r'[^A-Za-z0-9_]+', '-', value).strip('-')}" for value in values)


def _renamed(
    steps: Sequence[Step],
    bound: Mapping[str, str],
    settings: Mapping[str, Value],
    known: Mapping[str, str],
    names: Mapping[str, Step],
    commands: Commands,
) -> Iterator[Job]:
    """Yield the jobs of one round of a loop with settings: "healed" becomes "healed-0", in references too."""
    others = _suffix(value for name, value in bound.items() if name != SEED)
    seen, own = dict(known), dict[str, str]()  # the steps of this round that have run, by their names in the recipe
    for step in steps:
        job = _job(step, settings, seen, names, commands).referring(lambda name: own.get(name, name))
        seen[step.name] = step.command
        own[step.name] = f"{step.name}{_suffix(bound.values())}"
        group = f"{step.name}{others}" if SEED in bound else ""
        yield replace(job, name=own[step.name], group=group)


def _rounds(
    loop: Loop, settings: Mapping[str, Value], known: Mapping[str, str], names: Mapping[str, Step], commands: Commands
) -> Rounds:
    """Return the jobs of a loop with a condition. Its steps may continue steps of the same names before it."""
    seen = dict(known)
    jobs = []
    for step in loop.steps:
        jobs.append(_job(step, settings, seen, names, commands))
        seen[step.name] = step.command
    for condition in loop.until:
        if condition.path[0] not in seen or len(condition.path) < 2:
            close = close_to(condition.path[0], seen)
            raise condition.place.error(
                f"until {condition}: {condition.path[0]} is no step before or in the loop{close}",
                hint='Such as judged.recovery: ">= 95"',
            )
    return Rounds(name=loop.name, jobs=tuple(jobs), until=loop.until, at_most=loop.at_most, place=loop.place)


# --- fusing -------------------------------------------------------------------------------------------------------


def grouped(jobs: Sequence[Job | Rounds], commands: Commands) -> Iterator[tuple[Job, ...] | Rounds]:
    """Yield what is carried out in turn: chains of jobs, and loops, through which no chain goes."""
    for is_loop, items in itertools.groupby(jobs, key=lambda item: isinstance(item, Rounds)):
        if is_loop:
            yield from (item for item in items if isinstance(item, Rounds))
        else:
            yield from chains([item for item in items if isinstance(item, Job)], jobs, commands)


def chains(jobs: Sequence[Job], everything: Sequence[Job | Rounds], commands: Commands) -> list[tuple[Job, ...]]:
    """Return the jobs in groups that are carried out together: neighbouring surgeries of which nobody else reads.

    A surgery ends a group where it has a condition or options for writing of its own, and begins one where it needs a
    model that is written.
    """
    read = _counts(everything)
    groups: list[list[Job]] = []
    for job in jobs:
        before = groups[-1][-1] if groups else None
        if before is not None and _fuses(before, job, read, commands):
            groups[-1].append(job)
        else:
            groups.append([job])
    return [tuple(group) for group in groups]


def _fuses(before: Job, job: Job, read: Mapping[str, int], commands: Commands) -> bool:
    if not (commands.is_surgery(before.command) and commands.is_surgery(job.command)):
        return False
    if not commands.continues(job.command) or before.require or job.references.get("model") != (before.name,):
        return False
    if "learn" in job.options:  # it trains on a model that is written
        return False
    is_plain = not {"dtype", "max-shard-size", "push-to-hub", "private", "verify", "plot", "curve"} & {*before.options}
    return is_plain and read[before.name] == 1 and set(job.reads) == {before.name}


def _counts(everything: Sequence[Job | Rounds]) -> Counter[str]:
    """Return how many options and conditions name each step; one in a loop counts twice, for it is read each round."""
    counts: Counter[str] = Counter()
    for item in everything:
        for job in jobs_of(item):
            counts += job.reads
            counts += job.reads if isinstance(item, Rounds) else Counter()
        if isinstance(item, Rounds):
            counts.update(condition.path[0] for condition in item.until)
    return counts
