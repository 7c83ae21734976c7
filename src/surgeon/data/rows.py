"""Rows of tokens, cut from documents in order, for scores, diagnosis and perplexity."""

import hashlib
import json
import signal
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.data.chats import checked_text
from surgeon.data.documents import Reading
from surgeon.data.records import Document, Write
from surgeon.errors import DataError, failure_of_library

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BETWEEN_TEXTS = b"\xff"  # a byte that UTF-8 never has
TEMPLATE_SECONDS = 3  # for one chat; templates render some thousand per second
TEMPLATE_BYTES = 1 << 28  # of memory for one chat, its own text apart
TEMPLATE_GROWTH = 100  # characters written for each character of a chat, and as much again as TEMPLATE_FIXED
TEMPLATE_FIXED = 1_000_000


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Token ids, int64, shape (rows, length), and their origin.

    `digest` is SHA-256 over the row length and the ids, each as an int64 in little endian: equal for equal rows only.
    `source` has {"data": argument, "sha256": of its texts} per argument that was read. The texts are hashed in
    UTF-8 with a byte FF between two, a chat as JSON with sorted keys; of a text file it is what sha256sum says, unless
    it has a BOM. Only the documents that were needed are read and hashed; `texts` are theirs. `notes` say what of
    records was not read.
    """

    tokens: "Tensor"
    digest: str
    source: tuple[dict[str, str], ...]
    texts: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()


def read_rows(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    sequence_length: int,
    columns: str | None = None,
) -> TokenRows:
    """Return the first `samples` rows of `sequence_length` tokens, or as many as there are.

    Each text is tokenised whole and without special tokens, documents are joined by the end-of-text token, and a rest
    shorter than a row is dropped; text that does not fill one row is one shorter row. Of several `specs` the rows come
    in turns, one of each, so that few rows are of all of them; where one has no more, the others go on, and after them
    what is left of all. `columns` are those of records that the user has chosen.
    Raises DataError when there is nothing to read, or fewer than 2 tokens, or documents and no token to join them.
    """
    import torch

    assert not isinstance(specs, str)
    check_shape(samples, sequence_length)
    reading = Reading(columns)
    streams = [_Stream(spec, reading.documents(spec), tokenizer) for spec in specs]  # a wrong name is an error now
    ids = _in_turns(streams, tokenizer, samples, sequence_length)
    if len(ids) < 2:
        count = f"{len(ids)} token" + ("" if len(ids) == 1 else "s")
        raise DataError(
            f"{count} in {', '.join(specs) or 'no data'}; a row has 2 at least", hint="Give more text with --data."
        )
    length = min(sequence_length, len(ids))
    tokens = torch.frombuffer(ids, dtype=torch.int64)[: len(ids) // length * length].reshape(-1, length).clone()
    read = [stream for stream in streams if stream.texts or not stream.is_unread]
    source = tuple({"data": stream.spec, "sha256": stream.sha256.hexdigest()} for stream in read)
    texts = tuple(text for stream in read for text in stream.texts)
    return TokenRows(tokens, digest(tokens), source, texts, reading.notes(by_template(tokenizer)))


def check_shape(samples: int, sequence_length: int) -> None:
    """Raises DataError for less than one row, or rows of less than two tokens."""
    if samples < 1:
        raise DataError(f"{samples} samples were asked for; 1 is the least", hint="Set --samples to 1 or more.")
    if sequence_length < 2:
        raise DataError(
            f"rows of {sequence_length} tokens were asked for; 2 are the least, one to see and one to predict",
            hint="Set --sequence-length to 2 or more.",
        )


def digest(tokens: "Tensor") -> str:
    """Return the SHA-256 of rows of tokens, shape (rows, length): 64 hex digits."""
    length = tokens.shape[1].to_bytes(8, "little")
    return hashlib.sha256(length + tokens.numpy().astype("<i8").tobytes()).hexdigest()


def text_of(document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a document's text: its parts joined by newlines, or its chat as the tokenizer's template writes it.

    Raises DataError when the tokenizer has no template, or one that refuses the chat.
    """
    if document.messages:
        return templated(document.messages, tokenizer, document.where, tools=document.tools)
    return "\n".join(document.parts)


def templated(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    *,
    answer: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return a chat as the tokenizer's template writes it, with `answer` up to the beginning of the assistant's answer.

    `tools` are descriptions of functions that the chat may call.

    Raises DataError where there is no template, or one that refuses the chat or runs too long.
    """
    if tokenizer.chat_template is None:
        what, other = ("is to be", "prompts without --chat") if answer else ("is", "data with text")
        hint = f"Use a model that has one (an instruct or chat model), or {other}."
        raise DataError(f"{where} {what} a chat, and the tokenizer has no chat template", hint=hint)
    chat = as_template_reads(messages, tokenizer)
    with rendering(where):
        text = tokenizer.apply_chat_template(
            chat, tools=[dict(tool) for tool in tools] or None, tokenize=False, add_generation_prompt=answer
        )
    return written_by_template(text, (*messages, *tools), where)


def by_template(tokenizer: "PreTrainedTokenizerBase") -> Write:
    """Return the function that writes a chat by the tokenizer's template: its messages and its tools."""
    return lambda messages, tools: templated(messages, tokenizer, "a chat", tools=tools)


_PROBE = "surgeon asks"
_PARTS: dict[str, bool] = {}  # by template, whether it reads content in parts alone


def as_template_reads(
    messages: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, Any]]:
    """Return messages as the chat template reads them: with content as texts; as parts where it would lose a text.

    Templates of models that see may loop over parts, and write nothing of a text. That is tried once for a template.
    """
    template = str(tokenizer.chat_template)
    if template not in _PARTS:
        part = [{"type": "text", "text": _PROBE}]
        _PARTS[template] = _writes(tokenizer, _PROBE) is False and bool(_writes(tokenizer, part))
    if not _PARTS[template]:
        return [dict(message) for message in messages]
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _writes(tokenizer: "PreTrainedTokenizerBase", content: Any) -> bool | None:
    """Return whether the chat template writes what a user says; None where it refuses such a chat."""
    try:
        with rendering("a message"):
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except DataError:
        return None
    return _PROBE in str(text)


def written_by_template(text: object, given: Sequence[Mapping[str, Any]], where: str) -> str:
    """Return what a chat template wrote for messages and tools. Raises DataError for no text, or far more of it."""
    written = checked_text(text, f"{where}, written by the chat template,")
    most = TEMPLATE_FIXED + TEMPLATE_GROWTH * sum(len(str(each.get("content", each))) for each in given)
    if len(written) > most:
        hint = "Look at chat_template.jinja or tokenizer_config.json, and fetch them again."
        raise DataError(f"the chat template writes {len(written):,} characters for {where}", hint=hint)
    return written


@contextmanager
def rendering(where: str) -> Iterator[None]:
    """Turn an error of a chat template in this block into a DataError, and stop one that takes too much time or memory.

    A template is a program of the checkpoint's author, in a sandbox that limits neither.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS), _memory_limit(TEMPLATE_BYTES):
            yield
    except (TimeoutError, MemoryError) as error:
        most = f"{TEMPLATE_SECONDS} seconds" if isinstance(error, TimeoutError) else f"{TEMPLATE_BYTES >> 20} MiB"
        hint = "Look at chat_template.jinja or tokenizer_config.json: it may loop for ever."
        raise DataError(f"the chat template takes over {most} on {where}", hint=hint) from error
    except BaseException as error:
        if (said := failure_of_library(error)) is None:
            raise
        hint = "Many templates require roles to alternate: user, assistant, user ..."
        raise DataError(f"the chat template refuses {where}: {said}", hint=hint) from error


@contextmanager
def _memory_limit(nbytes: int) -> Iterator[None]:
    """Raise MemoryError in this block once it takes so many more bytes, where the system says how many there are now.

    Only in the main thread: the limit is the process's, and other threads may need memory meanwhile.
    """
    import resource

    statm = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not statm.exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + nbytes if soft == resource.RLIM_INFINITY else min(soft, used + nbytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this block after some seconds; only in the main thread, which alone receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    rest, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if rest:  # restore the caller's alarm, later by the time of this block
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def encode(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of a whole text, without special tokens except those spelled out in it.

    The whole text is encoded even where few tokens are needed: a prefix of it may have others.
    """
    quiet = {"verbose": False}  # no warning about more tokens than the model's positions
    parts = {"return_attention_mask": False, "return_token_type_ids": False}
    ids: list[int] = tokenizer(text, add_special_tokens=False, **quiet, **parts)["input_ids"]
    return ids


def begin_of_text(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that the tokenizer puts before every text, if it does."""
    empty = tokenizer("")["input_ids"]
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and empty[:1] == [bos] else []


def hashed(document: Document, number: int) -> bytes:
    """Return the bytes that the document of this number, from 0, adds to the hash of its data."""
    chat: Any = {"messages": document.messages, "tools": document.tools} if document.tools else document.messages
    text = json.dumps(chat, sort_keys=True) if document.messages else "\n".join(document.parts)
    return (BETWEEN_TEXTS if number else b"") + text.encode()


class _Stream:
    """The tokens of one data argument, of which only the documents that are needed are read."""

    def __init__(self, spec: str, documents: Iterator[Document], tokenizer: "PreTrainedTokenizerBase") -> None:
        self.spec, self.sha256 = spec, hashlib.sha256()
        self.texts: list[str] = []
        self.is_unread = True
        self._documents, self._tokenizer = documents, tokenizer
        self._ids = array("q")
        self._taken = 0

    def row(self, length: int) -> "array[int] | None":
        """Return the next tokens, as many as asked for; None where there are not as many."""
        self.is_unread = False
        while len(self._ids) - self._taken < length:
            if (document := next(self._documents, None)) is None:
                return None
            if self.texts:
                self._ids.append(_end_of_text(self._tokenizer, document.where))
            text = text_of(document, self._tokenizer)
            self.sha256.update(hashed(document, len(self.texts)))
            self.texts.append(text)
            self._ids.extend(encode(text, self._tokenizer))
        self._taken += length
        return self._ids[self._taken - length : self._taken]

    def rest(self) -> "array[int]":
        """Return the tokens that no row has taken, of the documents that were read."""
        return self._ids[self._taken :]


def _in_turns(
    streams: Sequence[_Stream], tokenizer: "PreTrainedTokenizerBase", samples: int, length: int
) -> "array[int]":
    """Return the tokens of so many rows, one of each stream in turn, and then of what is left of all of them.

    Where that is less than one row, it is all that there is.
    """
    ids, left = array("q"), list(streams)
    while left and len(ids) < samples * length:
        for stream in list(left):
            if len(ids) >= samples * length:
                break
            if (row := stream.row(length)) is None:
                left.remove(stream)
            else:
                ids.extend(row)
    rests = array("q")
    for stream in streams if len(ids) < samples * length else ():
        if rests and stream.texts:
            rests.append(_end_of_text(tokenizer, stream.spec))
        rests.extend(stream.rest())
    if ids:
        rests = rests[: len(rests) // length * length]
    ids.extend(rests)
    return ids[: samples * length]


def _end_of_text(tokenizer: "PreTrainedTokenizerBase", where: str) -> int:
    between = tokenizer.eos_token_id
    between = tokenizer.sep_token_id if between is None else between  # BERT has a separator
    if between is None:
        raise DataError(
            f"{where} is a second document, and the tokenizer has no end-of-text token to put before it",
            hint="Put all text into one .txt, or set eos_token in tokenizer_config.json.",
        )
    return int(between)
