"""The end of a run: trained weights become an ordinary checkpoint, through the one way there is to write one."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint import output, receipt
from surgeon.checkpoint.derived import TrainedSource
from surgeon.checkpoint.receipt import model_card
from surgeon.checkpoint.source import CARD, RECEIPT, LocalSource, Source, spec_of
from surgeon.plan.plan import FLOAT_DTYPES, STORED_DTYPES, Cast, identity
from surgeon.surgery import Surgery, parse_size

TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")


def trained_surgery(
    source: Source, weights: Path, *, dtype: str, step: Mapping[str, Any], notes: tuple[str, ...]
) -> Surgery:
    """Return the surgery that writes the trained weights of `source`, which lie in the directory `weights`.

    With dtype "keep" each tensor is stored as the source stores it; one that the source calls otherwise, as most are.
    """
    trained = TrainedSource(source, LocalSource(weights, source.label))
    plan = identity(spec_of(trained), depth=read_anatomy(spec_of(trained)).depth)
    if dtype == "keep":
        found = Counter(item.spec.dtype for item in source.tensors.values() if item.spec.dtype in FLOAT_DTYPES)
        usual = found.most_common(1)[0][0] if found else STORED_DTYPES["float32"]
        stored = {name: item.spec.dtype for name, item in source.tensors.items()}
        tensors = {name: Cast(expr, stored.get(name, usual)) for name, expr in plan.tensors.items()}
        plan = replace(plan, tensors=tensors)
    return Surgery(trained, replace(plan, steps=({"finetune": dict(step)},), notes=(*plan.notes, *notes)))


def receipt_of(source: Source) -> dict[str, Any] | None:
    """Return the receipt of the surgery that made a local source, None where there is none."""
    return None if source.origin is None else receipt.read_receipt(source.origin)


def write_adapter(
    source: Source,
    adapter: Path,
    target: Path,
    step: Mapping[str, Any],
    *,
    command: str | None,
    overwrite: bool,
    max_shard_size: int | str,
) -> None:
    """Write a directory with an adapter alone, as PEFT does, its tokenizer, card and receipt."""
    assert parse_size(max_shard_size), "checked by the verb; an adapter is one file"
    companions = {name: source.fetch(name) for name in source.companions if name.startswith(TOKENIZER_FILES)}
    companions |= {path.name: path for path in adapter.glob("adapter_*")}
    depth = read_anatomy(spec_of(source)).depth
    record = receipt.receipt(
        source=source.provenance(),
        steps=[{"finetune": dict(step)}],
        layer_map=range(depth),
        axis_maps={},
        options={},
        command=command,
        notes=(),
    )
    page = model_card(
        title=target.name,
        base_model=source.label,
        done=f"A LoRA adapter for `{source.label}`, trained by surgeon; load it with PEFT.",
        facts={"rank": str(step["settings"]["lora"]), "steps": f"{step['steps']:,}", "tokens": f"{step['tokens']:,}"},
        command=command,
    ).replace("library_name: transformers", "library_name: peft")
    with output.staged(target, overwrite=overwrite) as stage:
        output.copy_files(stage, companions)
        output.write_files(stage, {CARD: page.encode(), RECEIPT: receipt.to_bytes(record)})
