"""Records as a model may be given them: with the whole prompt, with its gist instead, and without either."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from surgeon.data.documents import documents
from surgeon.data.records import Document
from surgeon.data.rows import begin_of_text
from surgeon.errors import DataError
from surgeon.evals.prompts import ANSWER_HINT
from surgeon.gist import GistTokens
from surgeon.train.gist_data import Gists, gist_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FULL, GIST, NONE = "full", "gist", "none"
FORMS = (FULL, GIST, NONE)


@dataclass(frozen=True, slots=True)
class Record:
    """A record's tokens: the begin-of-text token if there is one, its prompt, its gist, what follows, and the answer.

    All forms have the very same tokens, but for those that they leave out; `reference` is the answer as text.
    """

    where: str
    begin: tuple[int, ...]
    prompt: tuple[int, ...]
    gist: tuple[int, ...]
    behind: tuple[int, ...]
    answer: tuple[int, ...]
    reference: str

    def asked(self, form: str) -> tuple[int, ...]:
        """Return what the model is given to answer in a form."""
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
    encoder: bool = False,
) -> list[Record]:
    """Return the first `samples` records, all with None, each with a gist of `num_tokens` tokens.

    Of a chat the last answer is the one that is asked for. With `encoder` all in front of it is read by one.
    Raises DataError for a record without a prompt or an answer, and PlanError for a gist that the model cannot have.
    """
    streams = [documents(spec) for spec in specs]  # a name that is wrong is an error, whether or not it is reached
    gists = Gists(gist, (num_tokens,), encoder=encoder)
    return [_record(document, tokenizer, gists) for document in islice(chain(*streams), samples)]


def _record(document: Document, tokenizer: "PreTrainedTokenizerBase", gists: Gists) -> Record:
    if document.messages and document.messages[-1]["role"] != "assistant":
        role = document.messages[-1]["role"]
        raise DataError(
            f"{document.where}: the last message is of {role!r}, so there is nothing to answer", hint=ANSWER_HINT
        )
    example = gist_examples([document], tokenizer, gists)[0]
    end = example.trained.rfind(1) + 1  # a template may write something behind the answer
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
