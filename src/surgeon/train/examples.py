r"""Examples: the token ids of a document, and which of them are trained.

A document is cut into segments, and each is tokenised by itself. So no token spans the border between a prompt and its
answer, and the prompt has the same tokens as in generation. Tokenising the whole text with the tokenizer's offsets
would be one call, but merges "\n" with an answer that begins with one, and needs a tokenizer that knows its offsets.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from surgeon.data.records import Document
from surgeon.data.rows import as_template_reads, begin_of_text, encode, rendering, templated, written_by_template
from surgeon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION, ALL = "completion", "all"  # which part of a record with an answer is trained
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the pattern of transformers
LONG = 1 << 16  # characters that are tokenised at once; a tokenizer takes some 300 bytes of memory for each
AT_ONCE = 1 << 18  # characters of several texts in one call
_NEARBY = 256  # characters on either side of a cut, tokenised to see whether it changes a token
_CUTS = (
    re.compile(r"(?<=\n)(?=\S)"),
    re.compile(r"(?<=\S)(?=\s)"),
)  # likely places between tokens, to cut a long text
_TRIES = 8
_LEAD = "\n"  # precedes a segment that is not the beginning of a text


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and per token whether the model is trained to predict it (1, else 0). The first token never is.

    `is_text`: it may be cut into pieces, of which each continues the one before. `is_cut`: tokens were removed already.
    """

    ids: "array[int]"
    trained: bytearray
    is_text: bool = True
    is_cut: bool = False


class Segment(NamedTuple):
    text: str
    trained: bool


def examples(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, train_on: str = COMPLETION
) -> list[Example]:
    """Return the example of each document. Their texts are tokenised together, which takes half the time.

    A text is the begin-of-text token, where the tokenizer has one, its tokens and the end-of-text token, all trained
    but the first; an empty text has no tokens. A record with an answer is the prompt of `surgeon evaluate` (its fields,
    each followed by a newline), the answer and the end-of-text token; the last two are trained. A chat is written by
    the tokenizer's template; the assistant's turns are trained. With `train_on` "all" every token but the first is
    trained.
    Raises DataError for a chat without an answer, for one whose turns cannot be told apart in the template's text, and
    for a tokenizer without an end-of-text token or a needed template.
    """
    assert train_on in (COMPLETION, ALL), train_on
    tokenise = Tokenise(tokenizer)
    cuts = [
        chat_segments(document, tokenizer) if document.messages else _fields(document, tokenise)
        for document in documents
    ]
    tokens = tokenise([(part.text, bool(index)) for cut in cuts for index, part in enumerate(cut)])
    begin = begin_of_text(tokenizer)
    made_examples = []
    for document, cut in zip(documents, cuts, strict=True):
        made = Example(array("I"), bytearray(), len(document.parts) == 1)
        extend(made, begin if document.parts else [], train_on == ALL)  # a template writes its own
        for part in cut:
            extend(made, next(tokens), part.trained or train_on == ALL)
        if made.is_text and len(made.ids) == len(begin):
            made = Example(array("I"), bytearray())
        else:
            extend(made, end_of_text(tokenizer, document), True)
        made.trained[:1] = bytes(len(made.trained[:1]))
        made_examples.append(made)
    return made_examples


def extend(example: Example, ids: Sequence[int], is_trained: bool) -> None:
    """Append token ids to an example, all trained or none."""
    example.ids.extend(ids)
    example.trained.extend(bytes([is_trained]) * len(ids))


def asked_and_answered(asked: Sequence[int], answer: Sequence[int], *, is_cut: bool) -> Example:
    """Return the example of token ids that are read, and of those after them, which are trained; no text."""
    example = Example(array("I"), bytearray(), is_text=False, is_cut=is_cut)
    extend(example, asked, False)
    extend(example, answer, True)
    return example


def _fields(document: Document, tokenise: "Tokenise") -> list[Segment]:
    """Return a text, in parts where it is long, or a prompt and its answer."""
    *prompt, last = document.parts
    if not prompt:
        return [Segment(part, True) for part in tokenise.parts(last)]
    return [Segment("".join(f"{part}\n" for part in prompt), False), Segment(last, True)]


def end_of_text(tokenizer: "PreTrainedTokenizerBase", document: Document) -> list[int]:
    """Return the end-of-text token after a document's last field; nothing after a chat, whose template writes it."""
    if document.messages:
        return []
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer has no end-of-text token to put after {document.where}",
            hint="Set eos_token in tokenizer_config.json.",
        )
    return [int(tokenizer.eos_token_id)]


# --- chats ------------------------------------------------------------------------------------------------------------


def chat_segments(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[Segment]:
    """Return a chat as the template writes it, cut at the begin and the end of each assistant's turn.

    The turns are found by the template's `{% generation %}` marks, or without them by the texts that it writes for the
    messages up to each answer, with the answer and without it. The answers in a given prompt are not trained.
    """
    marks = _MARKS.search(str(tokenizer.chat_template or ""))
    text, spans = _marked(document, tokenizer) if marks else _prefixes(document, tokenizer)
    if not any(start < end for start, end in spans):
        raise DataError(
            f"{document.where}: no message is the assistant's, so there is nothing to learn",
            hint="A chat to train on has messages with the role 'assistant'; a mere text is better written as text.",
        )
    segments, at = [], 0
    for start, end in spans:
        segments += [Segment(text[at:start], False), Segment(text[start:end], True)]
        at = end
    return [segment for segment in (*segments, Segment(text[at:], False)) if segment.text]


def _marked(document: Document, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and the spans of its answers by the marks of the template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # declared to return a string
    chats = [document.messages] + ([document.messages[: document.given]] if document.given else [])
    tools = [dict(tool) for tool in document.tools]
    with rendering(document.where):
        texts, spans = render(
            conversations=[as_template_reads(chat, tokenizer) for chat in chats],
            tools=tools or None,
            chat_template=tokenizer.get_chat_template(tools=tools or None),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    text = written_by_template(texts[0], (*document.messages, *document.tools), document.where)
    return text, sorted(spans[0])[len(spans[1]) if document.given else 0 :]


def _prefixes(document: Document, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and the spans of its answers, each after the text that asks for it."""
    messages, where = document.messages, document.where
    write = partial(templated, tokenizer=tokenizer, where=where, tools=document.tools)
    text = write(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < document.given:
            continue
        if not index:
            hint = "Put the message before it that it answers, or give it the role 'system'."
            raise DataError(f"{where}: the first message is the assistant's, an answer to nothing", hint=hint)
        question = write(messages[:index], answer=True)
        answered = text if index + 1 == len(messages) else write(messages[: index + 1])
        if not (text.startswith(answered) and answered.startswith(question)):
            raise DataError(
                f"{where}: the chat template writes message {index + 1} differently when others follow it, "
                "so it is not clear which part of it to train",
                hint="Write one record for each answer, which ends with it, or put {% generation %} marks "
                "around the answer in the chat template.",
            )
        spans.append((len(question), len(question) + len(_turn(answered[len(question) :], tokenizer))))
    return text, spans


def _turn(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return an answer up to the special token that ends it, without the space that the template writes after it.

    Where no special token ends it, the space may be part of the answer, and stays.
    """
    ended = text.rstrip()
    specials = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())}
    return ended if ended.endswith(tuple(specials - {""})) else text


# --- tokens -----------------------------------------------------------------------------------------------------------


class Tokenise:
    """Tokenises texts that begin a document, and texts that continue one.

    Some tokenizers (SentencePiece's) put a space before every text. So a text that continues another one is tokenised
    after a newline, whose ids are removed again.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._lead = encode(_LEAD, tokenizer)
        self._spaces = encode(f"{_LEAD}a", tokenizer) != self._lead + encode("a", tokenizer)

    def __call__(self, texts: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
        """Yield the ids of each text; the flag says whether it continues another one."""
        start = size = 0
        for stop, (text, _) in enumerate(texts, start=1):
            size += len(text)
            if size >= AT_ONCE or stop == len(texts):
                yield from self._batch(texts[start:stop])
                start, size = stop, 0

    def _batch(self, texts: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
        prefixed = [_LEAD + text if self._spaces and goes_on else text for text, goes_on in texts]
        plain = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
        many = self._tokenizer(prefixed, add_special_tokens=False, **plain)["input_ids"]
        for (text, goes_on), ids in zip(texts, many, strict=True):
            if not (self._spaces and goes_on):
                yield ids
            elif ids[: len(self._lead)] == self._lead:
                yield ids[len(self._lead) :]
            else:  # the newline has merged with what follows it
                yield encode(text, self._tokenizer)

    def parts(self, text: str) -> list[str]:
        """Return a text in parts of about LONG characters that together have the text's tokens.

        It is cut where the text nearby has the same tokens with and without the cut; without such a place, later.
        """
        parts, start = [], 0
        for about in range(LONG, len(text) - LONG // 2, LONG):
            for pattern in _CUTS:
                places = islice(pattern.finditer(text, about, about + LONG // 4), _TRIES)
                cut = next((place.start() for place in places if self._is_between_tokens(text, place.start())), None)
                if cut is not None:
                    parts.append(text[start:cut])
                    start = cut
                    break
        return [*parts, text[start:]]

    def _is_between_tokens(self, text: str, cut: int) -> bool:
        before, after = text[cut - _NEARBY : cut], text[cut : cut + _NEARBY]
        whole, left, right = self([(before + after, False), (before, False), (after, True)])
        return whole == left + right
