"""The verb `merge`: make one model of several. Experts of one model are merged by `prune`, in `verbs/merging.py`."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.derived import BASE, MODEL, JoinedSource
from surgeon.checkpoint.receipt import parents
from surgeon.checkpoint.source import Source
from surgeon.errors import PlanError
from surgeon.options import (
    Checked,
    OptionError,
    Verb,
    check_seed,
    in_python,
    option,
    reads_of,
    revision_option,
    seed_option,
    takes,
)
from surgeon.plan.expressions import Expr, Read
from surgeon.plan.plan import FLOAT_DTYPES, Plan, substitute
from surgeon.plan.rules import KINDS, Rule
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.alike import check_vocabularies
from surgeon.transforms.combine import MOST_PARENTS, Parent, Shares, combine, read_slices, stack_slices
from surgeon.transforms.portions import Portions, check_count, read_portions
from surgeon.verbs.mergekit import Recipe, read_recipe

if TYPE_CHECKING:
    from surgeon.measure.differences import Differences

VERB = Verb(plans="merge", then="evaluate {output} {data} --baseline {source}")
PASSTHROUGH = "passthrough"
REGMEAN = "regmean"
METHODS = (*KINDS, PASSTHROUGH, REGMEAN)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Checked):
    """The options of `merge`."""

    models: Sequence[str] = option(
        "The other models, each a checkpoint directory or a Hub id; id@REVISION for a branch, tag or commit.",
        (),
        metavar="MODELS",
        reads=True,
        is_argument=True,
    )
    method: str = option(
        "How: linear (a mean), task-arithmetic, ties, dare, dare-ties, slerp, nuslerp, model-stock, karcher, "
        "passthrough (layers of several models), or regmean (solved on texts).",
        "linear",
        metavar="METHOD",
        choices=METHODS,
        group="merging",
    )
    base: str | os.PathLike[str] | None = option(
        "The model that all were finetuned from: what is merged are the differences from it.",
        None,
        metavar="MODEL",
        reads=True,
        group="merging",
    )
    weights: Sequence[str | float] = option(
        "A number for each model: 0.3,0.7; from the first layer to the last: 0:1,1:0; for a part: mlp=0.3,0.7. "
        "Default: equal.",
        (),
        metavar="NUMBERS",
        group="merging",
    )
    t: str | None = option(
        "Of two models, the part of the second: 0.3, or 0:1 from the first layer to the last. In place of --weights.",
        None,
        metavar="NUMBER",
        group="merging",
    )
    density: Sequence[str | float] = option(
        "The part of each difference that stays in ties and dare: 0.5, or a number for each model. Default: 0.5.",
        (),
        metavar="NUMBERS",
        group="merging",
    )
    scale: float = option(
        "Multiply what is added to the base by this (mergekit's lambda).", 1.0, metavar="F", group="merging"
    )
    normalize: bool | None = option(
        "Divide the weights by their sum. Default: as the method has it.", None, group="merging"
    )
    slices: str | None = option(
        "Layers of passthrough in their order: A:0-11,B:8-23, with A for the first model.",
        None,
        metavar="LAYERS",
        group="merging",
    )
    data: Sequence[str] = option(
        "Of regmean, for each model in their order: its text, a grams.safetensors in its place, or none.",
        (),
        metavar="DATA",
        reads=True,
        group="regression",
    )
    alpha: float = option(
        "Multiply the off-diagonal numbers of the Gram matrices by this, from 0 to 1.",
        0.9,
        metavar="F",
        group="regression",
    )
    sequential: bool = option(
        "Measure each layer behind the layers that are merged already (RegMean++).", False, group="regression"
    )
    samples: int = option("Number of sequences taken from each text.", 32, metavar="N", group="regression")
    sequence_length: int = option("Tokens per sequence.", 256, metavar="T", group="regression")
    from_file: str | os.PathLike[str] | None = option(
        "Do what this recipe of mergekit says, in place of models and options.",
        None,
        names=("--from",),
        metavar="FILE",
        reads=True,
        group="merging",
    )
    seed: int = seed_option()
    revision: str | None = revision_option()
    stored_as: str | None = in_python("A dtype for the result, where --dtype keeps it: a recipe's.")
    measure: bool = in_python("Read samples of the weights: how far the models are from the base.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        self._check_method()
        for density in read_portions(self.density, "density"):
            if any(not 0 < number <= 1 for line in density.lines if line for number in line):
                raise OptionError("density", "a density lies above 0, up to 1", hint="Such as --density 0.5")
        read_portions(self.weights, "weights")

    def _check_method(self) -> None:
        """Raises OptionError for an option that the method has no use for, or needs."""
        kind, method = KINDS.get("linear" if self.method == REGMEAN else self.method), self.method
        if bool(self.data) != (method == REGMEAN) or (self.sequential and method != REGMEAN):
            hint = f"Such as --method {REGMEAN} --data a.txt --data b.txt"
            raise OptionError("data", f"--data and --method {REGMEAN} belong together", hint=hint)
        if not 0 <= self.alpha <= 1:
            raise OptionError("alpha", f"--alpha is {self.alpha}; it lies between 0 and 1", hint="Such as --alpha 0.9")
        if (self.slices is not None) != (method == PASSTHROUGH):
            hint = "Such as --method passthrough --slices A:0-11,B:8-23"
            raise OptionError("slices", f"--slices and --method {PASSTHROUGH} belong together", hint=hint)
        unused = {
            "base": self.base is not None and not (kind and (kind.of_differences or kind.may_have_base)),
            "weights": bool(self.weights or self.t) and not (kind and kind.has_weights),
            "density": bool(self.density) and not (kind and kind.thins),
            "scale": self.scale != 1 and not (kind and kind.of_differences),
            "normalize": self.normalize is not None and not (kind and kind.has_weights),
        }
        if name := next((name for name, is_unused in unused.items() if is_unused), None):
            raise OptionError(name, f"--{name} has no effect with --method {method}", hint="Leave it out.")
        if kind and kind.of_differences and self.base is None:
            hint = "Name the model that all were finetuned from: --base MODEL"
            raise OptionError("base", f"--method {method} needs --base: it merges differences from it", hint=hint)
        if self.t is not None and (self.weights or "," in self.t):
            raise OptionError("t", "--t is one number, in place of --weights", hint="Such as --t 0.3")


@takes(MergeOptions)
def merge(model: "str | os.PathLike[str] | Surgery | None", options: MergeOptions) -> Surgery:
    """Return the surgery that makes one model of `model` and `models`. The first gives the config and all other files.

    The models are of one architecture with the same ids for the same tokens. Each number is computed in float32 or
    wider and rounded once to the first model's dtype.

    With `from_file`, and None for the model, a recipe of mergekit says all of it.

    Raises PlanError for models that cannot be merged, and for a base that is none of theirs.

        surgeon.merge("finetune-a", models=["finetune-b"], weights=[0.3, 0.7]).save("merged")
    """
    recipe, reads = None, reads_of(options)
    if options.from_file is not None:
        recipe = _recipe(model, options, options.from_file)
        options = replace(options, from_file=None, **recipe.options)
        model, reads = recipe.model, {**reads, **reads_of(options)}
    if model is None:
        raise OptionError("model", "MODEL is missing: the first model", hint=_EXAMPLE)
    begun = open_model(model, revision=options.revision, reads=reads)
    if parents(begun.source):
        raise PlanError("this surgery merges models already", hint="Save it, and merge what was saved.")
    others = [open_parent(each) for each in options.models]
    _check_number(options, 1 + len(others))
    base = None if options.base is None else open_parent(options.base)
    notes = _checked_vocabularies(begun, [*others, *(() if base is None else (base,))])
    joined = begun.source
    read: list[Parent] = [_first(begun)]
    words = [f"{MODEL}-{number}" for number in range(2, len(others) + 2)] + ([] if base is None else [BASE])
    for word, each in zip(words, [*others, *(() if base is None else (base,))], strict=True):
        joined = JoinedSource(joined, each.source, word)
        read.append(_parent(each, joined.prefix))
    plan = _planned(read[: 1 + len(others)], None if base is None else read[-1], options)
    step = _step(options, others, base)
    if base is not None and options.measure and not begun.plan.steps:
        found = _differences(joined, read)
        notes += found.notes(base.source.label)
        step["differences"] = found.to_dict()
    if options.method == REGMEAN:
        begun.check_saved()
        joined, plan, more = _regressed(joined, plan, read, [begun.source, *(each.source for each in others)], options)
        step |= more
    plan = replace(plan, steps=({"merge": step},), notes=(*plan.notes, *notes))
    if recipe is not None:
        plan = replace(plan, notes=(*plan.notes, *recipe.notes))
    if options.stored_as is not None:
        plan = plan.cast(options.stored_as)
    offered: dict[str, Expr] = {name: Read(name) for name in joined.tensors if name not in begun.source.tensors}
    passed = replace(begun.plan, tensors={**begun.plan.tensors, **offered})
    return replace(begun, source=joined, plan=passed.then(plan))


def _regressed(
    joined: Source, plan: Plan, parents_: Sequence[Parent], sources: Sequence[Source], options: MergeOptions
) -> tuple[Source, Plan, dict[str, Any]]:
    """Return the source, the plan and the receipt's entries of RegMean; without measuring, the plan of the mean."""
    from surgeon.verbs.regression import Texts, check_texts, regressed

    check_texts(options.data, len(sources))
    if not options.measure:
        note = "the linear maps are solved when the texts are read; the Gram matrices are written beside the weights"
        return joined, replace(plan, notes=(*plan.notes, note)), {}
    texts = Texts(
        data=options.data,
        samples=options.samples,
        sequence_length=options.sequence_length,
        sequential=options.sequential,
        alpha=options.alpha,
    )
    return regressed(joined, plan, parents_, sources, texts)


def _differences(joined: Source, read: Sequence[Parent]) -> "Differences":
    """Return how far the models are from the base, the last of those that were read, in samples of their tensors."""
    from surgeon.measure.differences import differences

    names = [
        name
        for name, spec in read[0].anatomy.spec.tensors.items()
        if spec.dtype in FLOAT_DTYPES and all(isinstance(each.tensors[name], Read) for each in read)
    ]
    labels = [each.label for each in read]
    named = [label if labels.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(labels, 1)]
    tensors = [[expr.name for name in names if isinstance(expr := each.tensors[name], Read)] for each in read]
    models = dict(zip(named[:-1], tensors[:-1], strict=True))
    return differences(joined, models, (named[-1], tensors[-1]))


def told(surgery: Surgery) -> dict[str, Any]:
    """Return what a merge is, for JSON: its models as they were named, the method, and what decided each number."""
    step = next(step["merge"] for step in surgery.plan.steps if "merge" in step)
    labels = [each.label for each in parents(surgery.source)]
    has_base = "base" in step
    entries = {"method": step["method"], "models": labels[: len(labels) - has_base], "weights": step.get("weights", [])}
    entries |= {"base": labels[-1]} if has_base else {}
    return entries | {
        key: step[key] for key in ("slices", "differences", "alpha", "sequential", "grams") if key in step
    }


def _recipe(model: object, options: MergeOptions, path: str | os.PathLike[str]) -> Recipe:
    """Return what a recipe says, where nothing else says the same. Raises OptionError."""
    plain = MergeOptions()
    said = ("models", "method", "base", "weights", "t", "density", "scale", "normalize", "slices")
    given = next((name for name in said if getattr(options, name) not in (getattr(plain, name), [])), None)
    if model is not None or given is not None:
        name = "MODEL" if given is None else f"--{given}"
        raise OptionError("from_file", f"--from says all of it, and {name} too", hint="Leave one of them out.")
    return read_recipe(path)


def open_parent(name: str | os.PathLike[str]) -> Surgery:
    """Return a model that is merged, opened: a directory, a Hub id, or one with @ and a revision."""
    text = os.fspath(name)
    place, at, revision = text.rpartition("@")
    if at and not os.path.lexists(text):
        return open_model(place, revision=revision)
    return open_model(text)


def _check_number(options: MergeOptions, count: int) -> None:
    least, most = KINDS[options.method].models if options.method in KINDS else (1, MOST_PARENTS)
    least = max(least, 1 if options.base is not None or options.method in (PASSTHROUGH, REGMEAN) else 2)
    if not least <= count <= most:
        wanted = f"{least}" if least == most else f"{least} or more" if count < least else f"at most {most}"
        raise OptionError("models", f"--method {options.method} merges {wanted} models, not {count}", hint=_EXAMPLE)


_EXAMPLE = "Such as: surgeon merge A B -o merged"


def _planned(models: Sequence[Parent], base: Parent | None, options: MergeOptions) -> Plan:
    if options.slices is not None:
        return stack_slices(models, read_slices(options.slices, [each.label for each in models]))
    name = "linear" if options.method == REGMEAN else options.method
    kind, count, anatomy = KINDS[name], len(models), models[0].anatomy
    normalize = kind.normalize if options.normalize is None else options.normalize
    rule = Rule(name=name, normalize=normalize, scale=options.scale, seed=options.seed)

    def portions(texts: Sequence[str | float], name: str, default: float) -> Portions:
        lines = check_count(read_portions(texts, name), count, name)
        return Portions(lines, anatomy, count=count, default=default, option=name)

    weights = portions(weights_of(options, count), "weights", 1.0 if normalize else 1 / count)
    return combine(models, base, rule, Shares(weights, portions(options.density, "density", DENSITY)))


DENSITY = 0.5  # of what stays where nothing is said: the largest half, or a random half


def weights_of(options: MergeOptions, count: int) -> Sequence[str | float]:
    """Return the texts of the weights: those of --t are of the first model what it leaves."""
    if options.t is None:
        return options.weights
    if count != 2:
        raise OptionError("t", f"--t is of two models, not of {count}", hint="Give --weights.")
    (portion,) = read_portions([options.t], "t")
    line = portion.lines[0] or (0.5,)
    texts = (":".join(repr(number) for number in each) for each in ([1 - number for number in line], line))
    return [",".join(texts)]


def _first(begun: Surgery) -> Parent:
    """Return the model that a merge begins with, which may be planned and not yet written."""
    done = json.dumps(list(begun.plan.steps), sort_keys=True, default=str) if begun.plan.steps else ""
    tensors: dict[str, Expr] = {name: Read(name) for name in begun.plan.tensors}
    return Parent(begun.source.label, begun.anatomy, tensors, identity_of(begun.source) + done)


def _parent(opened: Surgery, prefix: str) -> Parent:
    tensors = {name: substitute(expr, lambda read: Read(prefix + read)) for name, expr in opened.plan.tensors.items()}
    return Parent(opened.source.label, opened.anatomy, tensors, identity_of(opened.source))


def identity_of(source: Source) -> str:
    """Return what identifies the weights of a source, wherever they lie: their fingerprint, or an id and a commit."""
    known = source.provenance()
    return str(known["fingerprint"]) if "fingerprint" in known else f"{known.get('id')}@{known.get('commit')}"


def _checked_vocabularies(begun: Surgery, others: Iterable[Surgery]) -> list[str]:
    notes = (
        check_vocabularies((begun.source.label, begun.companion), (other.source.label, other.companion))
        for other in others
    )
    return list(dict.fromkeys(note for note in notes if note is not None))


def _step(options: MergeOptions, others: Sequence[Surgery], base: Surgery | None) -> dict[str, Any]:
    """Return the step of a receipt: what decided the result, with the models as they can be found again."""
    step: dict[str, Any] = {"models": [_place(each.source) for each in others], "method": options.method}
    kind = KINDS.get("linear" if options.method == REGMEAN else options.method)
    if base is not None:
        step |= {"base": _place(base.source)}
    if options.stored_as is not None:
        step |= {"stored_as": options.stored_as}
    if kind is None:
        return step | {"slices": options.slices}
    if kind.has_weights:
        step |= {"weights": list(weights_of(options, 1 + len(others))), "normalize": options.normalize}
    if kind.thins:
        step |= {"density": list(options.density)}
    if kind.of_differences:
        step |= {"scale": options.scale}
    return step | ({"seed": options.seed} if kind.drops else {})


def _place(source: Source) -> str:
    """Return the words by which a model is opened again from anywhere: its resolved path, or its id and commit."""
    known = source.provenance()
    return f"{known['id']}@{known['commit']}" if "id" in known else str(Path(known["path"]))
