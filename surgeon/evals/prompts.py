"""Records with an answer, as prompts: what the model is given, and what it should say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from surgeon.data.documents import documents
from surgeon.data.records import Document, checked_text
from surgeon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_HINT = (
    "A record has prompt and completion; or instruction and output; or question and answer; "
    "or messages that end with the assistant's."
)


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


def begin_of_text(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that the tokenizer puts in front of a text, if it does."""
    empty = tokenizer("")["input_ids"]
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and empty[:1] == [bos] else []


def encode(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of a text, without special tokens but those that it writes out."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


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
        text, ids = _templated(before, tokenizer, document.where), []
    else:
        text, ids = "".join(f"{part}\n" for part in document.parts[:-1]), list(begin)
    return Prompt(document.where, text, (*ids, *encode(text, tokenizer)), reference)


def _templated(messages: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    """Return a chat up to where the assistant begins. Raises DataError where there is no template, or it refuses."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        hint = "Use a model that has one (an instruct or chat model), or prompts without --chat."
        raise DataError(f"{where} is to be a chat, and the tokenizer has no chat template", hint=hint)
    chat = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        hint = "Templates often want roles to alternate: user, assistant, user ..."
        raise DataError(f"the chat template refuses {where}: {error}", hint=hint) from error
    return checked_text(text, f"{where}, written by the chat template,")
