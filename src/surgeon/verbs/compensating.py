"""The compensation of a cut: output maps that are solved on a text, or read from a file, joined to its plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.halves import MLP
from surgeon.anatomy.outputs import check_adds, output_maps
from surgeon.checkpoint.source import Source
from surgeon.errors import PlanError
from surgeon.plan.plan import Plan
from surgeon.plan.solved import AGAIN, RepairsFile, SolvedWriter, bytes_of, with_repairs
from surgeon.progress import meter
from surgeon.transforms.seams import Site, Sites, find_sites

if TYPE_CHECKING:
    from torch import Tensor

    from surgeon.measure.calibration import Calibration
    from surgeon.measure.compensation import Rows
    from surgeon.measure.repair import Repair
    from surgeon.models.streaming import StreamedModel

# The entry of a map in the record, and its solved tensors by the names that they have in the result.
Solved = tuple[Mapping[str, Any], Mapping[str, "Tensor"]]
MOST_NAMED = 6  # maps that have a note of their own


@dataclass(frozen=True, eq=False)
class Texts:
    """The text of a fit, and the text that the fit does not see: it chooses the ridge, and judges.

    Without an `eval_text` that is one of every eight rows of the first.
    """

    text: "Calibration"
    eval_text: "Calibration | None" = None

    @cached_property
    def held(self) -> "Calibration":
        """The text that the fit does not see."""
        if self.eval_text is not None:
            return self.eval_text
        from surgeon.data.rows import digest

        tokens = self.text.tokens[self._mask]
        origin = {**self.text.origin, "sha256": digest(tokens), "rows": len(tokens), "held_out_of": len(self._mask)}
        return replace(self.text, tokens=tokens, origin=origin, notes=())

    @cached_property
    def _mask(self) -> "Tensor":
        from surgeon.measure.repair import held_out

        return held_out(len(self.text.tokens))

    def rows(self) -> "Rows":
        """Return the rows of both, the shorter ones padded, and which of them are held out."""
        import torch
        from torch.nn.functional import pad

        from surgeon.measure.compensation import Rows

        if self.eval_text is None:
            return Rows(self.text.tokens, self._mask)
        parts = self.text.tokens, self.eval_text.tokens
        longest = max(part.shape[1] for part in parts)
        tokens = torch.cat([pad(part, (0, longest - part.shape[1])) for part in parts])
        real = torch.cat([torch.arange(longest).expand(len(part), -1) < part.shape[1] for part in parts])
        held = torch.arange(len(tokens)) >= len(parts[0])
        return Rows(tokens, held, real)


@dataclass(frozen=True)
class Compensation:
    """What was solved, as the receipt has it: `record`, None where nothing is measured yet. `sites` are the maps."""

    sites: Sites
    record: Mapping[str, Any] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was solved and what it changed, in sentences for the card."""
        if self.record is None:
            return self.sites.notes
        maps: Sequence[Mapping[str, Any]] = self.record["maps"]
        taken = [each for each in maps if each["taken"]]
        told = [_told(each) for each in maps]
        if len(told) > MOST_NAMED:
            before, after = (sum(each["held_out"][i] for each in maps) / len(maps) for i in (0, 1))
            errors = f"the states' relative error on held-out rows is {after:.3f} on average, {before:.3f} before"
            told = [f"compensated: {len(taken)} of {len(maps)} output maps were solved anew; {errors}"]
        return (*told, *self.sites.notes)

    def rows(self) -> list[tuple[str, str]]:
        """Return what was solved as rows for people, or what would be; of many maps how many they are."""
        if self.record is None:
            shown = [(site.map.weight, f"would be solved, {site.reason}") for site in self.sites.sites]
            many = f"{len(shown)} output maps would be solved"
        else:
            shown = [(each["tensors"][0], _row(each)) for each in self.record["maps"]]
            many = self.notes[0] if self.notes else ""
        return shown if len(shown) <= MOST_NAMED else [("compensation", many)]

    def to_dict(self) -> dict[str, Any]:
        """Return what was solved as `--json` prints it, or the maps that would be."""
        if self.record is not None:
            return dict(self.record)
        return {"maps": [{"tensors": [site.map.weight], "reason": site.reason} for site in self.sites.sites]}


def _row(entry: Mapping[str, Any]) -> str:
    done = "solved" if entry["taken"] else "left as it was"
    before, after = entry["held_out"]
    return f"{done}, {entry['reason']}: error of the states {before:.3f} → {after:.3f} on held-out rows"


def _told(entry: Mapping[str, Any]) -> str:
    before, after = entry["held_out"]
    errors = f"the states' relative error on held-out rows is {after:.3f}, {before:.3f} before"
    name = entry["tensors"][0]
    if not entry["taken"]:
        return f"not compensated: a new {name} does not lower the states' error on held-out rows ({errors})"
    return f"compensated: {name} was solved anew {entry['reason']}; {errors} (ridge {entry['ridge']:g})"


def check_possible(anatomy: Anatomy, *, in_depth: bool) -> None:
    """Raises PlanError for a model that no choice of layers would make one that can be compensated."""
    check_adds(anatomy)
    if in_depth and not any(half == MLP for _, half in output_maps(anatomy)):
        raise PlanError(
            f"no layer of this {anatomy.model_type} has an MLP with one output map: its experts have one each",
            hint="Leave out --compensate.",
        )


def unfit(texts: Texts, anatomy: Anatomy, device: str) -> str | None:
    """Return why a cut is not compensated unless somebody asks for it, None where it is.

    A fit holds five matrices of neurons x neurons in float64.
    """
    from surgeon.models.device import available_memory

    if texts.eval_text is None and len(texts.text.tokens) < 2:
        return "one row of text leaves none to judge a fit by"
    needed = 5 * 8 * max((anatomy.sizes.get(axis, 0) for axis in ("ffn", "shared_ffn")), default=0) ** 2
    if needed > available_memory(device) // 2:
        return f"it takes {text.size(needed)}, more than half of what is free; --compensate insists"
    return None


def can_always_be(anatomy: Anatomy) -> bool:
    """Return whether every cut of a model can be compensated, wherever it begins."""
    try:
        check_adds(anatomy)
        maps = output_maps(anatomy)
    except PlanError:
        return False
    return len(anatomy.stacks) == 1 and all((layer, MLP) in maps for layer in range(anatomy.depth))


def compensated(
    source: Source,
    begun: Plan,
    plan: Plan,
    anatomy: Anatomy,
    texts: "Texts | RepairsFile",
    *,
    device: str,
) -> tuple[Source, Plan, Compensation]:
    """Return the source and the plan of a compensated cut, and what was solved.

    `plan` is the cut of the model of `anatomy`, which `begun` makes of the source. The maps are solved on texts, or
    read from a file.
    """
    sites = find_sites(anatomy, plan)
    whole = begun.then(plan)
    if isinstance(texts, RepairsFile):
        _check_same(texts, source, sites)
        joined, solved = with_repairs(source, whole, texts)
        return joined, solved, Compensation(sites, {**texts.record, **texts.provenance()})
    source, whole, record = _solved(source, whole, sites, texts, device)
    return source, whole, Compensation(sites, record)


def _solved(
    source: Source, plan: Plan, sites: Sites, texts: "Texts", device: str
) -> tuple[Source, Plan, Mapping[str, Any]]:
    from surgeon.measure.compensation import compensate, num_passes
    from surgeon.measure.scoring import streamed_model
    from surgeon.plan.planned import PlannedSource

    rows = texts.rows()
    whole = streamed_model(source, device, resident=False)
    cut = streamed_model(PlannedSource(source, plan), device, resident=False)
    progress = meter("compensating", rows.tokens.numel(), num_passes(sites))
    solved = compensate(whole, cut, rows, sites, progress=progress)
    found = ((entry_of(site, repair), repair.tensors) for site, repair in solved)
    return with_solved(source, plan, texts, cut, found, cut=sites.digest)


def with_solved(
    source: Source, plan: Plan, texts: Texts, result: "StreamedModel", found: Iterable[Solved], **more: Any
) -> tuple[Source, Plan, Mapping[str, Any]]:
    """Return the source and the plan with solved tensors in place of their own, and the record of what was solved.

    `result` is the model that `plan` makes, `more` goes into the record. Where none is better, all stays as it is.
    """
    writer, maps = SolvedWriter(RepairsFile, "the compensation"), []
    for entry, tensors in found:
        maps.append(entry)
        for name, tensor in tensors.items():
            writer.add(name, result.anatomy.spec.tensors[name], bytes_of(tensor))
    read = {"text": dict(texts.text.origin), "held_out": dict(texts.held.origin)}
    record = {**more, "model": source.provenance(), **read, "maps": maps}
    repairs = writer.finish(record)
    if repairs is None:
        return source, plan, record
    joined, solved = with_repairs(source, plan, repairs)
    return joined, solved, {**record, **repairs.provenance()}


def _check_same(repairs: RepairsFile, source: Source, sites: Sites) -> None:
    """Raises PlanError where repairs are of another model, or of another cut of it."""
    model, here = repairs.record.get("model"), source.provenance()
    known = [key for key in ("fingerprint", "commit") if isinstance(model, Mapping) and key in model and key in here]
    if not isinstance(model, Mapping) or not known or any(model[key] != here[key] for key in known):
        raise PlanError(f"the repairs in {repairs.label} are of other weights than those of {source.label}", hint=AGAIN)
    if repairs.record.get("cut") != sites.digest:
        raise PlanError(f"the repairs in {repairs.label} are of another cut than this one", hint=AGAIN)


def entry_of(site: Site, repair: "Repair") -> dict[str, Any]:
    """Return what was solved as the receipt has it: errors are before and after."""
    names = [site.map.weight, *([] if site.map.bias is None else [site.map.bias])]
    return {
        "tensors": names,
        "reason": site.reason,
        "ridge": repair.ridge,
        "fit": list(repair.fit),
        "held_out": list(repair.held),
        "tokens": list(repair.num_tokens),
        "taken": repair.is_taken,
    }
