"""Records with an answer, as prompts: what the model is given, and what it should say."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from surgeon.data.documents import documents
from surgeon.data.records import ANSWER_HINT, Document
from surgeon.data.rows import begin_of_text, encode, templated
from surgeon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS, BATCH_SIZE = 256, 8  # of answers, where the user does not say


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, the tokens that the model is given for it, and the answer that it is held against."""

    where: str
    text: str
    ids: tuple[int, ...]
    reference: str


def read_prompts(
    specs: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, samples: int | None, chat: bool
) -> list[Prompt]:
    """Return the prompts of the first `samples` records, of all with None.

    The prompt is the record's text in front of its answer: its fields, each with a newline behind it; of messages all
    but the last, in the tokenizer's chat template. With `chat` fields too become the message of a user in it.
    Raises DataError for a record without an answer, and for what cannot be read.
    """
    streams = [documents(spec) for spec in specs]  # a name that is wrong is an error, whether or not it is reached
    begin = begin_of_text(tokenizer)
    found = [_prompt(document, tokenizer, begin, chat) for document in islice(chain(*streams), samples)]
    assert found, "documents() yields one at least"
    return found


def _prompt(document: Document, tokenizer: "PreTrainedTokenizerBase", begin: list[int], chat: bool) -> Prompt:
    if document.messages:
        *before, last = document.messages
        if last["role"] != "assistant" or not before:
            what = f"is of {last['role']!r}" if last["role"] != "assistant" else "is the only one"
            raise DataError(
                f"{document.where}: the last message {what}, so there is nothing to answer", hint=ANSWER_HINT
            )
        reference = last["content"]
    else:
        if len(document.parts) < 2:
            raise DataError(
                f"{document.where} has a text, but no answer to hold a prediction against", hint=ANSWER_HINT
            )
        reference = document.parts[-1]
        before = [{"role": "user", "content": "\n".join(document.parts[:-1])}] if chat else []
    if before:
        text, ids = templated(before, tokenizer, document.where, answer=True), []
    else:
        text, ids = "".join(f"{part}\n" for part in document.parts[:-1]), list(begin)
    return Prompt(document.where, text, (*ids, *encode(text, tokenizer)), reference)
