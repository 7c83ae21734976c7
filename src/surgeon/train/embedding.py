"""The task of an encoder without a head, as sentence embeddings are made with: to embed texts as a teacher does.

The loss is the mean squared difference of the two embeddings, the distillation of Reimers and Gurevych 2020
(arXiv:2004.09813) and of sentence-transformers' layer reduction.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from surgeon.checkpoint.source import Source
from surgeon.data.records import Document
from surgeon.errors import DataError, PlanError
from surgeon.models.split import Batch, LeftAligned, Plan, document_numbers
from surgeon.train.examples import Example, asked_and_answered
from surgeon.train.losses import sum_dtype
from surgeon.train.row_task import RowTask, attach_row_loss
from surgeon.train.store import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOLING = "1_Pooling/config.json"  # of sentence-transformers
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class EmbeddingTask(RowTask):
    """Texts, each in a row, with special tokens. `pooling` is "mean" of all tokens, or "cls", the first one."""

    pooling: str = "mean"
    unit: ClassVar[str] = "squared distance of embeddings"

    @property
    def fingerprint(self) -> str | None:
        """Texts are tokenised with special tokens."""
        return "embeddings"

    def examples(
        self, documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, first: int, length: int
    ) -> list[Example]:
        """Return the example of each text, whose last token counts for it. One longer than `length` loses its end."""
        made = []
        for document in documents:
            if document.messages:
                raise DataError(f"{document.where} is a chat, not a text", hint='Write it so: {"text": "..."}')
            ids = list(tokenizer("\n".join(document.parts), verbose=False)["input_ids"])
            if len(ids) < 2:
                raise DataError(f"{document.where} has fewer than two tokens", hint="Take the record out.")
            is_cut = len(ids) > length
            if is_cut:
                ids = ids[: length - 1] + ids[-1:]
            made.append(asked_and_answered(ids[:-1], ids[-1:], is_cut=is_cut))
        return made

    def kind(self, source: Source) -> Any:
        """Return the Auto class of models without a head."""
        from transformers import AutoModel

        return AutoModel

    def teacher(self, model: Any) -> Any:
        """Return the loaded model, in evaluation mode."""
        return model.eval().requires_grad_(False)

    def attach(self, model: Any, objective: Any, teacher: Any) -> None:
        """Make the model return how far its embeddings are from the teacher's. Raises PlanError for another width."""
        width, others = (each.config.get_text_config().hidden_size for each in (model, teacher))
        if width != others:
            raise PlanError(
                f"the model embeds in {width} numbers, its teacher in {others}",
                hint="The teacher is the model that this one was cut from, in depth alone.",
            )
        attach_row_loss(model, partial(_loss, teacher, self.pooling), _plan)


def pooling_of(source: Source) -> str:
    """Return how a sentence-transformers folder pools: "mean" or "cls"; without its file "mean".

    Raises PlanError for another way.
    """
    if POOLING not in source.companions:
        return "mean"
    config = json.loads(Path(source.fetch(POOLING)).read_text(encoding="utf-8"))
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    modes = [_MODES.get(name, name) for name in modes] or [str(config.get("pooling_mode", "mean"))]
    if modes not in (["mean"], ["cls"]):
        raise PlanError(
            f"{source.label} pools by {', '.join(modes)}, and only mean and cls are known here",
            hint=f"See {POOLING}; train it with sentence-transformers.",
        )
    return str(modes[0])


def pooled(forward: Callable[..., Any], read: LeftAligned, pooling: str, *, padding: int | None) -> Tensor:
    """Return the embeddings of texts, shape (B, D), in float32 at least, by a model's forward pass."""
    states: Tensor = forward(input_ids=read.padded(padding), attention_mask=read.mask)[0]
    states = states.to(sum_dtype(states.dtype))
    if pooling == "cls":
        return states[:, 0]
    weights = read.mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _plan(batch: Batch) -> Plan:
    """Return the texts of a batch, and which of its rows are one."""
    read = LeftAligned.of(batch, document_numbers(batch["position_ids"]) == 1)
    return {"read": vars(read), "rows": (batch["labels"] != IGNORED).any(1).nonzero()[:, 0]}


def _loss(teacher: Any, pooling: str, model: Any, own: Callable[..., Any], plan: Plan) -> tuple[Tensor, Tensor]:
    """Return the sum of the squared distances of embeddings from the teacher's, and how many texts it is of."""
    read, rows = LeftAligned(**plan["read"]), plan["rows"]
    with torch.no_grad():
        expected = pooled(teacher, read, pooling, padding=teacher.config.get_text_config().pad_token_id)
    embedded = pooled(own, read, pooling, padding=model.config.get_text_config().pad_token_id)
    loss = (embedded - expected).index_select(0, rows).square().mean(-1).sum()
    return loss, torch.full((), len(rows), device=loss.device)
