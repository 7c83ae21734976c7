r"""Examples: what a model reads of a document, as token ids, and which of them it is to learn.

A document is cut into segments, and each is tokenised by itself: so no token spans the border between a prompt and its
answer, and the prompt has the very tokens that generation gives the model. The whole text with the tokenizer's offsets
would be one call, but merges "\n" and an answer that begins with one, and needs a tokenizer that knows its offsets.
"""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from surgeon.data.records import Document, checked_text
from surgeon.data.rows import begin_of_text, encode, rendering, templated
from surgeon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION, ALL = "completion", "all"  # what of a record with an answer is trained
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them
LONG = 1 << 16  # characters that are tokenised at once; tokenizers take some 300 bytes of memory for each
AT_ONCE = 1 << 18  # characters of many texts
_NEARBY = 256  # characters on either side of a cut that show whether it changes a token
_CUTS = re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?=\s)")  # where a long text is likely cut between tokens
_TRIES = 8
_LEAD = "\n"  # stands in front of a segment that must not be taken for the beginning of a text


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and of each whether the model is to predict it (1, else 0); never the first one, which nothing goes
    before.

    A text may be cut into pieces where it is long, for each goes on where the last one ends; nothing else may.
    `is_cut`: something was taken out already.
    """

    ids: "array[int]"
    trained: bytearray
    is_text: bool = True
    is_cut: bool = False


class Segment(NamedTuple):
    text: str
    trained: bool


def example(document: Document, tokenizer: "PreTrainedTokenizerBase", *, train_on: str = COMPLETION) -> Example:
    """Return the example that a document makes, as `examples` does."""
    return examples([document], tokenizer, train_on=train_on)[0]


def examples(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, train_on: str = COMPLETION
) -> list[Example]:
    """Return the example of each document. Their texts are tokenised together, which takes half the time.

    A text is the begin-of-text token, if the tokenizer puts one, its tokens and the end-of-text token, all trained but
    the first; an empty text has no token at all. A record with an answer is the prompt that `surgeon evaluate` gives
    the model (its fields, each with a newline behind it), the answer and the end-of-text token, of which those two are
    trained. A chat is what the tokenizer's template writes; trained are the assistant's turns. With `train_on` "all"
    every token but the first is trained.
    Raises DataError for a chat without an answer, for one whose turns cannot be told apart in what the template writes,
    and for a tokenizer without an end-of-text token or without a template that is needed.
    """
    assert train_on in (COMPLETION, ALL), train_on
    tokenise = Tokenise(tokenizer)
    cuts = [
        chat_segments(document, tokenizer) if document.messages else _fields(document, tokenise)
        for document in documents
    ]
    tokens = tokenise([(part.text, bool(index)) for cut in cuts for index, part in enumerate(cut)])
    begin = begin_of_text(tokenizer)
    found = []
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
        found.append(made)
    return found


def extend(example: Example, ids: Sequence[int], is_trained: bool) -> None:
    example.ids.extend(ids)
    example.trained.extend(bytes([is_trained]) * len(ids))


def _fields(document: Document, tokenise: "Tokenise") -> list[Segment]:
    """Return a text, in parts where it is long, or a prompt and its answer."""
    *prompt, last = document.parts
    if not prompt:
        return [Segment(part, True) for part in tokenise.parts(last)]
    return [Segment("".join(f"{part}\n" for part in prompt), False), Segment(last, True)]


def end_of_text(tokenizer: "PreTrainedTokenizerBase", document: Document) -> list[int]:
    """Return the token behind a document's last field; behind a chat stands what its template writes."""
    if document.messages:
        return []
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer has no end-of-text token to put behind {document.where}",
            hint="Set eos_token in tokenizer_config.json.",
        )
    return [int(tokenizer.eos_token_id)]


# --- chats ------------------------------------------------------------------------------------------------------------


def chat_segments(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[Segment]:
    """Return a chat as the template writes it, cut where the assistant begins and where it has ended.

    By the template's own `{% generation %}` marks where it has some; else by what it writes of the messages up to each
    answer, and with it.
    """
    marks = _MARKS.search(str(tokenizer.chat_template or ""))
    text, spans = _marked(document, tokenizer) if marks else _prefixes(document, tokenizer)
    if not any(start < end for start, end in spans):
        raise DataError(
            f"{document.where}: no message is the assistant's, so there is nothing to learn",
            hint="A chat to train on has messages with the role 'assistant'; a mere text is better written as text.",
        )
    found, at = [], 0
    for start, end in spans:
        found += [Segment(text[at:start], False), Segment(text[start:end], True)]
        at = end
    return [segment for segment in (*found, Segment(text[at:], False)) if segment.text]


def _marked(document: Document, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and where in it a template that marks answers says that they are."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # declared to return a string
    with rendering(document.where):
        texts, spans = render(
            conversations=[[dict(message) for message in document.messages]],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return checked_text(texts[0], f"{document.where}, written by the chat template,"), sorted(spans[0])


def _prefixes(document: Document, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and where in it its answers are: behind what is written to ask for each."""
    messages, where = document.messages, document.where
    text = templated(messages, tokenizer, where)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not index:
            hint = "Put the message before it that it answers, or give it the role 'system'."
            raise DataError(f"{where}: the first message is the assistant's, an answer to nothing", hint=hint)
        asked = templated(messages[:index], tokenizer, where, answer=True)
        answered = _up_to(messages, index, text, tokenizer, where)
        if not (text.startswith(answered) and answered.startswith(asked)):
            raise DataError(
                f"{where}: the chat template writes message {index + 1} otherwise when others stand behind it, "
                "so what is trained of it cannot be told",
                hint="Write one record for each answer, which ends with it, or put {% generation %} marks "
                "around the answer in the chat template.",
            )
        spans.append((len(asked), len(asked) + len(_turn(answered[len(asked) :], tokenizer))))
    return text, spans


def _up_to(
    messages: Sequence[Mapping[str, Any]],
    index: int,
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
) -> str:
    """Return what the template writes of the messages up to one, which is `text` for the last one."""
    return text if index + 1 == len(messages) else templated(messages[: index + 1], tokenizer, where)


def _turn(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return an answer up to the token that ends it: of space that the template writes behind it nothing is generated.

    Where no special token ends it, the space may be the answer's own, and stays.
    """
    ended = text.rstrip()
    specials = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())}
    return ended if ended.endswith(tuple(specials - {""})) else text


# --- tokens -----------------------------------------------------------------------------------------------------------


class Tokenise:
    """Makes tokens of texts that begin a document and of texts that go on.

    Some tokenizers (SentencePiece's) put a space before whatever they are given. What goes on is therefore given to
    them behind a newline, whose ids are taken off again.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._lead = encode(_LEAD, tokenizer)
        self._spaces = encode(f"{_LEAD}a", tokenizer) != self._lead + encode("a", tokenizer)

    def __call__(self, texts: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
        """Yield the ids of each text; of each is said whether it goes on."""
        start = size = 0
        for stop, (text, _) in enumerate(texts, start=1):
            size += len(text)
            if size >= AT_ONCE or stop == len(texts):
                yield from self._batch(texts[start:stop])
                start, size = stop, 0

    def _batch(self, texts: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
        given = [_LEAD + text if self._spaces and goes_on else text for text, goes_on in texts]
        quiet = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
        many = self._tokenizer(given, add_special_tokens=False, **quiet)["input_ids"]
        for (text, goes_on), ids in zip(texts, many, strict=True):
            if not (self._spaces and goes_on):
                yield ids
            elif ids[: len(self._lead)] == self._lead:
                yield ids[len(self._lead) :]
            else:  # the newline has merged with what follows it
                yield encode(text, self._tokenizer)

    def parts(self, text: str) -> list[str]:
        """Return a text in parts that have its tokens, each about LONG characters.

        It is cut where the text nearby has the same tokens in one and in two; where no such place is found, later.
        """
        found, start = [], 0
        for about in range(LONG, len(text) - LONG // 2, LONG):
            for pattern in _CUTS:
                places = islice(pattern.finditer(text, about, about + LONG // 4), _TRIES)
                cut = next((place.start() for place in places if self._is_between_tokens(text, place.start())), None)
                if cut is not None:
                    found.append(text[start:cut])
                    start = cut
                    break
        return [*found, text[start:]]

    def _is_between_tokens(self, text: str, cut: int) -> bool:
        before, behind = text[cut - _NEARBY : cut], text[cut : cut + _NEARBY]
        whole, left, right = self([(before + behind, False), (before, False), (behind, True)])
        return whole == left + right
