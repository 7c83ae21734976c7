"""The task of an encoder-decoder: its encoder reads a prompt, its decoder learns the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from surgeon.data.records import ANSWER_HINT, Document
from surgeon.errors import DataError, PlanError
from surgeon.models.split import AttentionLayout, Seq2Seq
from surgeon.train.examples import Example, asked_and_answered
from surgeon.train.row_task import RowTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerTask(RowTask):
    """Prompts with answers, both with the special tokens that the tokenizer puts around a text; one in a row.

    The loss is the cross-entropy of the answer's tokens, as transformers computes it of `labels`.
    """

    @property
    def fingerprint(self) -> str | None:
        """Prompts and answers are tokenised each by itself."""
        return "encoder and decoder"

    def examples(
        self, documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, first: int, length: int
    ) -> list[Example]:
        """Return the example of each record. One longer than `length` loses the end of its prompt, or its answer's."""
        made = []
        for document in documents:
            if document.messages or len(document.parts) < 2:
                raise DataError(
                    f"{document.where} has no prompt with an answer, which an encoder-decoder learns from",
                    hint=ANSWER_HINT.replace("; or messages that end with the assistant's", ""),
                )
            *prompt, last = document.parts
            asked = list(tokenizer("\n".join(prompt), verbose=False)["input_ids"])
            answer = list(tokenizer(text_target=last, verbose=False)["input_ids"])
            if not asked or not answer:
                raise DataError(f"{document.where} has an empty prompt or answer", hint="Take the record out.")
            is_cut = len(asked) + len(answer) > length
            if is_cut:
                answer = answer[: length - 1]
                room = length - len(answer)
                asked = asked[: room - 1] + asked[-1:]
            made.append(asked_and_answered(asked, answer, is_cut=is_cut))
        return made

    def layout(self, model: Any) -> AttentionLayout:
        """Return that the encoder reads the prompt. Raises PlanError for a decoder whose first token is unknown."""
        start = model.config.decoder_start_token_id
        labels = torch.tensor([[5, 6, 7]], device=model.device)
        make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        begins = [start] if make is None else make(labels=labels)[0, :1].tolist()
        if start is None or begins != [start]:
            raise PlanError(
                f"the decoder of {type(model).__name__} begins an answer with a token that config.json does not name",
                hint="Set decoder_start_token_id, if the model has one; else train it with a script of transformers.",
            )
        return Seq2Seq()
