"""The accuracy of a sequence classifier: how often its likeliest class is the label of a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source
from surgeon.data.chats import checked_text
from surgeon.data.documents import RecordForm, records
from surgeon.data.records import chosen_columns
from surgeon.errors import DataError, MeasureError
from surgeon.evals.answers import of_records
from surgeon.evals.compare import Scored
from surgeon.evals.evaluation import EvalContext, Evaluation, sha256_of
from surgeon.evals.options import BATCH_SIZE, EvaluationOptions
from surgeon.models.loading import load_on
from surgeon.models.skeleton import auto_class
from surgeon.train.classifying import FORM_HINT, class_of, classes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = RecordForm(("text", "label"), "labelled texts", "records", FORM_HINT)
CUT = "{count} of {total} texts were cut to the {most} positions of {label}"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its label, as the record has it."""

    where: str
    text: str
    label: str | int


def evaluate_classes(context: EvalContext, options: EvaluationOptions) -> Evaluation:
    """Return how often the likeliest class of a text is its label."""
    records = read_labelled(options.data, samples=options.samples, columns=options.columns)
    known = [classes_of(source) for source in context.sources]
    pairs = zip(context.sources, known, strict=True)
    expected = [[class_of(record.label, names, record.where) for record in records] for _, names in pairs]
    predictions: list[dict[str, Any]] = [{"prompt": record.text, "reference": str(record.label)} for record in records]
    scored: list[Scored] = []
    notes: list[str] = []
    models = zip(context.sources, context.tokenizers, known, expected, ("", "baseline_"), strict=False)
    for source, tokenizer, names, classes, prefix in models:
        picks, num_cut = picked_classes(
            source, tokenizer, records, device=context.device, batch_size=options.batch_size or BATCH_SIZE
        )
        if num_cut:
            most = positions_of(source)
            notes.append(CUT.format(count=num_cut, total=len(records), most=most, label=source.label))
        scores = [float(pick == right) for pick, right in zip(picks, classes, strict=True)]
        for entry, pick, score in zip(predictions, picks, scores, strict=True):
            entry |= {f"{prefix}prediction": names[pick], f"{prefix}score": score}
        scored.append(of_records(source.label, {"accuracy": scores}))
    setup = context.setup(options.data, sha256_of(records), options.columns)
    return Evaluation.of(options.metric, scored, setup, notes, predictions=predictions)


def read_labelled(specs: Sequence[str], *, samples: int | None, columns: str | None = None) -> list[Labelled]:
    """Return the first `samples` records of data, all of them with None: `text`, and `label`, or these `columns`.

    Raises DataError for any other.
    """
    found = records(specs, FORM, samples=samples, columns=chosen_columns(columns, forms=[FORM.fields]))
    return [_labelled(where, record) for where, record in found]


def _labelled(where: str, record: Mapping[str, Any]) -> Labelled:
    label = record["label"]
    if type(label) is not int:
        label = checked_text(label, f"{where}: 'label'", hint=FORM_HINT)
    return Labelled(where, checked_text(record["text"], f"{where}: 'text'", hint=FORM_HINT), label)


def picked_classes(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Labelled],
    *,
    device: str,
    batch_size: int,
) -> tuple[list[int], int]:
    """Return the likeliest class of each text, and how many texts were cut to the model's positions.

    Texts are padded on the right, under a mask; without a padding token a batch is one text.
    """
    model = load_on(source, device, kind=auto_class(source))
    most = positions_of(source)
    options = {} if most is None else {"truncation": True, "max_length": most}
    ids = [tokenizer(record.text, verbose=False, **options)["input_ids"] for record in records]
    num_cut = 0 if most is None else sum(len(tokenizer(r.text, verbose=False)["input_ids"]) > most for r in records)
    if empty := next((record for record, tokens in zip(records, ids, strict=True) if not tokens), None):
        raise DataError(f"{empty.where}: 'text' has no token", hint="Take the record out.")
    pads = tokenizer.pad_token_id is not None and model.config.get_text_config().pad_token_id is not None
    size = batch_size if pads else 1
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    picks = [0] * len(ids)
    with torch.no_grad():
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            width = max(len(ids[index]) for index in chosen)
            pad = tokenizer.pad_token_id if pads else 0
            rows = torch.tensor([ids[index] + [pad] * (width - len(ids[index])) for index in chosen], device=device)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in chosen], device=device)
            logits = model(input_ids=rows, attention_mask=mask).logits
            if not bool(logits.isfinite().all()):
                raise MeasureError(f"{source.label} gives logits that are not finite", hint="Try --device cpu.")
            for index, pick in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                picks[index] = pick
    return picks, num_cut
