"""Where a gist stands in a text, and the tokens on either side of it.

Plain text is the prompt, the gist, and whatever follows. In a chat the prompt is the system turn and the gist comes
right behind it, before the turn of the user. The two sides are tokenised at different times, perhaps months apart: both
must have the tokens that they have in the whole text, which is what the special token between them is good for.
"""

from typing import TYPE_CHECKING

from surgeon.data.rows import begin_of_text, encode, templated
from surgeon.errors import DataError
from surgeon.gist.tokens import GistTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT, CHAT = "text", "chat"
LAYOUTS = (TEXT, CHAT)
_SOME = "Some system turn."  # stands for the prompt, which nobody knows any more when the text comes
_LIKE = "\nInput: a text\nOutput:"  # what may follow a gist


def prompt_tokens(
    prompt: str, gist: GistTokens, tokenizer: "PreTrainedTokenizerBase", *, num_tokens: int, layout: str, encoder: bool
) -> list[int]:
    """Return the ids of a prompt with its gist of `num_tokens` tokens behind it. `encoder`: it is read by one.

    Raises DataError for an empty prompt, one that has gist tokens of its own, one that cannot be a system turn, and a
    tokenizer that gives other tokens to the whole text than to its two sides.
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
            hint="Write the prompt without gist tokens; they are put behind it.",
        )
    after = _LIKE if layout == TEXT else _user_turn(_LIKE, tokenizer)
    whole = [*begin, *encode(before + text + after, tokenizer)]
    written = _chat([_turn("system", prompt), _turn("user", _LIKE)], tokenizer) if layout == CHAT else before + after
    if whole != ids + _behind(after, gist, tokenizer) or written != before + after:
        raise DataError(
            "what follows the gist depends on the prompt: the whole text has other tokens than its two sides",
            hint="With --chat the template must write each turn alike behind any other.",
        )
    return ids


def text_tokens(
    text: str, gist: GistTokens, tokenizer: "PreTrainedTokenizerBase", *, layout: str, encoder: bool
) -> list[int]:
    """Return the ids of a text that follows a gist: those that it has behind the prompt and the gist.

    In a chat it is the turn of the user, up to where the assistant begins. What an encoder reads ends with the
    end-of-text token. Raises DataError where it has gist tokens, or no token at all.
    """
    assert layout in LAYOUTS, layout
    ids = _behind(_user_turn(text, tokenizer) if layout == CHAT else text, gist, tokenizer)
    if encoder and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    if set(ids) & set(gist.ids):
        raise DataError(f"the text contains {gist.tokens[0]}", hint="The gist is put before it; leave it out.")
    if not ids:
        raise DataError("there is no text to go on from behind the gist", hint="Give a TEXT of one token or more.")
    return ids


def _behind(text: str, gist: GistTokens, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of a text behind a gist token, which some tokenizers begin otherwise than that of a whole text."""
    before = encode(gist.tokens[-1], tokenizer)
    return encode(gist.tokens[-1] + text, tokenizer)[len(before) :]


def _user_turn(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return what the chat template writes behind a system turn: a user's turn, and the beginning of an answer."""
    head = _system_turn(_SOME, tokenizer)
    whole = _chat([_turn("system", _SOME), _turn("user", text)], tokenizer)
    if not whole.startswith(head):
        raise DataError(
            "the chat template does not write a system turn by itself, so no gist can stand behind it",
            hint="Put the prompt into plain text: leave out --chat.",
        )
    return whole[len(head) :]


def _system_turn(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    return templated([_turn("system", prompt)], tokenizer, "the prompt")


def _chat(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> str:
    return templated(messages, tokenizer, "the text", answer=True)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
