"""The verb `trim`: keep the tokens that a text uses, in the weights, the tokenizer and every file that names an id."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.token_ids import followed, token_ids
from surgeon.checkpoint.token_bytes import special_tokens, token_bytes
from surgeon.checkpoint.tokenizer_files import GENERATION, TOKENIZER_CONFIG, parsed, read_tokenizer, vocabulary, written
from surgeon.checkpoint.trimmed_tokenizer import STALE, always_kept, check_can_trim, parts_of, trimmed
from surgeon.data.documents import check_there
from surgeon.data.rows import encode, templated
from surgeon.data.usage import RoundTrip, Usage, round_trip, texts_of, usage
from surgeon.errors import DataError, PlanError
from surgeon.mistyped import close_to
from surgeon.models.loading import runs
from surgeon.models.tokenizers import tokenizer_from
from surgeon.options import (
    Checked,
    OptionError,
    Verb,
    check_counts,
    columns_option,
    in_python,
    layer_numbers,
    option,
    reads_of,
    revision_option,
    takes,
)
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.vocabulary import check_rows, select_tokens, vocabulary_size
from surgeon.verbs.judging import JudgedOnText, Judging, judged_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERB = Verb(plans="trim", then="evaluate {output} {data}")
COMPARED = 4_000_000  # characters that are written with the old and with the new tokenizer
REASONS = {
    "text": "used by the text",
    "parts": "parts of those",
    "special": "special or of the chat template",
    "alphabet": "bytes or letters",
}


@dataclass(frozen=True, kw_only=True)
class TrimOptions(JudgedOnText, Checked):
    """The options of `trim`."""

    data: Sequence[str] = option(
        "Text whose tokens stay: .txt, .jsonl, .csv, .parquet, Hub dataset ... Repeatable.",
        (),
        metavar="DATA",
        reads=True,
        group="text",
    )
    columns: str | None = columns_option("text")
    keep_top: int | None = option(
        "Keep the N tokens that the text uses most, and what those are made of. Default: all that it uses.",
        None,
        metavar="N",
        group="what is kept",
    )
    coverage: str | float | None = option(
        "Keep the fewest tokens that make up this share of the text: 99.99%.",
        None,
        metavar="S",
        group="what is kept",
    )
    keep_token: Sequence[str] = option(
        "A token that stays whatever the text, as the tokenizer writes it. Repeatable.",
        (),
        metavar="TEXT",
        group="what is kept",
    )
    pad_to: int | None = option(
        "Make the number of rows a multiple of N; rows without a token are the mean row.",
        None,
        metavar="N",
        group="what is kept",
    )
    revision: str | None = revision_option()
    kept: str | None = in_python('The ids that stay, "0-276,280": what a receipt says; no text is read.')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "keep_top", "pad_to")
        if not self.data and self.kept is None:
            raise OptionError("data", "--data is missing: it says which tokens stay", hint="Such as --data text.txt.")
        if self.keep_top is not None and self.coverage is not None:
            hint = "Give --keep-top or --coverage."
            raise OptionError("coverage", "--keep-top and --coverage both say how many tokens stay", hint=hint)
        if self.coverage is not None:
            _ = self.share

    @property
    def share(self) -> float:
        """The share of the text's tokens that `coverage` says, 0 to 1. Raises OptionError for what is none."""
        word = str(self.coverage).strip()
        try:
            share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise OptionError("coverage", f"{word!r} is no share of a text", hint="Such as --coverage 99.99%.")
        return share


@dataclass(frozen=True, kw_only=True, repr=False)
class Trimming(Surgery):
    """A surgery that keeps some tokens.

    `tokens` counts those that stay by the reason, `rows` are those of the model before and after, `trip` says how the
    text that judges is written now, None where no text was read. `judging` measures bits per byte.

        trimming = surgeon.trim("SmolLM2-135M", data=["text.txt"], coverage="99.99%")
        print(trimming.tokens, trimming.rows, trimming.trip)
    """

    tokens: Mapping[str, int]
    rows: tuple[int, int]
    trip: RoundTrip | None
    judging: Judging | None

    def told(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what stays, and how the text is written, as rows for people and as entries for JSON."""
        reasons = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in self.tokens.items())
        before, after = (sum(spec.nbytes for spec in each.tensors.values()) for each in (self.before.spec, self.spec))
        rows = [
            ("vocabulary", f"{self.rows[0]:,} → {self.rows[1]:,}  ({reasons})"),
            ("saves", f"{text.size(before - after)} of {text.size(before)}"),
        ]
        entries: dict[str, Any] = {
            "vocabulary": {"before": self.rows[0], "after": self.rows[1]},
            "tokens": dict(self.tokens),
            "bytes_saved": before - after,
        }
        if (trip := self.trip) is not None:
            share = 100 * trip.nbytes / max(1, trip.of_bytes)
            said = (
                f"{trip.missing:,} of {trip.tokens[0]:,} tokens fall back to smaller ones, {share:.3g} % of the bytes"
            )
            rows.append(("round trip", f"{said}; {trip.changed:,} of {trip.pieces:,} pieces of text changed"))
            entries["round_trip"] = trip.to_dict()
        return rows, entries


@takes(TrimOptions)
def trim(model: "str | os.PathLike[str] | Surgery", options: TrimOptions) -> Trimming:
    """Return the surgery that keeps only the tokens that a text uses: logits of the kept ones are what they were.

    The tokenizer is written anew, so that a text of which all tokens are kept has the same tokens. Beside those stay
    what they are made of, special tokens, and bytes or characters, by which any other text is spelled. Ids in every
    config follow.

    Raises PlanError for a tokenizer that cannot be trimmed, DataError for a text that cannot be read.

        surgeon.trim("SmolLM2-135M", data=["english.txt"], keep_top=20_000).save("SmolLM2-english")
    """
    begun = open_model(model, revision=options.revision, reads=reads_of(options))
    tokenizer = read_tokenizer(begun.companion, "the only form of tokenizer that surgeon trims")
    check_can_trim(tokenizer)
    check_there([*options.data, *options.eval_data])
    rows = vocabulary_size(begun.anatomy)
    known = vocabulary(tokenizer)
    check_rows(max(known.values()), rows)
    loaded, used = None, None
    if options.kept is None:
        with runs(begun.source.label):
            loaded = tokenizer_from(begun.tokenizer_files, begun.spec.config)
        used = usage(options.data, loaded, columns=options.columns)
    reasons = _reasons(begun, tokenizer, options, used, loaded)
    kept = sorted(set().union(*reasons.values()))
    files, config, notes = _files(begun, tokenizer, kept)
    wanted = options.pad_to or 1
    plan = select_tokens(replace(begun.anatomy, spec=replace(begun.anatomy.spec, config=config)), kept,
                         rows=-(-len(kept) // wanted) * wanted)  # fmt: skip
    counts = {reason: len(ids) for reason, ids in reasons.items()}
    step = {
        "keep_top": options.keep_top,
        "coverage": options.coverage,
        "pad_to": options.pad_to,
        "texts": [] if used is None else list(used.source),
        "tokens": counts,
        "kept": text.layers(kept),
    }
    trip = None
    if loaded is not None:
        trip = _written_again(begun, tokenizer, files, config, loaded, kept, options)
    return Trimming(
        source=begun.source,
        plan=begun.plan.then(replace(plan, steps=({"trim": step},), notes=notes)),
        attachments={**begun.attachments, **files},
        begun_with=begun.begun_with,
        reads=begun.reads,
        tokens=counts,
        rows=(rows, len(plan.axes["vocab"])),
        trip=trip,
        judging=judged_by(begun, options, loaded),
    )


# --- which tokens stay --------------------------------------------------------------------------------------------


def _reasons(
    begun: Surgery,
    tokenizer: Mapping[str, Any],
    options: TrimOptions,
    used: Usage | None,
    loaded: "PreTrainedTokenizerBase | None",
) -> dict[str, set[int]]:
    """Return the tokens that stay, each by the first reason for which it does."""
    known = set(vocabulary(tokenizer).values())
    if used is None or loaded is None:
        kept = set(layer_numbers(options.kept or ""))
        if not kept <= known:
            raise PlanError(f"the tokenizer has no token {min(kept - known)}", hint="The receipt is of another model.")
        return {"text": kept}
    reasons = always_kept(tokenizer, begun.companion, _template(begun))
    configs = [begun.spec.config, _generation(begun)]
    reasons["special"] |= {i for config in configs for _, i in token_ids(config) if i in known}
    reasons["special"] |= (set(loaded.all_special_ids) | _of_chats(loaded)) & known  # a class names some by itself
    reasons["special"] |= _named(tokenizer, options.keep_token)
    reasons["alphabet"] -= reasons["special"]
    chosen = _chosen(used, options)
    parts = parts_of(tokenizer, chosen | reasons["special"])
    others = reasons["special"] | reasons["alphabet"]
    return {"text": chosen - others, "parts": parts - others - chosen, **reasons}


def _chosen(used: Usage, options: TrimOptions) -> set[int]:
    """Return the tokens of the text that stay because it uses them."""
    ordered = used.most_used
    if options.keep_top is not None:
        return set(ordered[: options.keep_top])
    if options.coverage is None:
        return set(ordered)
    chosen, needed = set(), options.share * int(used.counts.sum())
    for token in ordered:
        if needed <= 0:
            break
        chosen.add(token)
        needed -= int(used.counts[token])
    return chosen


def _named(tokenizer: Mapping[str, Any], tokens: Collection[str]) -> set[int]:
    """Return the ids of tokens that the user names. Raises OptionError for one that there is not."""
    known = vocabulary(tokenizer)
    for token in tokens:
        if token not in known:
            close = close_to(token, list(special_tokens(tokenizer).values()))
            raise OptionError("keep_token", f"the tokenizer has no token {token!r}{close}", hint="See tokenizer.json.")
    return {known[token] for token in tokens}


def _template(begun: Surgery) -> str:
    """Return the chat templates of a model as one text: a token that they write stays."""
    files = begun.tokenizer_files
    config = parsed(TOKENIZER_CONFIG, files[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in files else {}
    written_in = [content.decode("utf-8", "replace") for name, content in files.items() if "template" in name]
    return "\n".join([str(config.get("chat_template") or ""), *written_in])


def _of_chats(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens of what the chat template writes around what is said: names of roles, a system prompt."""
    if tokenizer.chat_template is None:
        return set()
    said = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]
    found: set[int] = set()
    for chat in (said, [{"role": "system", "content": "."}, *said]):
        for answer in (False, True):
            with suppress(DataError):  # a template need not take every chat
                found |= set(encode(templated(chat, tokenizer, "a chat", answer=answer), tokenizer))
    return found


# --- the files ----------------------------------------------------------------------------------------------------


def _generation(begun: Surgery) -> dict[str, Any]:
    content = begun.companion(GENERATION)
    return {} if content is None else parsed(GENERATION, content)


def _files(
    begun: Surgery, tokenizer: Mapping[str, Any], kept: Sequence[int]
) -> tuple[dict[str, bytes | None], dict[str, Any], tuple[str, ...]]:
    """Return the files that name tokens, the config, and notes: all with the new ids of the tokens that stay."""
    numbers, known, lost = {old: new for new, old in enumerate(kept)}, set(vocabulary(tokenizer).values()), []  # type: ignore[var-annotated]

    def new_id(old: int) -> int | None:
        return numbers.get(old) if old in known else old  # what is no token, such as -1, stays

    config = followed(begun.spec.config, new_id, lost)
    files = trimmed(begun.companion, tokenizer, kept)
    if generation := _generation(begun):
        files[GENERATION] = written(GENERATION, followed(generation, new_id, lost))
    stale = [name for name in begun.tokenizer_files if name.endswith(STALE)]
    files |= dict.fromkeys(stale)
    gone = [name for name, content in files.items() if content is None]
    notes = [f"left out, as it names tokens that are no more: {name}" for name in gone]
    notes += [f"{key} named tokens that are no more, and leaves them out" for key in lost]
    return files, config, tuple(notes)


def _written_again(
    begun: Surgery,
    tokenizer: Mapping[str, Any],
    files: Mapping[str, bytes | None],
    config: Mapping[str, Any],
    before: "PreTrainedTokenizerBase",
    kept: Sequence[int],
    options: TrimOptions,
) -> RoundTrip:
    """Return how the text that judges is written by the trimmed tokenizer.

    Raises PlanError where transformers does not give the kept tokens their new numbers.
    """
    whole = {**begun.tokenizer_files, **files}
    after = tokenizer_from({name: content for name, content in whole.items() if content is not None}, config)
    numbers = {old: new for new, old in enumerate(kept)}
    known = vocabulary(tokenizer)
    expected = {token: numbers[old] for token, old in known.items() if old in numbers}
    found = {token: i for token, i in after.get_vocab().items() if token in known}  # a class may add tokens of its own
    if found != expected:
        wrong = sorted(token for token in {*found, *expected} if found.get(token) != expected.get(token))
        raise PlanError(
            f"transformers would give {len(wrong)} tokens of the trimmed tokenizer other numbers, such as {wrong[0]!r}",
            hint="Its class builds the vocabulary its own way; the tokenizer cannot be trimmed.",
        )
    spelled = token_bytes(tokenizer)
    unknown = before.unk_token_id

    def size_of(token: int) -> int | None:
        return None if token == unknown else len(spelled.get(token, b"  "))

    judged = options.eval_data or options.data
    texts = list(texts_of(judged, before, most=COMPARED, columns=options.columns))
    return round_trip(texts, before, after, numbers, size_of)
