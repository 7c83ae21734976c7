"""The place of a gist in a text, and the tokens before and after it.

Plain text is the prompt, the gist, and the rest. In a chat the prompt is the system turn; the gist comes directly after
it, before the user's turn. The two sides are tokenised at different times, perhaps months apart. Both must have the
same tokens as in the whole text; the special token between them ensures that.
"""

from typing import TYPE_CHECKING

from surgeon.data.rows import begin_of_text, encode, templated
from surgeon.errors import DataError
from surgeon.gist.tokens import GistTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT, CHAT = "text", "chat"
LAYOUTS = (TEXT, CHAT)
_SYSTEM = "Some system turn."  # in the place of the prompt, which is not known when the text comes
_TEXT = "\nInput: a text\nOutput:"  # a text that may follow a gist


def prompt_tokens(
    prompt: str, gist: GistTokens, tokenizer: "PreTrainedTokenizerBase", *, num_tokens: int, layout: str, encoder: bool
) -> list[int]:
    """Return the ids of a prompt and its gist of `num_tokens` tokens. `encoder`: an encoder reads it.

    Raises DataError for an empty prompt, for one with gist tokens or one that cannot be a system turn, and for a
    tokenizer that gives the whole text other tokens than its two sides.
    """
    assert layout in LAYOUTS, layout
    if not prompt.strip():
        raise DataError("the prompt is empty", hint="Give one with --prompt or --prompt-file.")
    before = _system_turn(prompt, tokenizer) if layout == CHAT else prompt
    begin = begin_of_text(tokenizer) if layout == TEXT and not encoder else []
    gists, text = gist.ids_of(num_tokens), gist.text(num_tokens)
    ids = [*begin, *encode(before + text, tokenizer)]
    if ids[-num_tokens:] != gists or set(ids[:-num_tokens]) & set(gist.ids):
        raise DataError(
            f"the prompt contains {gist.tokens[0]}, or the tokenizer does not know it",
            hint="Write the prompt without gist tokens; they are added after it.",
        )
    after = _TEXT if layout == TEXT else _user_turn(_TEXT, tokenizer)
    whole = [*begin, *encode(before + text + after, tokenizer)]
    written = _chat([_turn("system", prompt), _turn("user", _TEXT)], tokenizer) if layout == CHAT else before + after
    if whole != ids + _after_gist(after, gist, tokenizer) or written != before + after:
        raise DataError(
            "what follows the gist depends on the prompt: the whole text has other tokens than its two sides",
            hint="With --chat the template must write each turn alike after any other.",
        )
    return ids


def text_tokens(
    text: str, gist: GistTokens, tokenizer: "PreTrainedTokenizerBase", *, layout: str, encoder: bool
) -> list[int]:
    """Return the ids of a text that follows a gist, as they are after the prompt and the gist.

    In a chat it is the user's turn, up to the begin of the assistant's. An encoder's text ends with the end-of-text
    token. Raises DataError for a text with gist tokens, or without any token.
    """
    assert layout in LAYOUTS, layout
    ids = _after_gist(_user_turn(text, tokenizer) if layout == CHAT else text, gist, tokenizer)
    if encoder and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    if set(ids) & set(gist.ids):
        raise DataError(f"the text contains {gist.tokens[0]}", hint="The gist is put before it; leave it out.")
    if not ids:
        raise DataError("there is no text after the gist to continue", hint="Give a TEXT of one token or more.")
    return ids


def _after_gist(text: str, gist: GistTokens, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of a text after a gist token, where some tokenizers begin it with other tokens."""
    before = encode(gist.tokens[-1], tokenizer)
    return encode(gist.tokens[-1] + text, tokenizer)[len(before) :]


def _user_turn(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the chat template's text after a system turn: a user's turn, and the begin of an answer."""
    head = _system_turn(_SYSTEM, tokenizer)
    whole = _chat([_turn("system", _SYSTEM), _turn("user", text)], tokenizer)
    if not whole.startswith(head):
        raise DataError(
            "the chat template does not write a system turn by itself, so no gist can stand after it",
            hint="Put the prompt into plain text: leave out --chat.",
        )
    return whole[len(head) :]


def _system_turn(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    return templated([_turn("system", prompt)], tokenizer, "the prompt")


def _chat(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> str:
    return templated(messages, tokenizer, "the text", answer=True)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
