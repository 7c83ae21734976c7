"""Records with gists: a prompt, its gist, and the rest, in the same tokens as when compressing and generating.

The compressed prompt is the first field of a record (its instruction, prompt or question), or the system turn of a
chat; the gist comes directly after it. `surgeon compress` tokenises prompt and gist, and `surgeon generate` the rest,
each without the other, so here every record is cut at the same place.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from surgeon.data.documents import Reading
from surgeon.data.records import ANSWER_HINT, Document
from surgeon.data.rows import begin_of_text, encode, templated
from surgeon.errors import DataError
from surgeon.gist.tokens import GistTokens
from surgeon.train.examples import Example, Segment, Tokenise, chat_segments, end_of_text, extend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORMS_HINT = (
    "A record has instruction and output; or prompt and completion; or question and answer; "
    "or messages that begin with the system's."
)


@dataclass(frozen=True, slots=True)
class Gists:
    """Which gist tokens records get, and how many: one of `counts`, drawn by `seed` and the record's number.

    With `encoder` an encoder reads the record up to the answer, and the end-of-text token after that part.
    """

    tokens: GistTokens
    counts: tuple[int, ...]
    seed: int = 0
    encoder: bool = False

    def __post_init__(self) -> None:
        """Raise PlanError for a number of tokens that a gist of this model cannot have."""
        for count in self.counts:
            self.tokens.ids_of(count)

    @property
    def fingerprint(self) -> str:
        """A string that decides the tokens of a record, equal for equal gists only."""
        return f"{self.tokens.ids} {self.counts} {self.seed if len(self.counts) > 1 else 0} {self.encoder}"

    def count(self, number: int) -> int:
        """Return how many gist tokens the record with this number has. The same in every epoch and after a resume."""
        if len(self.counts) == 1:
            return self.counts[0]
        return self.counts[int(np.random.default_rng((self.seed, number)).integers(len(self.counts)))]


class GistParts(NamedTuple):
    """A record as text: the compressed prompt, the text between its gist and the answer, and the rest.

    `rest` is the answer, or of a chat the answers and the turns between them. `is_chat`: the chat template writes the
    tokens that begin and end a text.
    """

    prompt: str
    text: str
    rest: tuple[Segment, ...]
    is_chat: bool


def gist_parts(document: Document, tokenizer: "PreTrainedTokenizerBase") -> GistParts:
    """Return the parts of a record before and after its gist.

    Raises DataError for a record without a prompt or an answer, and for a chat whose template does not write the system
    turn separately.
    """
    parts = _parts_of_chat(document, tokenizer) if document.messages else _parts_of_fields(document)
    fault = "no prompt" if not parts.prompt.strip() else "nothing between its prompt and the answer"
    if not parts.prompt.strip() or not parts.text:
        raise DataError(f"{document.where} has {fault}; the gist stands there", hint=FORMS_HINT)
    return parts


def gist_examples(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    gists: Gists,
    *,
    first: int = 0,
    length: int | None = None,
) -> list[Example]:
    """Return the example of each document, of which the first one has the number `first`; answers are trained.

    An example longer than `length` loses tokens of its prompt, from the left, and then of its answer: never its gist.
    Raises DataError as `gist_parts` does, and for a record with gist tokens.
    """
    numbers = [gists.count(first + index) for index in range(len(documents))]
    records = [gist_parts(document, tokenizer) for document in documents]
    tokens = _tokens(records, numbers, tokenizer, gists.tokens)
    begin = [] if gists.encoder else begin_of_text(tokenizer)
    examples = []
    for document, record, count in zip(documents, records, numbers, strict=True):
        prompt, text = next(tokens), next(tokens)
        example = Example(array("I"), bytearray(), is_text=False)
        extend(example, text, False)
        extend(example, end_of_text(tokenizer, document) if gists.encoder else [], False)
        for segment in record.rest:
            extend(example, next(tokens), segment.trained)
        extend(example, end_of_text(tokenizer, document), True)
        gist = prompt[-count:]
        if gist != gists.tokens.ids_of(count) or {*prompt[:-count], *example.ids} & {*gists.tokens.ids}:
            name = gists.tokens.tokens[0]
            hint = "Write records without gist tokens; they are added after the prompt."
            raise DataError(f"{document.where} contains {name}, or the tokenizer does not know it", hint=hint)
        examples.append(_whole([] if record.is_chat else begin, prompt[:-count], gist, example, length))
    return examples


def _parts_of_fields(document: Document) -> GistParts:
    """Return the prompt of `surgeon evaluate`, its fields each followed by a newline, cut after the first field."""
    if len(document.parts) < 2:
        raise DataError(f"{document.where} is a text: there is no prompt to compress", hint=FORMS_HINT)
    prompt, *between, answer = document.parts
    return GistParts(prompt, "\n" + "".join(f"{part}\n" for part in between), (Segment(answer, True),), False)


def _parts_of_chat(document: Document, tokenizer: "PreTrainedTokenizerBase") -> GistParts:
    system = document.messages[0]
    if system["role"] != "system":
        raise DataError(
            f"{document.where}: the first message is of {system['role']!r}, so there is no system turn to compress",
            hint="Put the prompt that is to be compressed first, with the role 'system'.",
        )
    head = templated([system], tokenizer, document.where, tools=document.tools)
    opening, *rest = chat_segments(document, tokenizer)
    if opening.trained or not opening.text.startswith(head):
        raise DataError(
            f"{document.where}: the chat template does not write the system turn by itself, so no gist can stand "
            "after it",
            hint="Write the record with instruction, input and output.",
        )
    prompt = head if system["content"].strip() else ""
    return GistParts(prompt, opening.text[len(head) :], tuple(rest), True)


def _tokens(
    records: Sequence[GistParts], counts: Sequence[int], tokenizer: "PreTrainedTokenizerBase", gist: GistTokens
) -> Iterator[list[int]]:
    """Yield the ids of each record: of prompt and gist, of the text after it, and of each segment of the rest."""
    lead = gist.tokens[-1]
    lead_ids = encode(lead, tokenizer)
    before = [record.prompt + gist.text(count) for record, count in zip(records, counts, strict=True)]
    whole = [(text, False) for record, text in zip(records, before, strict=True) for text in (text, lead + record.text)]
    tokenise = Tokenise(tokenizer)
    ends, goes_on = tokenise(whole), tokenise([(part.text, True) for record in records for part in record.rest])
    for record in records:
        yield next(ends)
        yield next(ends)[len(lead_ids) :]
        yield from chain(next(goes_on) for _ in record.rest)


def _whole(
    begin: Sequence[int], prompt: Sequence[int], gist: Sequence[int], after: Example, length: int | None
) -> Example:
    """Return the example, cut to `length` tokens."""
    excess = 0 if length is None else len(begin) + len(prompt) + len(gist) + len(after.ids) - length
    lost = max(0, min(excess, len(prompt) - 1))  # one token stays, so that there is a prompt
    made = Example(array("I"), bytearray(), is_text=False, is_cut=excess > 0)
    extend(made, [*begin, *prompt[lost:], *gist], False)
    made.ids.extend(after.ids)
    made.trained.extend(after.trained)
    if length is not None:
        del made.ids[length:], made.trained[length:]
    return made


FULL, GIST, NONE = "full", "gist", "none"
FORMS = (FULL, GIST, NONE)


@dataclass(frozen=True, slots=True)
class Record:
    """A record's tokens: the begin-of-text token if there is one, the prompt, its gist, the text after it, the answer.

    All forms have the same tokens, without the parts that they leave out; `reference` is the answer as text.
    """

    where: str
    begin: tuple[int, ...]
    prompt: tuple[int, ...]
    gist: tuple[int, ...]
    behind: tuple[int, ...]
    answer: tuple[int, ...]
    reference: str

    def asked(self, form: str) -> tuple[int, ...]:
        """Return the tokens of the question in a form."""
        assert form in FORMS, form
        before = {FULL: self.prompt, GIST: self.prompt + self.gist, NONE: ()}[form]
        return (*self.begin, *before, *self.behind)


def read_forms(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    gist: GistTokens,
    *,
    num_tokens: int,
    samples: int | None,
    reading: Reading | None = None,
    encoder: bool = False,
) -> list[Record]:
    """Return the first `samples` records, all with None, each with a gist of `num_tokens` tokens.

    In a chat the last answer is the wanted one. With `encoder` an encoder reads everything before it.
    Raises DataError for a record without a prompt or an answer, and PlanError for a gist that the model cannot have.
    """
    reading = reading or Reading()
    streams = [reading.documents(spec) for spec in specs]  # a wrong name is an error, also where it is not reached
    gists = Gists(gist, (num_tokens,), encoder=encoder)
    return [_record(document, tokenizer, gists) for document in islice(chain(*streams), samples)]


def _record(document: Document, tokenizer: "PreTrainedTokenizerBase", gists: Gists) -> Record:
    if document.messages and document.messages[-1]["role"] != "assistant":
        role = document.messages[-1]["role"]
        raise DataError(
            f"{document.where}: the last message is of {role!r}, so there is nothing to answer", hint=ANSWER_HINT
        )
    example = gist_examples([document], tokenizer, gists)[0]
    end = example.trained.rfind(1) + 1  # a template may write something after the answer
    start = example.trained.rfind(0, 0, end) + 1
    ids = tuple(example.ids)
    (count,) = gists.counts
    place = ids.index(gists.tokens.ids[0])
    begin = () if document.messages or gists.encoder else tuple(begin_of_text(tokenizer))
    reference = document.messages[-1]["content"] if document.messages else document.parts[-1]
    return Record(
        where=document.where,
        begin=begin,
        prompt=ids[len(begin) : place],
        gist=ids[place : place + count],
        behind=ids[place + count : start],
        answer=ids[start:end],
        reference=str(reference),
    )
