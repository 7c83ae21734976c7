"""RegMean for `merge`: Gram matrices, measured on texts or read from files, and the plan that solves by them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import Source
from surgeon.errors import PlanError
from surgeon.options import OptionError
from surgeon.plan.expressions import Mix, Read, Regress
from surgeon.plan.grams import GRAMS, WORD, GramsFile, gram_name
from surgeon.plan.plan import Plan
from surgeon.plan.planned import PlannedSource
from surgeon.plan.solved import SolvedSource, SolvedWriter, bytes_of
from surgeon.progress import meter
from surgeon.transforms.combine import Parent

if TYPE_CHECKING:
    from torch import Tensor

    from surgeon.measure.regression import Reading

NO_DATA = "none"  # in the place of a text


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What each model's Gram matrices come from: a text, a file of them, or "none"; and how much of a text is read."""

    data: Sequence[str]
    samples: int
    sequence_length: int
    sequential: bool
    alpha: float


def check_texts(data: Sequence[str], count: int) -> None:
    """Raises OptionError unless there is one text, file of Gram matrices or "none" for each model."""
    if len(data) != count:
        hint = "Give one --data for each model, in their order: a text, a grams.safetensors, or none."
        raise OptionError("data", f"{len(data)} are given for {count} models", hint=hint)
    if all(each == NO_DATA for each in data):
        hint = "Give a text or a grams.safetensors to one of them, or use --method linear."
        raise OptionError("data", "no model has a text", hint=hint)


def regressed(
    joined: Source, plan: Plan, parents: Sequence[Parent], sources: Sequence[Source], texts: Texts
) -> tuple[SolvedSource, Plan, dict[str, Any]]:
    """Return the source with the Gram matrices, the plan that solves by them, and what the receipt says of them.

    `plan` makes the mean of the models; linear maps that have Gram matrices take the place of its sums.
    """
    from surgeon.measure.regression import linear_maps
    from surgeon.models.streaming import StreamedModel

    first = StreamedModel(sources[0])
    maps = linear_maps(first)
    if not maps:
        raise PlanError("no layer of the model keeps linear maps as its files do", hint="Use --method linear.")
    files = [GramsFile.at(Path(each), each) if _is_file(each) else None for each in texts.data]
    known = [
        None if file is None else _entry(file, parent, number, maps)
        for number, (file, parent) in enumerate(zip(files, parents, strict=True), 1)
    ]
    if texts.sequential and any(known) and not all(known[k] or d == NO_DATA for k, d in enumerate(texts.data)):
        hint = "Give a text to each model, or files alone."
        raise OptionError("sequential", "Gram matrices from a file were not measured in this turn", hint=hint)
    writer, record = SolvedWriter(GramsFile, "the Gram matrices"), list[dict[str, Any]]()
    readings: list[Reading | None] = []
    for number, (parent, source, data, entry) in enumerate(zip(parents, sources, texts.data, known, strict=True), 1):
        reading, told = None, entry
        if entry is None and data != NO_DATA:
            reading, told = _reading(source, data, maps, texts)
        readings.append(reading)
        if told is not None:
            record.append({**told, "model": parent.identity, "number": str(number)})
    numbers = [each is not None or entry is not None for each, entry in zip(readings, known, strict=True)]
    solved = _solved(plan, parents, maps, numbers, texts.alpha)
    for number, (file, entry) in enumerate(zip(files, known, strict=True), 1):
        if file is not None and entry is not None:
            _copy(writer, file, entry, number)
    _measure(writer, readings, joined, plan, solved, texts)
    grams = writer.finish({"models": record, "sequential": texts.sequential})
    assert grams is not None, "a model has a text"
    step = {"alpha": texts.alpha, "sequential": texts.sequential, "grams": grams.sha256, "maps": len(maps)}
    step["data"] = [WORD if is_known else NO_DATA for is_known in numbers]
    return SolvedSource(joined, grams, WORD), solved, step


def _is_file(data: str) -> bool:
    return data.endswith(".safetensors") or (Path(data) / GRAMS).is_file()


def _entry(file: GramsFile, parent: Parent, number: int, maps: Mapping[str, str | None]) -> Mapping[str, Any]:
    entry = file.of(parent.identity, number)
    if entry is None:
        hint = "Gram matrices belong to the weights that they were measured with."
        raise PlanError(f"{file.path} holds no Gram matrices of {parent.label}", hint=hint)
    lacking = next((name for name in maps if gram_name(entry["number"], name) not in file.tensors), None)
    if lacking is not None:
        raise PlanError(f"{file.path} holds no Gram matrix of {lacking!r}", hint="Measure again: give the text.")
    return entry


def _reading(
    source: Source, data: str, maps: Mapping[str, str | None], texts: Texts
) -> "tuple[Reading, dict[str, Any]]":
    from surgeon.measure.calibration import read_calibration
    from surgeon.measure.regression import Reading
    from surgeon.models.streaming import StreamedModel

    text = read_calibration(source, [data], samples=texts.samples, sequence_length=texts.sequence_length)
    return Reading(StreamedModel(source), text.tokens, maps), {"text": dict(text.origin), "tokens": text.tokens.numel()}


def _solved(
    plan: Plan, parents: Sequence[Parent], maps: Mapping[str, str | None], known: Sequence[bool], alpha: float
) -> Plan:
    """Return the plan whose linear maps, and their biases, are solved by the Gram matrices of the joined file."""
    tensors = dict(plan.tensors)
    order = sorted(range(len(parents)), key=lambda number: parents[number].identity)
    table = parents[0].anatomy
    for name, bias in maps.items():
        mean = tensors[name]
        if not isinstance(mean, Mix):  # all weight is on one model
            continue
        solved = Regress(
            maps=mean.parts,
            biases=() if bias is None else tuple(parents[number].tensors[bias] for number in order),
            grams=tuple(Read(f"{WORD}:{gram_name(number + 1, name)}") if known[number] else None for number in order),
            weights=mean.weights,
            alpha=alpha,
            dtype=mean.dtype,
            is_transposed=table.row(name)[0].kind == "conv1d",
        )
        tensors[name] = solved
        if bias is not None:
            tensors[bias] = replace(solved, is_bias=True, dtype=table.spec.tensors[bias].dtype)
    return replace(plan, tensors=tensors)


def _copy(writer: SolvedWriter[GramsFile], file: GramsFile, entry: Mapping[str, Any], number: int) -> None:
    prefix = f"{entry['number']}/"
    for name, stored in file.tensors.items():
        if name.startswith(prefix):
            content = bytearray(stored.end - stored.start)
            with file.parts({stored.file: [(stored.start, stored.end)]})[stored.file].opened() as opened:
                opened.read_into(content, stored.start)
            writer.add(f"{number}/{name.removeprefix(prefix)}", stored.spec, memoryview(content))


def _add(writer: SolvedWriter[GramsFile], number: int, name: str, gram: "Tensor") -> None:
    import torch

    from surgeon.checkpoint.header import TensorSpec

    content = bytes_of(gram.to(torch.float32))
    writer.add(gram_name(number, name), TensorSpec("F32", tuple(gram.shape)), content)


def _measure(
    writer: SolvedWriter[GramsFile],
    readings: "Sequence[Reading | None]",
    joined: Source,
    plan: Plan,
    solved: Plan,
    texts: Texts,
) -> None:
    from surgeon.measure.regression import grams_in_turn, grams_of
    from surgeon.models.streaming import StreamedModel

    read = [(number, each) for number, each in enumerate(readings, 1) if each is not None]
    if not read:
        return
    progress = meter("Gram matrices", sum(each.tokens.numel() for _, each in read), read[0][1].model.depth)
    if not texts.sequential:
        for number, each in read:
            for name, gram in grams_of(each, progress=progress):
                _add(writer, number, name, gram)
        return

    def merged(layer: int, found: "Mapping[tuple[int, str], Tensor]") -> StreamedModel:
        here = SolvedWriter(GramsFile, "a layer's Gram matrices")
        for (number, name), gram in found.items():
            _add(here, number + 1, name, gram)
        file = here.finish({"models": []})
        assert file is not None, "a layer has maps"
        source = SolvedSource(joined, file, WORD)
        names = {name for _, name in found}
        names |= {each for name in names if (each := read[0][1].maps[name]) is not None}
        tensors = {name: solved.tensors[name] if name in names else expr for name, expr in plan.tensors.items()}
        return StreamedModel(PlannedSource(source, replace(plan, tensors=tensors)))

    begun = StreamedModel(PlannedSource(joined, plan))
    for number, name, gram in grams_in_turn(readings, begun, merged, progress=progress):
        _add(writer, number + 1, name, gram)
