"""What a trace found: the nearest candidate, the layers, the axes, what the child looks like, and the evidence."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.lineage.claims import Claim
from surgeon.lineage.comparing import Comparison
from surgeon.lineage.mixture import Mixture
from surgeon.showing import Shown


@dataclass(frozen=True)
class Link:
    """One step further back: the nearest candidate held against the others. `layers` are of the child of this link."""

    child: str
    nearest: str
    layers: tuple[int | None, ...]
    child_layers: tuple[int | None, ...]  # the same, for the child that is traced

    def to_dict(self) -> dict[str, Any]:
        """Return the link as `--json` prints it."""
        return {
            "child": self.child,
            "nearest": self.nearest,
            "layers": list(self.layers),
            "child_layers": list(self.child_layers),
        }


@dataclass(frozen=True, repr=False)
class Trace(Shown):
    """The lineage of a child, among candidates. `layers` has for each of its layers that of `nearest`, or None.

    `layer_sources` names the candidate of each layer. `p` is of the nearest candidate; `candidates` has what was found
    of each. `bytes_read` counts weights of all models, headers and tokenizers apart. "Nearest" is all that distance can
    say: a candidate that was not given may be nearer.

    For example:

        trace = surgeon.trace("gpt2-large-30", candidates=["gpt2-large", "gpt2"])
        print(trace.nearest, trace.layers, trace.looks_like)
    """

    child: str
    nearest: str | None
    layers: tuple[int | None, ...]
    axes: Mapping[str, str]
    looks_like: tuple[str, ...]
    p: float
    bytes_read: int
    candidates: Mapping[str, Mapping[str, Any]]
    depth: int
    layer_sources: tuple[str | None, ...] = ()
    axis_words: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[tuple[str, str]] = ()
    mixture: Mixture | None = None
    direction: str = ""
    chain: tuple[Link, ...] = ()
    claims: tuple[Claim, ...] = ()
    disagreements: tuple[str, ...] = ()
    agreements: tuple[str, ...] = ()
    permutations: int = 0
    child_bytes: int = 0
    requests: int = 0
    bytes_downloaded: int | None = None

    @property
    def headline(self) -> str:
        """The nearest candidate, and what the child looks like."""
        found = "unrelated to all candidates" if self.nearest is None else f"nearest is {self.nearest}"
        return f"{self.child}, {found}{''.join(f', {word}' for word in self.looks_like)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as `--json` prints it."""
        downloaded = {} if self.bytes_downloaded is None else {"bytes_downloaded": self.bytes_downloaded}
        return {
            "nearest": self.nearest,
            "layers": list(self.layers),
            "axes": dict(self.axes),
            "looks_like": list(self.looks_like),
            "p": self.p,
            "permutations": self.permutations,
            "bytes_read": self.bytes_read,
            **downloaded,
            "requests": self.requests,
            "candidates": {name: dict(told) for name, told in self.candidates.items()},
            "layer_sources": list(self.layer_sources),
            "mixture": None if self.mixture is None else self.mixture.to_dict(),
            "direction": self.direction,
            "chain": [link.to_dict() for link in self.chain],
            "claims": [claim.to_dict() for claim in self.claims],
            "agreements": list(self.agreements),
            "disagreements": list(self.disagreements),
        }

    def to_text(self) -> str:
        """Return the trace for people."""
        lines = [("child", self.child), ("nearest", self._nearest())]
        lines += [("looks like", ", ".join(self.looks_like))] if self.looks_like else []
        lines += [("mixture", str(self.mixture))] if self.mixture is not None else []
        if self.nearest is not None:
            lines += [("layers", layer_words(self.layers, self.depth, self.layer_sources, self.nearest))]
            lines += list(self.axis_words.items())
            lines += list(self.parts)
            lines += [("direction", self.direction)]
        for link in self.chain:
            words = (
                f"{link.child} is nearest to {link.nearest}; layers of the child there: {_ranges(link.child_layers)}"
            )
            lines.append(("further back", words))
        lines += [("claim", f"{claim.file}: {claim.says}") for claim in self.claims]
        lines += [("agrees", words) for words in self.agreements]
        lines += [("DISAGREES", words) for words in self.disagreements]
        size = f" of {text.size(self.child_bytes)} in the child" if self.child_bytes else ""
        lines += [("evidence", f"{text.size(self.bytes_read)} of weights read in {self.requests} ranges{size}")]
        header = ("candidate", "layers", "distance", "gains", "p", "z")
        return f"{text.rows(lines)}\n\n{text.table(header, [_row(*each) for each in self.candidates.items()])}"

    def draw(self) -> Any:
        """Return a figure of matplotlib with the layer that each of the child's layers is."""
        from surgeon.plots.lineage import draw_layer_map

        title = f"{_short(self.child)}: {', '.join(self.looks_like) or 'unrelated'}"
        maps = {_short(name): tuple(told["layers"]) for name, told in self.candidates.items() if told["layers"]}
        depths = {_short(name): told["depth"] for name, told in self.candidates.items()}
        sources = tuple(None if name is None else _short(name) for name in self.layer_sources)
        return draw_layer_map(maps, depths, sources=sources, child=_short(self.child), title=title)

    def _nearest(self) -> str:
        if self.nearest is None:
            return f"none: unrelated to {len(self.candidates)} candidate{'s' if len(self.candidates) > 1 else ''}"
        told = self.candidates[self.nearest]
        of = f" of {len(self.candidates)} candidates" if len(self.candidates) > 1 else ", the only candidate"
        least = self.permutations and abs(self.p - 1 / (1 + self.permutations)) < 1e-12
        p = "" if not self.permutations else f"; p {'≤' if least else '='} {self.p:.2g}"
        z = "" if told.get("z") is None else f", z {told['z']:.0f}"
        return f"{self.nearest} (nearest{of}{p}{z})"


def _short(name: str) -> str:
    return Path(name.rstrip("/")).name or name


def _row(name: str, told: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = [told.get(key) for key in ("distance", "gains", "p", "z")]
    shown = ["-" if number is None else f"{number:.3g}" for number in numbers]
    return (name, f"{told['layers_found']} of {len(told['layers']) or '-'}" if told["layers"] else "unrelated", *shown)


def layer_words(
    layers: Sequence[int | None], depth: int, sources: Sequence[str | None] = (), nearest: str | None = None
) -> str:
    """Return a layer map in words: "30 → 22: 0-3, 5-10, ..."."""
    same = list(layers) == list(range(depth))
    shown = "unchanged" if same else _ranges(layers)
    others = Counter(name for name in sources if name not in (None, nearest))
    more = "".join(f"; {count} of {name}" for name, count in others.items())
    return f"{depth} → {len(layers)}: {shown}{more}"


def _ranges(layers: Sequence[int | None]) -> str:
    """Return layers in runs: "0-3,5,-,7": a dash alone is a layer that is none of them."""
    runs: list[list[int | None]] = []
    for layer in layers:
        if runs and layer is not None and runs[-1][1] is not None and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join("-" if a is None else str(a) if a == b else f"{a}-{b}" for a, b in runs)


def told_of(found: Comparison) -> dict[str, Any]:
    """Return what was found of one candidate, as `--json` prints it."""
    gains = found.gains
    return {
        "layers": list(found.layers),
        "layers_found": found.num_layers,
        "depth": len(found.parent.roles.layers),
        "distance": found.distance if isfinite(found.distance) else None,
        "gains": None if gains is None else gains.statistic,
        "p": found.p,
        "test": found.test,
        "z": None if gains is None else gains.z,
        "axes": found.axes,
        "axis_maps": {axis: each.runs() for axis, each in found.maps.items() if len(each.runs()) <= 1000},
        "tensors": [each.to_dict() for each in found.differences if each.is_matrix or each.status == "changed"],
        "bytes_read": found.parent.samples.bytes_read,
    }


def part_words(found: Comparison, owned: Sequence[bool]) -> list[tuple[str, str]]:
    """Return for people how far each kind of tensor is from the candidate's."""
    groups: dict[str, list[float]] = {}
    for each in found.differences:
        if each.layer is None or owned[each.layer]:
            words = {"identical": "identical", "cast": "rounded only", "scaled": "scaled only", "zero": "zero"}.get(
                each.status, ""
            )
            if words:
                groups.setdefault(f"{words}:{_kind(each.role)}", []).append(0.0)
            else:
                groups.setdefault(f":{_kind(each.role)}", []).append(each.distance)
    lines: dict[str, list[str]] = {}
    for key, distances in groups.items():
        status, _, kind = key.partition(":")
        span = f"{100 * min(distances):.2g}" + (
            f"-{100 * max(distances):.2g}" if len(distances) > 1 and max(distances) > min(distances) else ""
        )
        lines.setdefault(status or "changed", []).append(kind if status else f"{kind} by {span} %")
    return [(status, ", ".join(kinds)) for status, kinds in lines.items()]


def _kind(role: str) -> str:
    """Return a role in short: "q_proj" for "self_attn.q_proj.weight"."""
    return role.removesuffix(".weight").rpartition(".")[2]
