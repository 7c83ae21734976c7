"""The task of a sequence classifier: the class of a text, by cross-entropy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from surgeon.checkpoint.source import Source
from surgeon.data.records import Document
from surgeon.errors import DataError, MeasureError, PlanError
from surgeon.models.loading import HINT, config_of
from surgeon.models.skeleton import auto_class
from surgeon.models.split import Batch, LeftAligned, Plan, document_numbers
from surgeon.train.examples import Example, asked_and_answered
from surgeon.train.losses import sum_dtype
from surgeon.train.row_task import RowTask, attach_row_loss
from surgeon.train.store import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM_HINT = 'Write a record so: {"text": "I liked it.", "label": "positive"}; a label may be a number too.'


@dataclass(frozen=True)
class ClassTask(RowTask):
    """Texts with a label, for a model of transformers with a sequence classifier's head; one in a row.

    An example is the tokens of a text, with the tokenizer's special tokens, and after them the number of its class: the
    target of the last token. `classes` are the names of the classes by their numbers.
    """

    classes: Mapping[int, str] = field(default_factory=dict)
    unit: ClassVar[str] = "nats a text"

    @property
    def fingerprint(self) -> str | None:
        """The names of the classes, which decide what a label is."""
        return f"classes {sorted(self.classes.items())}"

    def examples(
        self, documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, first: int, length: int
    ) -> list[Example]:
        """Return the example of each record. A text longer than `length` - 1 tokens loses its end."""
        made = []
        for document in documents:
            if document.label is None or len(document.parts) != 1:
                raise DataError(f"{document.where} is no text with a label", hint=FORM_HINT)
            number = class_of(document.label, self.classes, document.where)
            ids = list(tokenizer(document.parts[0], verbose=False)["input_ids"])
            if not ids:
                raise DataError(f"{document.where}: 'text' has no token", hint="Take the record out.")
            is_cut = len(ids) > length - 1
            if is_cut:
                ids = ids[: length - 2] + ids[-1:]  # the last one is a special token, where there are any
            made.append(asked_and_answered(ids, [number], is_cut=is_cut))
        return made

    def kind(self, source: Source) -> Any:
        """Return the Auto class of classifiers."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def attach(self, model: Any, objective: Any, teacher: Any) -> None:
        """Make the model return the cross-entropy of classes. Raises PlanError with a teacher, or adapters."""
        if teacher is not None:
            raise PlanError("a classifier has no teacher here", hint="Leave out --teacher.")
        attach_row_loss(model, _loss, _plan)


def classes_of(source: Source) -> dict[int, str]:
    """Return the names of a classifier's classes by their numbers, as transformers reads them from the config.

    Raises MeasureError for a model that is no classifier, or one of another kind.
    """
    if auto_class(source).__name__ != "AutoModelForSequenceClassification":
        raise MeasureError(
            f"{source.label} is no sequence classifier, by the classes that its config.json names",
            hint="Is its head there? surgeon inspect shows what the checkpoint holds.",
        )
    config = config_of(source, hint=HINT)
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise MeasureError(
            f"{source.label} gives numbers or several labels, not one class of a text",
            hint="A classifier of one label of several is needed here.",
        )
    return {int(number): str(name) for number, name in config.id2label.items()}


def class_of(label: str | int, classes: Mapping[int, str], where: str) -> int:
    """Return the number of a class: by its name, else by its number. Raises DataError for an unknown one."""
    by_name = {name: number for number, name in classes.items()}
    if isinstance(label, str) and label in by_name:
        return by_name[label]
    number = int(label) if isinstance(label, int) or label.isdecimal() else None
    if number is None or number not in classes:
        known = ", ".join(f"{number} = {name}" for number, name in list(classes.items())[:8])
        raise DataError(f"{where}: 'label' is {label!r}, which is no class of the model", hint=f"It has {known}.")
    return number


def _plan(batch: Batch) -> Plan:
    """Return the texts of a batch, which of its rows have a class, and the numbers of their classes."""
    input_ids, labels, position_ids = batch["input_ids"], batch["labels"], batch["position_ids"]
    chosen = labels != IGNORED
    last = chosen.long().argmax(1)[:, None]
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    read = LeftAligned.of(batch, (document_numbers(position_ids) == 1) & (place <= last))
    rows = chosen.any(1).nonzero()[:, 0]  # a row that only fills a batch has no label
    return {"read": vars(read), "rows": rows, "classes": labels[chosen]}


def _loss(model: Any, own: Callable[..., Any], plan: Plan) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy of each row's class, and how many rows have one."""
    read, targets = LeftAligned(**plan["read"]), plan["classes"]
    ids = read.padded(model.config.get_text_config().pad_token_id)
    logits = own(input_ids=ids, attention_mask=read.mask).logits.index_select(0, plan["rows"])
    logits = logits.to(sum_dtype(logits.dtype))
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, torch.full((), len(targets), device=loss.device)
