"""What commands print: results on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from surgeon.cli.printable import printable
from surgeon.inspection import Difference, Inspection
from surgeon.surgery import Summary


def emit(text: str) -> None:
    """Print a result."""
    sys.stdout.write("\n".join(map(printable, text.split("\n"))) + "\n")


def log(text: str) -> None:
    """Print what accompanies a result."""
    sys.stderr.write(text + "\n")


def emit_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def size(nbytes: float) -> str:
    """Return a number of bytes as people say it, in powers of ten: "538 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def rows(pairs: Iterable[tuple[str, str]]) -> str:
    """Return lines of "name  value" with the values aligned."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in pairs)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *lines]
    )


def layers(layer_map: Sequence[int | None]) -> str:
    """Return a layer map in few words: "0-5, 8, new"."""
    words: list[str] = []
    start = 0
    for i in range(1, len(layer_map) + 1):
        before = layer_map[i - 1]
        if i < len(layer_map) and before is not None and layer_map[i] == before + 1:
            continue
        first = layer_map[start]
        words.append("new" if before is None else str(before) if first == before else f"{first}-{before}")
        start = i
    return ", ".join(words)


def summary_text(summary: Summary, *, dry_run: bool) -> str:
    """Return the summary of a surgery for people: before and after, where it is, and what to run next."""
    before, after = summary.parameters
    lines = [
        ("layers", f"{summary.layers[0]} → {summary.layers[1]}  (source layers {layers(summary.layer_map)})"),
        ("parameters", f"{before:,} → {after:,}  ({100 * after / before:.1f} %)"),
        ("reads", size(summary.bytes_read)),
        ("writes", f"{size(summary.bytes_written)} in {', '.join(_few(summary.files))}"),
    ]
    lines += [(f"config {key}", f"{_brief(old)} → {_brief(new)}") for key, (old, new) in summary.config_changes.items()]
    lines += [("note", note) for note in summary.notes]
    if dry_run:
        lines += [("peak memory", f"about {size(summary.peak_memory)}"), ("output", f"{summary.output} (not written)")]
        return rows(lines)
    lines += [("seconds", f"{summary.seconds:.2f}"), ("output", str(summary.output))]
    return f"{rows(lines)}\n\nnext: surgeon inspect {summary.output}"


def _few(files: Sequence[str]) -> Sequence[str]:
    return files if len(files) <= 2 else [f"{len(files)} files"]


def _brief(value: Any) -> str:
    if value is None:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return (
        text if len(text) <= 60 else f"{text[:50]}... ({len(value)} entries)" if isinstance(value, list) else text[:60]
    )


def inspection_text(inspection: Inspection, *, tensors: bool) -> str:
    """Return an inspection for people."""
    anatomy, spec = inspection.anatomy, inspection.anatomy.spec
    lines = [
        ("model", inspection.label),
        ("type", anatomy.model_type + ("" if anatomy.family else "  (no table: whole layers only)")),
        ("layers", "  ".join(f"{stack.depth} ({stack.prefix}*)" for stack in anatomy.stacks)),
    ]
    lines += [("sizes", "  ".join(f"{axis} {n}" for axis, n in inspection.sizes.items()))] if inspection.sizes else []
    lines += [("parameters", f"{spec.num_parameters:,}")]
    lines += [
        (f"  {part}", f"{count:,}  ({100 * count / spec.num_parameters:.1f} %)")
        for part, count in inspection.parameters.items()
    ]
    lines += [("bytes", f"{size(spec.nbytes)}  ({', '.join(f'{t} {size(n)}' for t, n in inspection.dtypes.items())})")]
    lines += [("tied", {True: "yes", False: "no", None: "not known"}[inspection.tied])]
    if inspection.layer_kinds:
        lines += [("attention", _runs(inspection.layer_kinds))]
    if inspection.receipt:
        lines += [("made by", json.dumps(inspection.receipt.get("steps")))]
    text = rows(lines)
    if tensors:
        listed = [
            (name, stored.spec.dtype, str(list(stored.spec.shape)), stored.file)
            for name, stored in inspection.tensors.items()
        ]
        text += "\n\n" + table(("tensor", "dtype", "shape", "file"), listed)
    return text + (f"\n\n{difference_text(inspection.difference)}" if inspection.difference else "")


def difference_text(difference: Difference) -> str:
    """Return a difference for people."""
    lines = [
        ("against", difference.other),
        ("layers held against", layers(difference.layer_map)),
        *((f"config {key}", f"{_brief(old)} → {_brief(new)}") for key, (old, new) in difference.config.items()),
    ]
    if difference.compared:
        lines += [
            ("tensors equal", f"{len(difference.same)}"),
            ("tensors changed", _listing(difference.changed)),
        ]
    else:
        lines += [("values", "not compared: both checkpoints must be directories")]
    lines += [(f"{name} reshaped", f"{old} → {new}") for name, (old, new) in list(difference.reshaped.items())[:10]]
    lines += [("only here", _listing(difference.added)), ("only there", _listing(difference.removed))]
    return rows(lines)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)}" + (f"  ({shown}{', ...' if len(names) > 3 else ''})" if names else "")


def _runs(kinds: Sequence[str]) -> str:
    """Return "sliding x5, full, sliding x5, full" for a list of kinds."""
    words: list[str] = []
    for kind, group in groupby(kind.removesuffix("_attention") for kind in kinds):
        count = len(list(group))
        words.append(kind if count == 1 else f"{kind} x{count}")
    return ", ".join(words)
