"""A diagnosis: what attention looks at in each layer, what each layer is worth, and both in words."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.evals.compare import Estimate, PairedDifference, estimate, paired, short_label
from surgeon.showing import Shown
from surgeon.text import plus_minus

if TYPE_CHECKING:
    from surgeon.measure.diagnosis import Measured
    from surgeon.plots.attention import Panel

LOW_RANK = 1.5  # a head whose mean rank is below this has rank 1 on most sequences
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Layer:
    """The figures of a layer. `heads` holds the measures of each head, and is empty in a layer without attention.

    `skip` is by how much the loss rises where the layer is left out, `attention_skip` where its attention alone is:
    nats a token, paired row by row. None where it was not measured.
    """

    heads: tuple[Figures, ...]
    influence: float
    skip: PairedDifference | None = None
    attention_skip: PairedDifference | None = None

    @property
    def rank(self) -> float | None:
        """The largest rank of its heads (MaxRank)."""
        return max((head["rank"] for head in self.heads), default=None)

    @property
    def num_low_rank(self) -> int:
        """How many heads have a rank below LOW_RANK."""
        return sum(head["rank"] < LOW_RANK for head in self.heads)

    @property
    def num_sinks(self) -> int:
        """How many heads of low rank have another rank without their first column: it is what they look at."""
        return sum(
            head["rank"] < LOW_RANK and abs(head["rank_without_sink"] - head["rank"]) > LOW_RANK - 1
            for head in self.heads
        )

    def mean(self, measure: str) -> float | None:
        """Return the mean of a measure over heads."""
        return fmean(head[measure] for head in self.heads) if self.heads else None

    def to_dict(self, number: int) -> dict[str, Any]:
        """Return the layer as `--json` prints it."""
        figures: dict[str, Any] = {"layer": number, "rank": self.rank, "mean_rank": self.mean("rank")}
        figures |= {name: self.mean(name) for name in ("stable_rank", "column_mass", "sink", "top_column", "entropy")}
        without = max((head["rank_without_sink"] for head in self.heads), default=None)
        figures |= {"rank_without_sink": without, "heads": len(self.heads)}
        figures |= {"low_rank_heads": self.num_low_rank, "sink_heads": self.num_sinks}
        figures["block_influence"] = self.influence
        for name, change in (("skip_loss", self.skip), ("attention_skip_loss", self.attention_skip)):
            figures |= {name: change and change.value, f"{name}_error": change and change.error}
        return figures


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis(Shown):
    """The diagnosis of a model on `sequences` rows of `length` tokens.

    `loss` is of the first `skip_sequences` rows, on which layers are left out. `calibration` holds the measures of maps
    whose meaning is known, at the same length. `other` is the diagnosis of another model on the same rows, and
    `layer_map` its layer for each layer here, None for one that is new. `setup` makes the figures reproducible.

        diagnosis = surgeon.diagnose("gpt2", data=["text.txt"], samples=4, skip_samples=0)
        print(diagnosis.layers[0].rank, diagnosis.layers[0].influence)
        diagnosis.draw().savefig("diagnosis.png")
    """

    model: str
    layers: tuple[Layer, ...]
    sequences: int
    length: int
    energy: float
    skip_sequences: int
    loss: Estimate | None
    loss_sums: tuple[float, ...] = field(default=(), repr=False)
    sizes: tuple[int, ...] = field(default=(), repr=False)
    calibration: Mapping[str, Figures] = field(repr=False)
    setup: Mapping[str, Any]
    other: "Diagnosis | None" = None
    layer_map: tuple[int | None, ...] = ()
    written: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def loss_difference(self) -> PairedDifference | None:
        """The loss of this model less that of the other one, paired row by row."""
        if self.other is None or not self.loss_sums or not self.other.loss_sums:
            return None
        return paired(self.loss_sums, self.other.loss_sums, self.sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as `--json` prints it."""
        result: dict[str, Any] = {
            "model": self.model,
            "layers": [layer.to_dict(number) for number, layer in enumerate(self.layers)],
            "heads": [[dict(head) for head in layer.heads] for layer in self.layers],
            "sequences": self.sequences,
            "sequence_length": self.length,
            "energy": self.energy,
            "skip_sequences": self.skip_sequences,
            "loss": self.loss and self.loss.value,
            "loss_error": self.loss and self.loss.error,
            "calibration": {name: dict(figures) for name, figures in self.calibration.items()},
            "findings": findings(self),
            **self.setup,
            **self.written,
        }
        if self.other is not None:
            difference = self.loss_difference
            result["against"] = self.other.to_dict()
            result["layer_map"] = list(self.layer_map)
            result["loss_difference"] = difference and difference.value
            result["loss_difference_error"] = difference and difference.error
        return result | {"seconds": round(self.seconds, 3)}

    def to_text(self) -> str:
        """Return the diagnosis for people: its tables, and what they say."""
        parts = [text.table(*layer_table(self))]
        if self.other is not None:
            parts += [f"{short_label(self.other.model)}:", text.table(*layer_table(self.other))]
            parts += ["side by side:", text.table(*comparison_table(self))]
        parts += [f"known patterns at T = {self.length}:", text.table(*calibration_table(self))]
        parts += ["\n".join(f"- {finding}" for finding in findings(self)), text.rows(self.facts())]
        return "\n\n".join(part if part.startswith((" ", "-")) else f"  {part}" for part in parts)

    @property
    def headline(self) -> str:
        """The model, what was looked at, and its loss."""
        loss = "" if self.loss is None else f", loss {plus_minus(self.loss.value, self.loss.error)}"
        return f"{self.model}, {len(self.layers)} layers, {self.amount}{loss}"

    def draw(self) -> Any:
        """Return a figure of matplotlib: heat maps of the heads, and what each layer is worth; of both models."""
        from surgeon.plots.attention import draw_diagnosis

        return draw_diagnosis([one.panel() for one in (self, self.other) if one is not None])

    def panel(self) -> "Panel":
        """Return what is drawn of this model alone."""
        from surgeon.plots.attention import Panel

        series = {
            "without the layer": [layer.skip for layer in self.layers],
            "without its attention": [layer.attention_skip for layer in self.layers],
        }
        rises = {
            name: [None if change is None else (change.value, change.error) for change in changes]
            for name, changes in series.items()
        }
        return Panel(
            title=f"{short_label(self.model)}\n{self.amount}",
            heads=[layer.heads for layer in self.layers],
            influence=[layer.influence for layer in self.layers],
            rises={} if self.loss is None else rises,
            length=self.length,
            low_rank=LOW_RANK,
        )

    @property
    def amount(self) -> str:
        """How much of which data was looked at."""
        data = ", ".join(map(short_label, self.setup["data"]))
        return f"{self.sequences} sequence{'s' if self.sequences > 1 else ''} of T = {self.length} tokens, of {data}"

    def facts(self) -> list[tuple[str, str]]:
        """Return what was measured, on what."""
        facts = [("model", self.model)] + ([] if self.other is None else [("against", self.other.model)])
        facts += [] if self.other is None else [("layers held against", text.layers(self.layer_map))]
        facts += [("data", self.amount)]
        facts += [
            ("energy", f"{100 * self.energy:g} %"),
            ("computed", f"{self.setup['dtype']}, {self.setup['device']}"),
        ]
        if self.loss is not None:
            rows = f"{self.skip_sequences} sequences, {sum(self.sizes):,} predicted tokens"
            facts += [("loss", f"{_signed(self.loss, plus=False)} nats a token, on {rows}")]
        if (difference := self.loss_difference) is not None:
            facts += [("loss difference", f"{_signed(difference)} nats a token, paired")]
        facts += [("note", note) for note in self.setup.get("notes", ())]
        return facts + [(kind, ", ".join(files)) for kind, files in self.written.items()]


def diagnosis_of(
    label: str,
    measured: "Measured",
    calibration: Mapping[str, Figures],
    setup: Mapping[str, Any],
    *,
    length: int,
    energy: float,
) -> Diagnosis:
    """Return the diagnosis that a model's measurements make."""
    seen = next(maps for maps in measured.maps if maps is not None)
    losses, layers = measured.losses, []
    for number, (maps, influence) in enumerate(zip(measured.maps, measured.influence, strict=True)):
        skip = attention_skip = None
        if losses is not None:
            skip = paired(losses.layer[number], losses.whole, losses.sizes)
            attention = losses.attention[number]
            attention_skip = None if attention is None else paired(attention, losses.whole, losses.sizes)
        layers.append(Layer(() if maps is None else _heads(maps), influence, skip, attention_skip))
    return Diagnosis(
        model=label,
        layers=tuple(layers),
        sequences=len(seen),
        length=length,
        energy=energy,
        skip_sequences=0 if losses is None else len(losses.whole),
        loss=None if losses is None else estimate(losses.whole, losses.sizes),
        loss_sums=() if losses is None else tuple(losses.whole),
        sizes=() if losses is None else tuple(losses.sizes),
        calibration=calibration,
        setup=setup,
    )


def _heads(maps: Any) -> tuple[Figures, ...]:
    """Return the mean of each measure over sequences, and the standard error of the rank; from shape (R, H, M)."""
    from surgeon.measure.attention import MEASURES

    heads = []
    for head in maps.transpose(0, 1):
        figures = dict(zip(MEASURES, head.mean(0).tolist(), strict=True))
        error = estimate(head[:, list(MEASURES).index("rank")].tolist()).error
        heads.append(figures | ({} if error is None else {"rank_error": error}))
    return tuple(heads)


# --- tables -------------------------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


def layer_table(diagnosis: Diagnosis) -> Table:
    """Return a line for each layer. Ranks are the largest of its heads, the rest are means over heads."""
    header = ["layer", "rank", "mean", "no sink", "stable", "mass", "rank<1.5", "on 0", "top col", "influence"]
    is_skipped = diagnosis.loss is not None
    lines = []
    for number, layer in enumerate(diagnosis.layers):
        figures = layer.to_dict(number)
        names = (("rank", 1), ("mean_rank", 1), ("rank_without_sink", 1), ("stable_rank", 2), ("column_mass", 1))
        line = [str(number), *(_number(figures[name], digits) for name, digits in names)]
        line += [_low_of(layer)]
        line += [_number(figures["sink"], 2), _number(figures["top_column"], 2), _number(layer.influence, 3)]
        lines.append(line + ([_signed(layer.attention_skip), _signed(layer.skip)] if is_skipped else []))
    return header + (["without attention", "without layer"] if is_skipped else []), lines


def comparison_table(diagnosis: Diagnosis) -> Table:
    """Return a line for each layer, with the figures of the other model's layer that it is held against."""
    other = diagnosis.other
    assert other is not None, "there is another model"
    header = ["layer", "there", "rank", "there", "rank<1.5", "there", "on 0", "there", "influence", "there"]
    header += ["without layer", "there"]
    lines = []
    for number, layer in enumerate(diagnosis.layers):
        place = diagnosis.layer_map[number]
        pair = [layer] if place is None else [layer, other.layers[place]]
        columns = [
            [_number(one.rank, 1) for one in pair],
            [_low_of(one) for one in pair],
            [_number(one.mean("sink"), 2) for one in pair],
            [_number(one.influence, 3) for one in pair],
            [_signed(one.skip) for one in pair],
        ]
        line = [str(number), "-" if place is None else str(place)]
        lines.append(line + [cell for column in columns for cell in (*column, "-")[:2]])
    return header, lines


def calibration_table(diagnosis: Diagnosis) -> Table:
    """Return a line for each known pattern."""
    header = ["pattern", "rank", "no sink", "stable", "mass", "on 0", "top col"]
    names = (("rank", 0), ("rank_without_sink", 0), ("stable_rank", 2), ("column_mass", 0), ("sink", 2))
    return header, [
        [name, *(_number(figures[key], digits) for key, digits in (*names, ("top_column", 2)))]
        for name, figures in diagnosis.calibration.items()
    ]


def _low_of(layer: Layer) -> str:
    """Return "8/9": how many heads are of low rank."""
    return f"{layer.num_low_rank}/{len(layer.heads)}" if layer.heads else "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _signed(value: "Estimate | PairedDifference | None", *, plus: bool = True) -> str:
    """Return "+0.454 ± 0.06"."""
    if value is None:
        return "-"
    sign = "+" if plus and value.value >= 0 else ""
    return sign + plus_minus(value.value, value.error)


# --- words --------------------------------------------------------------------------------------------------------


def findings(diagnosis: Diagnosis) -> list[str]:
    """Return in words which layers are sink-dominated or of low rank, what leaving them out costs, and what to do."""
    said = [*_on_rank(diagnosis), *_on_worth(diagnosis)]
    if (other := diagnosis.other) is not None:
        here, there = (_share(one.layers) for one in (diagnosis, other))
        said.append(f"Heads of rank below {LOW_RANK}: {here} here, {there} in {short_label(other.model)}.")
    length, asked = diagnosis.length, diagnosis.setup["asked_length"]
    if length < asked:
        said.append(f"The text is shorter than a sequence: T is {length} here, not {asked}.")
    return [*said, f"These ranks are of T = {length}; at another length even the known patterns have others."]


def _on_rank(diagnosis: Diagnosis) -> list[str]:
    depth = len(diagnosis.layers)
    half = (depth + 1) // 2
    early, late = diagnosis.layers[:half], diagnosis.layers[half:]
    said = [f"Heads of rank below {LOW_RANK}: {_share(early)} in layers 0 to {half - 1}"]
    said[0] += f", {_share(late)} in layers {half} to {depth - 1}." if late else "."
    sinks = _most(diagnosis, "num_sinks")
    what = "most of their heads look at the first token almost alone"
    if sinks:
        said.append(f"Sink-dominated, for {what}: {_listed(diagnosis, sinks, 'num_sinks')}.")
    else:
        said.append(f"No layer is sink-dominated: in none {what.replace('their', 'the')}.")
    if others := [layer for layer in _most(diagnosis, "num_low_rank") if layer not in sinks]:
        said.append(f"Of low rank by other columns too: {_listed(diagnosis, others, 'num_low_rank')}.")
    lazy = [n for n, layer in enumerate(diagnosis.layers) if layer.rank is not None and layer.rank < LOW_RANK]
    every = f"Rank 1 in every head (the published rule for a lazy layer): {_numbers(lazy)}."
    return [*said, every if lazy else "No layer has rank 1 in every head, which is the published rule for a lazy one."]


def _on_worth(diagnosis: Diagnosis) -> list[str]:
    """Return what the layers are worth, and what to do. Only block influence and the losses decide what to cut."""
    layers, depth = diagnosis.layers, len(diagnosis.layers)
    said = ["Rank is no reason to cut: a head that looks at one token adds nearly the same vector everywhere"]
    changes = {n: layer.attention_skip for n in _most(diagnosis, "num_sinks") if (layer := layers[n]).attention_skip}
    dearest = max(changes, key=lambda n: changes[n].value, default=None)
    said[0] += ", and later layers may need it."
    if dearest is not None and _is_clear(changes[dearest]):
        said[0] += (
            f" Here layer {dearest} is sink-dominated ({layers[dearest].num_sinks} of {len(layers[dearest].heads)} "
            f"heads), and without its attention the loss rises by {_signed(changes[dearest])}."
        )
    few = max(1, depth // 8)
    by_influence = sorted(range(depth), key=lambda n: layers[n].influence)[:few]
    if diagnosis.loss is not None:
        by_loss = sorted(range(depth), key=lambda n: _rise(layers[n]))[:few]
        rises = ", ".join(f"{n} ({_signed(layers[n].skip)})" for n in by_loss)
        said.append(f"Cheapest to leave out, each alone, by the loss in nats: layer {rises}.")
        free = [n for n in range(depth) if (skip := layers[n].attention_skip) and not _is_clear(skip)]
        if free:
            said.append(f"Without the attention of one of these the loss stays within two errors: {_numbers(free)}.")
    said.append(f"Cheapest by block influence: {_numbers(by_influence)}.")
    if depth > 1:
        model, data = shlex.quote(diagnosis.model), shlex.quote(diagnosis.setup["data"][0])
        command = f"surgeon prune {model} --score block-influence --layers {depth - few} --data {data}"
        said.append(f"Costs of single layers do not add up; to cut several, and to see the loss after it: {command}")
        half = (depth + 1) // 2
        early, late = (_fraction(part) for part in (layers[:half], layers[half:]))
        if late > max(0.25, 2 * early):  # a quarter of the later heads, and twice the earlier ones' share
            said.append(
                "The later half is of low rank, the earlier one is not: where there is data to train on, keep the "
                f"first layers (Inheritune): surgeon truncate {model} --layers {half}, then surgeon finetune."
            )
    return said


def _most(diagnosis: Diagnosis, count: str) -> list[int]:
    """Return the layers in which most heads are counted, those with the largest share first."""
    shares = {n: getattr(layer, count) / len(layer.heads) for n, layer in enumerate(diagnosis.layers) if layer.heads}
    return sorted((n for n, share in shares.items() if share > 0.5), key=lambda n: (-shares[n], n))


def _listed(diagnosis: Diagnosis, layers: Sequence[int], count: str) -> str:
    heads = ((n, diagnosis.layers[n]) for n in layers)
    return ", ".join(f"layer {n} ({getattr(layer, count)} of {len(layer.heads)} heads)" for n, layer in heads)


def _numbers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(layers)))}"


def _is_clear(change: PairedDifference) -> bool:
    """Return whether a change is more than two of its standard errors; one without an error is taken as it is."""
    return abs(change.value) > 2 * (change.error or 0.0)


def _rise(layer: Layer) -> float:
    return math.inf if layer.skip is None else layer.skip.value


def _fraction(layers: Sequence[Layer]) -> float:
    heads = sum(len(layer.heads) for layer in layers)
    return sum(layer.num_low_rank for layer in layers) / heads if heads else 0.0


def _share(layers: Sequence[Layer]) -> str:
    """Return "67 of 135 (50 %)"."""
    counts = sum(layer.num_low_rank for layer in layers), sum(len(layer.heads) for layer in layers)
    return f"{counts[0]} of {counts[1]} ({100 * _fraction(layers):.0f} %)"
