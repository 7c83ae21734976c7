"""The verb `transplant`: give a model another tokenizer, with a row for each of its tokens."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.matching import Match, Vocabulary, match
from surgeon.checkpoint.source import Source, content_of, spec_of
from surgeon.checkpoint.tokenizer_files import TOKENIZER, parsed, read_tokenizer
from surgeon.errors import PlanError
from surgeon.mistyped import close_to
from surgeon.models.loading import runs
from surgeon.models.tokenizers import tokenizer_from
from surgeon.options import (
    Checked,
    OptionError,
    Verb,
    check_counts,
    in_python,
    option,
    reads_of,
    revision_option,
    takes,
)
from surgeon.plan.rows import RowsFile, open_rows, with_rows_of
from surgeon.surgery import Surgery, open_model, open_source
from surgeon.transforms.vocabulary import check_rows, exchange_tokens, vocabulary_dims, vocabulary_size
from surgeon.verbs.judging import JudgedOnText, Judging, judged_by
from surgeon.verbs.other_tokenizer import OtherTokenizer, files_with, open_tokenizer, roles_of, with_json
from surgeon.verbs.transplanting import RowMaker, embedding_of

VERB = Verb(plans="transplant", then="finetune {output} {data}")
METHODS = ("auto", "subword", "ridge", "omp", "clp", "mean")
HELPED = ("ridge", "omp", "clp")
COMPARED = "by which tokens are compared"


@dataclass(frozen=True, kw_only=True)
class TransplantOptions(JudgedOnText, Checked):
    """The options of `transplant`."""

    tokenizer: str | os.PathLike[str] | None = option(
        "The new tokenizer: of a checkpoint directory, a Hub id, or a directory with a tokenizer.json alone.",
        None,
        metavar="OTHER",
        reads=True,
        group="vocabulary",
    )
    like: str | os.PathLike[str] | None = option(
        "In its place a model whose tokenizer and exact number of rows the result gets: for speculative decoding.",
        None,
        metavar="TARGET",
        reads=True,
        group="vocabulary",
    )
    helper: str | os.PathLike[str] | None = option(
        "A model that has the new tokenizer, whose rows say what new tokens are like. Default: OTHER, where it is one.",
        None,
        metavar="MODEL",
        reads=True,
        group="vocabulary",
    )
    method: str = option(
        "Rows of tokens that the model does not have: ridge, omp or clp (by a helper), subword (the mean of the old "
        "pieces), mean; auto: ridge with a helper, else subword.",
        "auto",
        metavar="METHOD",
        choices=METHODS,
        group="vocabulary",
    )
    k: int = option("With --method omp: anchors that make up a row.", 16, metavar="K", group="vocabulary")
    map: Sequence[str] = option(
        "An old token whose row a new one gets: '<|im_start|>=<start_of_turn>'. Repeatable.",
        (),
        metavar="OLD=NEW",
        group="vocabulary",
    )
    pad_to: int | None = option(
        "Make the number of rows a multiple of N; rows without a token are the mean row.",
        None,
        metavar="N",
        group="vocabulary",
    )
    revision: str | None = revision_option()
    measure: bool = in_python("False: read headers and tokenizers only; new rows are then the mean row.", True)
    rows_from: str | os.PathLike[str] | None = in_python("A result of transplant whose rows are taken: a replay.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "k", "pad_to")
        if (self.tokenizer is None) == (self.like is None):
            fault = "is missing: it names the new one" if self.like is None else "and --like both name one"
            raise OptionError("tokenizer", f"--tokenizer {fault}", hint="Give --tokenizer OTHER, or --like TARGET.")
        if self.like is not None and self.pad_to is not None:
            raise OptionError("pad_to", "--like says how many rows there are", hint="Leave out --pad-to.")
        _ = self.pairs

    @property
    def pairs(self) -> dict[str, str]:
        """The old token of each new one that `map` names. Raises OptionError for text that is no pair."""
        found: dict[str, str] = {}
        for text in self.map:
            old, equals, new = text.partition("=")
            if not (old and equals and new) or "=" in new:
                raise OptionError("map", f"{text!r} is no pair of tokens", hint="Such as --map '<s>=<bos>'.")
            found[new] = old
        return found


@dataclass(frozen=True, kw_only=True, repr=False)
class Transplanting(Surgery):
    """A surgery that gives a model another tokenizer.

    `rows` counts those that each rule gave: the bytes of a token, its role, the `method`, and the mean of all rows.
    `vocabulary` are the rows before and after. `judging` measures bits per byte. With `measure=False` new rows are the
    mean row, until they are `computed`.

        surgery = surgeon.transplant("SmolLM2-135M", tokenizer="gemma-3-270m")
        print(surgery.rows, surgery.method)
    """

    rows: Mapping[str, int]
    vocabulary: tuple[int, int]
    method: str
    judging: Judging | None
    compute: "Callable[[], Transplanting] | None" = None

    def computed(self) -> "Transplanting":
        """Return the surgery with its new rows computed, where they were not yet."""
        return self if self.compute is None else self.compute()

    def told(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return how many rows each rule gave, as rows for people and as entries for JSON."""
        by = {"bytes": "of the same bytes", "role": "of the same role", "method": f"by {self.method}", "mean": "mean"}
        said = ", ".join(f"{count:,} {by[rule]}" for rule, count in self.rows.items())
        before, after = self.vocabulary
        entries = {
            "rows": dict(self.rows),
            "method": self.method,
            "vocabulary": {"before": before, "after": after},
        }
        return [("vocabulary", f"{before:,} → {after:,}  ({said})")], entries


@takes(TransplantOptions)
def transplant(model: "str | os.PathLike[str] | Surgery", options: TransplantOptions) -> Transplanting:
    """Return the surgery that gives `model` another tokenizer, with a row for each of its tokens.

    A token that spells the same bytes keeps its row, a special token that of its role. Rows of the others come by the
    `method`, from the old rows and those of a helper. Ids in every config follow.

    Raises PlanError for a tokenizer without a tokenizer.json, or a helper with another one; MeasureError for rows
    that cannot be computed.

        surgeon.transplant("SmolLM2-135M", tokenizer="gemma-3-270m", method="ridge").save("SmolLM2-in-gemma")
    """
    begun = open_model(model, revision=options.revision, reads=reads_of(options))
    anatomy = begun.anatomy
    size = vocabulary_size(anatomy)
    other = open_tokenizer(options.rows_from or options.tokenizer or options.like or "")
    with runs(begun.source.label):
        roles = roles_of(tokenizer_from(other.files, other.config))  # it is large, and let go at once
        tokenizer = tokenizer_from(begun.tokenizer_files, begun.spec.config)
    old = Vocabulary.of(read_tokenizer(begun.companion, COMPARED), roles_of(tokenizer))
    new = Vocabulary.of(read_tokenizer(other.files.get, COMPARED), roles)
    check_rows(max(old.ids.values()), size)
    found = match(old, new, _named(options, old, new))
    num_rows = _num_rows(options, other, new)
    helper = None if options.rows_from is not None else _helper(options, other)
    method = _method(options, helper, found)
    config, files, notes = files_with(begun, other, new, found)
    num_made = 0 if method == "mean" else len(found.missing)
    counts = {"bytes": len(found.by_bytes), "role": len(found.by_role), "method": num_made}
    counts["mean"] = num_rows - sum(counts.values())
    told = replace(anatomy, spec=replace(anatomy.spec, config=config))
    plan = exchange_tokens(told, [found.old.get(i, -1) for i in range(num_rows)])
    plan = replace(plan, steps=({"transplant": _step(options, method, helper, counts)},), notes=notes)
    maker = RowMaker(begun, method, helper, old, new, found, num_rows, tokenizer, options.k, options.device)

    def surgery(rows: RowsFile | None) -> Transplanting:
        step = {**plan.steps[0]["transplant"], **({} if rows is None else {"rows": rows.provenance()})}
        later = replace(plan, steps=({"transplant": step},))
        source, whole = begun.source, begun.plan
        if rows is None:
            whole = whole.then(later)
        else:
            source, whole = with_rows_of(source, whole, later, vocabulary_dims(anatomy), rows)
        waits = rows is None and not plan.moves_only
        return Transplanting(
            source=source,
            plan=whole,
            attachments={**begun.attachments, **files},
            begun_with=begun.begun_with,
            reads=begun.reads,
            also_read=tuple(vocabulary_dims(anatomy)) if waits and not begun.plan.steps else (),
            rows=counts,
            vocabulary=(size, num_rows),
            method=method,
            judging=None if rows is None and waits else judged_by(begun, options, tokenizer),
            compute=(lambda: surgery(maker.made())) if waits else None,
        )

    if options.rows_from is not None:
        return surgery(open_rows(Path(options.rows_from)))
    planned = surgery(None)
    return planned.computed() if options.measure else planned


def _step(options: TransplantOptions, method: str, helper: Source | None, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the entry of the receipt: how rows were found, and what they were computed from."""
    given = {name: getattr(options, name) for name in ("like", "tokenizer", "pad_to")}
    return {
        **{name: os.fspath(value) if name != "pad_to" else value for name, value in given.items() if value is not None},
        "method": method,
        **({"k": options.k} if method == "omp" else {}),
        **({"map": list(options.map)} if options.map else {}),
        **({"helper_of": helper.provenance()} if helper is not None and method in HELPED else {}),
        "counts": dict(counts),
    }


# --- the other vocabulary -----------------------------------------------------------------------------------------


def _named(options: TransplantOptions, old: Vocabulary, new: Vocabulary) -> dict[int, int]:
    """Return the pairs of a new and an old id that the user names. Raises OptionError for a token that is none."""
    for text, vocabulary, which in [(n, new, "new") for n in options.pairs] + [
        (o, old, "old") for o in options.pairs.values()
    ]:
        if text not in vocabulary.ids:
            close = close_to(text, list(vocabulary.special.values()))
            message = f"the {which} tokenizer has no token {text!r}{close}"
            raise OptionError("map", message, hint="--map OLD=NEW, each as its tokenizer.json writes it.")
    return {new.ids[name]: old.ids[of] for name, of in options.pairs.items()}


def _num_rows(options: TransplantOptions, other: OtherTokenizer, new: Vocabulary) -> int:
    """Return the number of rows of the result: those of the model that it is to be like, or as many as tokens."""
    needed = max(new.ids.values()) + 1
    if options.like is not None:
        if other.source is None:
            raise PlanError(f"{other.label} holds no model, so nobody knows how many rows there are to be",
                            hint="Give --tokenizer in place of --like.")  # fmt: skip
        rows = vocabulary_size(read_anatomy(spec_of(other.source)))
        if needed > rows:
            raise PlanError(f"{other.label} has rows for {rows} tokens, and its tokenizer {needed}",
                            hint="Choose another TARGET.")  # fmt: skip
        return rows
    wanted = options.pad_to or 1
    return -(-needed // wanted) * wanted


def _helper(options: TransplantOptions, other: OtherTokenizer) -> Source | None:
    """Return the model whose rows say what new tokens are like: the one that is named, else the new tokenizer's.

    Raises PlanError for one with another tokenizer.
    """
    if options.helper is None:
        return other.source if options.method in ("auto", *HELPED) else None
    helper = open_source(options.helper)
    files = {each: content_of(helper.fetch(each)) for each in helper.companions if each == TOKENIZER}
    held = Vocabulary(parsed(TOKENIZER, with_json(files, os.fspath(options.helper))[TOKENIZER]), {})
    if held.ids != Vocabulary(parsed(TOKENIZER, other.files[TOKENIZER]), {}).ids:
        raise PlanError(
            f"{helper.label} has other tokens than {other.label}, so its rows say nothing of them",
            hint="A helper has the new tokenizer: a small model of the same kin.",
        )
    return helper


def _method(options: TransplantOptions, helper: Source | None, found: Match) -> str:
    """Return the method. Raises OptionError for one that needs a helper, where there is none."""
    if options.method in HELPED and helper is None and options.rows_from is None:
        raise OptionError(
            "method",
            f"--method {options.method} needs the rows of a model that has the new tokenizer",
            hint="Give --helper MODEL, or --method subword.",
        )
    if options.method != "auto":
        return options.method
    if helper is None:
        return "subword"
    width = read_anatomy(spec_of(helper)).spec.tensors[embedding_of(helper)].shape[1]
    return "ridge" if len(found.by_bytes) >= 2 * width else "subword"  # a map of fewer anchors fits them all
