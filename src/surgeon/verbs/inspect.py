"""The verb `inspect`: the anatomy of a checkpoint, and its differences from another."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.config import layer_kinds
from surgeon.anatomy.halves import MLP
from surgeon.anatomy.layer_table import LayerRow, layer_lines, layer_rows
from surgeon.anatomy.split_layers import split_layers
from surgeon.checkpoint.comparing import are_equal
from surgeon.checkpoint.receipt import read_receipt
from surgeon.checkpoint.source import LocalSource, Source, StoredTensor, spec_of
from surgeon.options import Checked, option, revision_option, takes
from surgeon.plan.plan import changed_keys
from surgeon.showing import Shown
from surgeon.surgery import open_source
from surgeon.transforms.settling import is_copy, predictors_in, stored_tie

STORED_TIE = {
    None: "",
    True: "  (the head is stored too, and equals the embedding)",
    False: "  (config.json says so, but the stored head differs from the embedding: transformers does not tie it)",
}
MADE_BY = 300  # characters of a step in a receipt; --json has them all


@dataclass(frozen=True, slots=True, repr=False)
class ModelDifference(Shown):
    """The differences of a checkpoint from `other`. Tensors are named as in the checkpoint itself.

    `layer_map` gives the layer of `other` that each layer was compared with, and `mlp_map` that of its MLP where halves
    of two layers were made one; then `layer_map` is of its attention. Where the checkpoint was made from the
    other, `axis_maps` gives the source of each wider axis, in runs of (first position there or -1, how many). `same`
    and `changed` compare values; both are empty (and `compared` is false) unless both checkpoints lie on this machine.
    """

    other: str
    layer_map: tuple[int | None, ...]
    axis_maps: Mapping[str, list[list[int]]]
    config: Mapping[str, tuple[Any, Any]]  # key: value in the other, value here
    added: tuple[str, ...]  # tensors that the other has not
    removed: tuple[str, ...]  # tensors of the other that are not here
    reshaped: Mapping[str, tuple[str, str]]  # tensor: dtype and shape in the other, and here
    compared: bool
    same: tuple[str, ...]
    changed: tuple[str, ...]
    mlp_map: tuple[int | None, ...] | None = None

    @property
    def headline(self) -> str:
        """How many tensors and config keys differ, and from which model."""
        tensors = len(self.added) + len(self.removed) + len(self.reshaped) + len(self.changed)
        return f"{tensors} tensors and {len(self.config)} config keys from {self.other}"

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as `--json` prints it."""
        return {
            "other": self.other,
            "layer_map": list(self.layer_map),
            **({} if self.mlp_map is None else {"mlp_map": list(self.mlp_map)}),
            "axis_maps": dict(self.axis_maps),
            "config": {key: {"there": there, "here": here} for key, (there, here) in self.config.items()},
            "added": list(self.added),
            "removed": list(self.removed),
            "reshaped": {name: {"there": there, "here": here} for name, (there, here) in self.reshaped.items()},
            "compared": self.compared,
            "same": list(self.same),
            "changed": list(self.changed),
        }

    def to_text(self) -> str:
        """Return the difference for people."""
        lines = [
            ("against", self.other),
            ("layers held against", text.sources(self.layer_map, self.mlp_map).removeprefix("source layers ")),
            *((f"axis {axis}", _axis(runs)) for axis, runs in self.axis_maps.items()),
            *((f"config {key}", f"{text.brief(old)} → {text.brief(new)}") for key, (old, new) in self.config.items()),
        ]
        if self.compared:
            lines += [
                ("tensors equal", f"{len(self.same)}"),
                ("tensors changed", text.listing(self.changed)),
            ]
        else:
            lines += [("values", "not compared: both checkpoints must be directories")]
        changes = Counter(self.reshaped.values() if len(self.reshaped) <= 10 else map(_dtypes, self.reshaped.values()))
        lines += [("in another form", f"{count}  ({old} → {new})") for (old, new), count in changes.most_common(10)]
        lines += [("only here", text.listing(self.added)), ("only there", text.listing(self.removed))]
        return text.rows(lines)


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """The anatomy of a checkpoint, its sizes in parameters and bytes, and where its tensors lie.

    For example:

        inspection = surgeon.inspect("gpt2-large")
        print(inspection)  # as the command does
        print(inspection.layers[0].attention, inspection.layers[0].parameters)
        inspection.draw().savefig("layers.png")
    """

    label: str
    anatomy: Anatomy
    tensors: Mapping[str, StoredTensor]
    receipt: Mapping[str, Any] | None
    difference: ModelDifference | None = None
    stored_tie: bool | None = None  # whether a head that is stored, and tied by the config, equals the embedding

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by part: embedding, attention, mlp and norm; without a table: layers, and everything else."""
        counts: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            counts[self._part(name)] += tensor.spec.num_parameters
        return dict(counts.most_common())

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes that a config gives, and how many heads share a key-value head; {} without a table."""
        family = self.anatomy.family
        shown = () if family is None else tuple(family.sizes) if family.is_partial else (*family.sizes, "group")
        return {axis: self.anatomy.sizes[axis] for axis in shown if axis in self.anatomy.sizes}

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes by dtype."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.spec.dtype] += tensor.spec.nbytes
        return dict(counts.most_common())

    @property
    def tied(self) -> bool | None:
        """Whether the output head is the embedding: it is not stored, or a copy. None where no table can say."""
        if self.stored_tie is not None:
            return self.stored_tie
        if self.anatomy.whole_family is None:
            return self.anatomy.spec.config.get("tie_word_embeddings")
        return not any(self.anatomy.row(name)[0].kind == "head" for name in self.tensors)

    @cached_property
    def layers(self) -> tuple[LayerRow, ...]:
        """What each layer is: its attention and window, its MLP or experts, its parameters."""
        return layer_rows(self.anatomy)

    @property
    def headline(self) -> str:
        """The model, its type, its depth and its size."""
        spec, depth = self.anatomy.spec, self.anatomy.depth
        size = f"{spec.num_parameters:,} parameters, {text.size(spec.nbytes)}"
        return f"{self.label}, {self.anatomy.model_type}, {depth} layers, {size}"

    @property
    def layer_kinds(self) -> list[str] | None:
        """The attention kind of each layer, None where all are alike."""
        return layer_kinds(self.anatomy.spec.config, self.anatomy.depth)

    def to_dict(self, *, tensors: bool = False, names: str = "*") -> dict[str, Any]:
        """Return the inspection as `--json` prints it; with `tensors`, those whose names match the pattern `names`."""
        spec = self.anatomy.spec
        result: dict[str, Any] = {
            "model": self.label,
            "model_type": self.anatomy.model_type,
            "table": self.anatomy.family is not None,
            "layers": self.anatomy.depth,
            "stacks": {stack.prefix: stack.depth for stack in self.anatomy.stacks},
            "sizes": self.sizes,
            "parameters": spec.num_parameters,
            "parameters_by_part": self.parameters,
            "bytes": spec.nbytes,
            "dtypes": self.dtypes,
            "tied": self.tied,
            "layer_kinds": self.layer_kinds,
            "per_layer": [row.to_dict() for row in self.layers],
            "files": sorted({tensor.file for tensor in self.tensors.values()}),
            "made_by": None if self.receipt is None else self.receipt.get("steps"),
        }
        if tensors:
            result["tensors"] = {
                name: {"dtype": stored.spec.dtype, "shape": list(stored.spec.shape), "file": stored.file}
                for name, stored in self.matching(names).items()
            }
        return result | ({"against": self.difference.to_dict()} if self.difference else {})

    def to_text(self, *, tensors: bool = False, names: str = "*") -> str:
        """Return the inspection for people; with `tensors`, those whose names match the pattern `names`."""
        header, lines, pattern = layer_lines(self.layers)
        facts = self._facts() + ([("pattern", pattern)] if pattern else [])
        shown = [text.rows(facts), text.table(header, lines)]
        if tensors:
            listed = [
                (name, stored.spec.dtype, str(list(stored.spec.shape)), stored.file)
                for name, stored in self.matching(names).items()
            ]
            shown += [text.table(("tensor", "dtype", "shape", "file"), listed) if listed else f"  no tensor is {names}"]
        return "\n\n".join(shown + ([self.difference.to_text()] if self.difference else []))

    def matching(self, names: str) -> Mapping[str, StoredTensor]:
        """Return the tensors whose names match a pattern, in which * stands for anything: `*.mlp.*`."""
        return {name: stored for name, stored in self.tensors.items() if fnmatchcase(name, names)}

    def draw(self) -> Any:
        """Return a figure of matplotlib with a column for each layer: its kind, and its parameters by part."""
        from surgeon.plots.layers import draw_layers

        name = Path(self.label).name if Path(self.label).exists() else self.label
        outside = self.anatomy.spec.num_parameters - sum(row.parameters for row in self.layers)
        return draw_layers(self.layers, title=self.headline.replace(self.label, name, 1), outside=outside)

    def _facts(self) -> list[tuple[str, str]]:
        """Return what holds for the whole model."""
        anatomy, spec = self.anatomy, self.anatomy.spec
        lines = [
            ("model", self.label),
            ("type", anatomy.model_type + self._table_note()),
            ("layers", "  ".join(f"{stack.depth} ({stack.prefix}*)" for stack in anatomy.stacks)),
        ]
        if predictors := predictors_in(anatomy):
            what = f"{len(predictors)} tensors of layers that predict further tokens; no surgery keeps them"
            lines += [("MTP", what)]
        lines += [("sizes", "  ".join(f"{axis} {n}" for axis, n in self.sizes.items()))] if self.sizes else []
        total = spec.num_parameters
        lines += [("parameters", f"{total:,}")]
        lines += [(f"  {part}", f"{count:,}  ({100 * count / total:.1f} %)") for part, count in self.parameters.items()]
        lines += [
            ("bytes", f"{text.size(spec.nbytes)}  ({', '.join(f'{t} {text.size(n)}' for t, n in self.dtypes.items())})")
        ]
        lines += [("tied", {True: "yes", False: "no", None: "not known"}[self.tied] + STORED_TIE[self.stored_tie])]
        if self.receipt and self.receipt.get("steps"):
            lines += [("made by", _steps(self.receipt["steps"]))]
        return lines

    def _table_note(self) -> str:
        """Return what to know of the model type's table: nothing where it is whole."""
        if self.anatomy.family is None:
            return "  (no table: whole layers only)"
        return "" if self.anatomy.whole_family else "  (the table speaks of some axes: docs/models.md)"

    def _part(self, name: str) -> str:
        if self.anatomy.whole_family is not None:
            return self.anatomy.row(name)[1]
        return "layers" if any(stack.locate(name) for stack in self.anatomy.stacks) else "other"


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Checked):
    """The options of `inspect`."""

    against: str | os.PathLike[str] | None = option(
        "Show the differences from this model.", None, metavar="OTHER", reads=True, group="what is shown"
    )
    revision: str | None = revision_option()


@takes(InspectOptions)
def inspect(model: str | os.PathLike[str], options: InspectOptions) -> Inspection:
    """Return the anatomy of `model`, after checking that it is whole; with `against`, also its differences from that.

    Raises CheckpointError when a checkpoint is damaged, HubError when the Hub does not have it.

        print(surgeon.inspect("gpt2-large-30", against="gpt2-large"))
    """
    source = open_source(model, revision=options.revision)
    anatomy = read_anatomy(spec_of(source))
    difference = None
    if options.against is not None:
        other = open_source(options.against)
        difference = _difference(source, anatomy, other, read_anatomy(spec_of(other)))
    tie = None if (stored := stored_tie(anatomy)) is None else is_copy(source, stored)
    return Inspection(source.label, anatomy, source.tensors, _receipt_of(source), difference, tie)


def _difference(source: Source, anatomy: Anatomy, other: Source, other_anatomy: Anatomy) -> ModelDifference:
    made_by = _made_from(source, other)
    layer_map, mlp_map = _layer_map(made_by, anatomy, other_anatomy), _mlp_map(made_by, anatomy)
    of_mlp = frozenset() if mlp_map is None else _of_mlps(anatomy)
    there = {
        name: _name_in_other(name, anatomy, other_anatomy, mlp_map if mlp_map and name in of_mlp else layer_map)
        for name in source.tensors
    }
    common = [name for name in source.tensors if there[name] in other.tensors]
    specs = {name: (other.tensors[there[name] or ""].spec, source.tensors[name].spec) for name in common}
    reshaped = {
        name: (f"{old.dtype} {list(old.shape)}", f"{new.dtype} {list(new.shape)}")
        for name, (old, new) in specs.items()
        if old != new
    }
    alike = [name for name in common if name not in reshaped]
    local = isinstance(source, LocalSource) and isinstance(other, LocalSource)
    same = [name for name in alike if local and are_equal(source, name, other, there[name] or "")]
    return ModelDifference(
        other=other.label,
        layer_map=layer_map,
        axis_maps=made_by.get("axis_maps", {}),
        config=changed_keys(other.config, source.config),
        added=tuple(name for name in source.tensors if there[name] not in other.tensors),
        removed=tuple(name for name in other.tensors if name not in set(there.values())),
        reshaped=reshaped,
        compared=local,
        same=tuple(same),
        changed=tuple(name for name in alike if name not in set(same)) if local else (),
        mlp_map=mlp_map,
    )


def layers_in(source: Source, anatomy: Anatomy, other: Source, other_anatomy: Anatomy) -> tuple[int | None, ...]:
    """Return the other's layer for each layer here, None where it has none, or was made of halves of two.

    By the receipt of the one that was made from the other, whichever it is; else by number.
    """
    if not _made_from(source, other) and (made := _made_from(other, source)):
        back = {layer: place for place, layer in enumerate(_whole_layers(made, other_anatomy, anatomy))}
        return tuple(back.get(layer) for layer in range(anatomy.depth))
    return _whole_layers(_made_from(source, other), anatomy, other_anatomy)


def _whole_layers(made_by: Mapping[str, Any], anatomy: Anatomy, other_anatomy: Anatomy) -> tuple[int | None, ...]:
    """Return the other's layer for each layer here; None for a new one, and for one made of halves of two."""
    layer_map, mlp_map = _layer_map(made_by, anatomy, other_anatomy), _mlp_map(made_by, anatomy)
    pairs = zip(layer_map, mlp_map or layer_map, strict=True)
    return tuple(layer if layer == mlp else None for layer, mlp in pairs)


def _made_from(source: Source, other: Source) -> dict[str, Any]:
    """Return the receipt of a source that was made from the other one; {} for any other."""
    made_by = _receipt_of(source) or {}
    return made_by if _is_of(made_by.get("source"), other.provenance()) else {}


def _is_of(recorded: Any, provenance: Mapping[str, Any]) -> bool:
    """Return whether a receipt's source is a checkpoint: by its content, for a directory may have been moved."""
    known = [key for key in ("fingerprint", "commit") if isinstance(recorded, Mapping) and key in recorded]
    return bool(known) and all(recorded[key] == provenance.get(key) for key in known)


def _layer_map(made_by: Mapping[str, Any], anatomy: Anatomy, other_anatomy: Anatomy) -> tuple[int | None, ...]:
    """Return the other's layer for each layer here: by the receipt if this was made from the other, else by number."""
    recorded = made_by.get("layer_map")
    if isinstance(recorded, list) and len(recorded) == anatomy.depth:
        return tuple(i if isinstance(i, int) else None for i in recorded)
    return tuple(i if i < other_anatomy.depth else None for i in range(anatomy.depth))


def _mlp_map(made_by: Mapping[str, Any], anatomy: Anatomy) -> tuple[int | None, ...] | None:
    """Return the other's layer for each MLP here, by the receipt; None where those are the layers of the attentions."""
    recorded = made_by.get("mlp_map")
    return tuple(recorded) if isinstance(recorded, list) and len(recorded) == anatomy.depth else None


def _of_mlps(anatomy: Anatomy) -> frozenset[str]:
    """Return the tensors of the MLP halves. Raises PlanError where no table says which they are."""
    return frozenset(name for name, half in split_layers(anatomy).items() if half == MLP)


def _name_in_other(name: str, anatomy: Anatomy, other: Anatomy, layer_map: tuple[int | None, ...]) -> str | None:
    for stack, other_stack in zip(anatomy.stacks, other.stacks, strict=False):
        if place := stack.locate(name):
            layer = layer_map[place[0]]
            return None if layer is None else other_stack.name(layer, place[1])
    return name


def _steps(steps: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the steps of a receipt in words: "convert (from gguf), then truncate (layers 20)"."""
    written = []
    for verb, options in (pair for step in steps for pair in step.items()):
        words = text.spoken({name: value for name, value in options.items() if value not in (None, False, [], {}, "")})
        words = words if len(words) <= MADE_BY else f"{words[: MADE_BY - 3]}..."
        written.append(f"{verb} ({words})" if options else verb)
    return ", then ".join(written)


def _axis(runs: Sequence[Sequence[int]]) -> str:
    """Return a wider axis in words: "576 → 768: 576 kept, 192 new". Runs may be long, and their positions many."""
    total, new = sum(count for _, count in runs), sum(count for first, count in runs if first < 0)
    kept = reached = 0
    for first, count in sorted((first, count) for first, count in runs if first >= 0):
        kept += max(0, first + count - max(first, reached))
        reached = max(reached, first + count)
    copies = total - new - kept
    parts = [f"{kept} kept", *([f"{copies} copies"] if copies else []), *([f"{new} new"] if new else [])]
    return f"{kept} → {total}: {', '.join(parts)}"


def _dtypes(change: tuple[str, str]) -> tuple[str, str]:
    """Return a change of dtype and shape as one of dtypes alone, where that is what changed, to be counted."""
    (old, *old_shape), (new, *new_shape) = (side.split(" ", 1) for side in change)
    return (old, new) if old_shape == new_shape else (old, f"{new} of another shape")


def _receipt_of(source: Source) -> dict[str, Any] | None:
    return read_receipt(source.directory) if isinstance(source, LocalSource) else None
