"""The prompts that ask a model to write an answer in its own words, and the rows that they are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.data.records import ANSWER_HINT, Document
from surgeon.data.rows import begin_of_text, encode, templated
from surgeon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMN = "distill"  # of the output, with where an answer comes from
MARK = "####"  # before the final number of a solution, in GSM8K


@dataclass(frozen=True, slots=True)
class PromptForm:
    """A prompt: a system turn, where there is one, a user's turn, and how the answer is made to begin."""

    user: str
    system: str = ""
    begun: str = ""


# Yang et al. 2024 (Self-Distillation Bridges Distribution Gap, arXiv:2402.13669): figure 3, verbatim, and the prompt of
# its code for GSM8K. There a space follows `begun`; here the model writes it, for it belongs to the token after it.
FORMS = {
    "sdft": PromptForm(
        "Below are an instruction that describes a task along with a reference answer. Using the reference answer as a "
        "guide, write your own response.\n### Instruction:\n{instruction}\n### Reference Answer:\n{reference}\n"
        "### Response:\n"
    ),
    "gsm8k": PromptForm(
        "{instruction}\n\n{reference}",
        system="You are an expert in math. Below are a math question and its reference answer. Refer to the reference "
        "answer and write a response that appropriately answers the question.",
        begun="Great! Let's think step by step.",
    ),
}
PROMPTS = ("auto", *FORMS)


@dataclass(frozen=True, slots=True)
class Row:
    """A record with an answer: what is asked, after earlier turns of a chat, and the answer.

    `record` is all of it, `path` leads to the answer in it, and `tools` are descriptions of functions for the template.
    """

    where: str
    instruction: str
    reference: str
    before: tuple[Mapping[str, Any], ...]
    record: Mapping[str, Any]
    path: tuple[str | int, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def answered(self, answer: str) -> dict[str, Any]:
        """Return the record with another answer; all else in it stays."""
        column, *inner = self.path
        if not inner:
            return {**self.record, str(column): answer}
        *before, last = self.record[str(column)]
        return {**self.record, str(column): [*before, {**last, str(inner[-1]): answer}]}


def row_of(document: Document) -> Row:
    """Return a document as a row. Raises DataError for one without an answer, or with the column of a distilled one."""
    record = document.record
    if record is None or (document.parts and len(document.parts) < 2):
        raise DataError(f"{document.where} is a text, and has no answer to rewrite", hint=ANSWER_HINT)
    if COLUMN in record:
        hint = "Distil the data that it was made from, or rename the column."
        raise DataError(f"{document.where} has been distilled already: it has a column {COLUMN!r}", hint=hint)
    if document.messages:
        return _row_of_chat(document, record)
    *asked, reference = document.parts
    return Row(document.where, "\n".join(asked), reference, (), record, document.answer)


def _row_of_chat(document: Document, record: Mapping[str, Any]) -> Row:
    *before, last = document.messages
    roles = [before[-1]["role"] if before else None, last["role"]]
    if roles != ["user", "assistant"]:
        found = ", ".join(str(message["role"]) for message in document.messages[-2:])
        raise DataError(
            f"{document.where} has no question of a user with an answer at its end, but: {found}", hint=ANSWER_HINT
        )
    if last.get("tool_calls"):
        raise DataError(f"{document.where}: its last answer calls tools", hint="Texts alone are written anew.")
    *before, asked = before
    return Row(
        document.where, asked["content"], last["content"], tuple(before), record, document.answer, document.tools
    )


def form_of(row: Row, prompt: str) -> str:
    """Return the name of the prompt of a row: with "auto" that of a solution with a marked number, else the general."""
    if prompt != "auto":
        return prompt
    return "gsm8k" if MARK in row.reference else "sdft"


def prompt_tokens(row: Row, name: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that ask for a row's answer: in the chat template where the tokenizer has one, else as text.

    Raises DataError where the template refuses it.
    """
    form = FORMS[name]
    parts = {"{instruction}": row.instruction, "{reference}": row.reference}
    asked = _filled(form.user, parts)
    if tokenizer.chat_template is None:
        before = [str(message["content"]) for message in row.before]
        text = "\n\n".join(part for part in (form.system, *before, asked) if part)
        text += f"\n\n{form.begun}" if form.begun else ""
        return [*begin_of_text(tokenizer), *encode(text, tokenizer)]
    written = templated(_chat(form, row.before, asked), tokenizer, row.where, answer=True, tools=row.tools)
    return encode(written + form.begun, tokenizer)


def _chat(form: PromptForm, before: Sequence[Mapping[str, Any]], asked: str) -> list[Mapping[str, Any]]:
    """Return the turns of a chat that ask for an answer; a system turn of the record stands after the form's."""
    given, turns = "", list(before)
    if turns and turns[0]["role"] == "system":
        given = str(turns.pop(0)["content"])
    system = "\n\n".join(part for part in (form.system, given) if part)
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, *turns, {"role": "user", "content": asked.rstrip("\n")}]


def _filled(text: str, parts: Mapping[str, str]) -> str:
    """Return a text with its places filled at once: what fills one may hold the name of another."""
    for name in parts:
        text = text.replace(name, f"\0{name}\0")
    return "".join(parts.get(piece, piece) for piece in text.split("\0"))
