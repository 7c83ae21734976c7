"""A result that is decided to the byte and not yet written, and the summary of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from surgeon import text
from surgeon.checkpoint import output, receipt
from surgeon.checkpoint.header import CheckpointSpec
from surgeon.checkpoint.source import CARD, CONFIG, RECEIPT, Source, spec_of
from surgeon.options import Reads, verb_named
from surgeon.plan.execute import Shard, check_written, execute
from surgeon.plan.plan import Plan
from surgeon.progress import BYTES, stage
from surgeon.showing import Shown

Asks = Literal["nothing", "config", "tensors"]  # of transformers about a result
VERIFIED_BELOW = 1_000_000_000  # parameters; a larger result is verified on request, for it takes a while
Confirm = Callable[[Path], object]  # raises an error for a directory that must not become the result


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """The effect of a surgery: everything but `seconds` is known before a byte of weights is read.

    Sizes are in bytes; `bytes_read` and `bytes_written` count tensors, `peak_memory` is an estimate. `bytes_downloaded`
    are those of weight files on the Hub that are to be downloaded, or were in this process; None for a local source.
    `bytes_shared` of those written take no space, since their blocks on the disk are the source's; before writing, it
    is what can be.

        summary = surgeon.truncate("gpt2-large", layers=6).summary()
        print(summary.parameters, summary.bytes_read, summary.config_changes)
    """

    output: Path
    layers: tuple[int, int]  # before, after
    parameters: tuple[int, int]
    bytes_read: int
    bytes_downloaded: int | None
    bytes_written: int
    bytes_shared: int
    layer_map: tuple[int | None, ...]
    files: tuple[str, ...]  # weight files
    config_changes: dict[str, tuple[Any, Any]]  # key: value before and after
    notes: tuple[str, ...]
    peak_memory: int
    seconds: float
    mlp_map: tuple[int | None, ...] | None = None  # where the MLPs are of other layers than the attentions

    def downloaded_from(self, source: Source) -> "Summary":
        """Return the summary with the bytes that were downloaded from `source` until now."""
        return replace(self, bytes_downloaded=None if source.transfer is None else source.transfer.nbytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as `--json` prints it."""
        return {
            "output": str(self.output),
            "layers": {"before": self.layers[0], "after": self.layers[1]},
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "bytes_read": self.bytes_read,
            **({} if self.bytes_downloaded is None else {"bytes_downloaded": self.bytes_downloaded}),
            "bytes_written": self.bytes_written,
            "bytes_shared": self.bytes_shared,
            "layer_map": list(self.layer_map),
            **({} if self.mlp_map is None else {"mlp_map": list(self.mlp_map)}),
            "files": list(self.files),
            "config": {key: {"before": old, "after": new} for key, (old, new) in self.config_changes.items()},
            "notes": list(self.notes),
            "peak_memory": self.peak_memory,
            "seconds": round(self.seconds, 3),
        }

    @property
    def headline(self) -> str:
        """The result, its layers and its parameters."""
        (before, after), (old, new) = self.layers, self.parameters
        return f"{self.output}, {before} → {after} layers, {old:,} → {new:,} parameters"

    def to_text(self, *, done: bool | None = None, rows: Sequence[tuple[str, str]] = ()) -> str:
        """Return the summary for people: before and after, and where it is.

        `done` is whether it is written (None: by its seconds). `rows` are more rows: a verification, or the scores
        that decided it.
        """
        done = self.seconds > 0 if done is None else done
        before, after = self.parameters
        lines = [
            ("layers", f"{self.layers[0]} → {self.layers[1]}  ({text.sources(self.layer_map, self.mlp_map)})"),
            ("parameters", f"{before:,} → {after:,}  ({100 * after / before:.1f} %)"),
            ("reads", text.size(self.bytes_read)),
            *([] if self.bytes_downloaded is None else [("downloads", text.size(self.bytes_downloaded))]),
            ("writes", f"{text.size(self.bytes_written)} in {text.few(self.files)}"),
        ]
        if self.bytes_shared:
            lines += [("shares", f"{text.size(self.bytes_shared)} of blocks with the source, which take no more space")]
        lines += [
            (f"config {key}", f"{text.brief(old)} → {text.brief(new)}")
            for key, (old, new) in self.config_changes.items()
        ]
        lines += [("note", note) for note in self.notes]
        if not done:
            lines += [
                *rows,
                ("peak memory", f"about {text.size(self.peak_memory)}"),
                ("output", f"{self.output} (not written)"),
            ]
            return text.rows(lines)
        lines += [*rows, ("seconds", f"{self.seconds:.2f}"), ("output", str(self.output))]
        return text.rows(lines)


@dataclass(frozen=True)
class Draft:
    """A result that is decided to the byte and not yet written; `summary` describes it."""

    source: Source
    plan: Plan
    shards: tuple[Shard, ...]
    summary: Summary
    options: Mapping[str, Any]  # those that decide bytes
    attachments: Mapping[str, bytes | None]  # None: the result has no such file
    reads: Reads  # none of which may lie in the output
    result: CheckpointSpec
    asks: Asks
    proving: Callable[[], AbstractContextManager[Confirm]]  # is entered before anything is written

    @property
    def companions(self) -> list[str]:
        """The files of the source that the result has too."""
        return [name for name in self.source.companions if self.attachments.get(name, b"") is not None]

    @property
    def attached(self) -> dict[str, bytes]:
        """The files that the result has besides."""
        return {name: content for name, content in self.attachments.items() if content is not None}

    def check(self, *, overwrite: bool) -> None:
        """Raises OutputError where the output may not be written, CheckpointError where a companion cannot be read."""
        output.check_target(self.summary.output, overwrite=overwrite, reads=self.reads)
        _ = self.source.companions  # one that is no file of the checkpoint is refused now, and not after hours

    def write(
        self,
        *,
        overwrite: bool = False,
        command: str | None = None,
        confirm: Confirm | None = None,
    ) -> Summary:
        """Write the result, at once and whole, and return the summary with the seconds that this took.

        `confirm` is called with the directory that will be the result. Where it raises an error there is no result.
        """
        began = time.perf_counter()
        target, plan = self.summary.output, self.plan
        self.check(overwrite=overwrite)
        companions = {name: self.source.fetch(name) for name in self.companions}
        card = companions.pop(CARD, None)
        sizes = sum(path.stat().st_size for path in companions.values())
        needed = self.summary.bytes_written - self.summary.bytes_shared
        output.check_space(target, needed + sizes + 300 * len(plan.tensors) + 100_000)
        staged = output.staged(target, overwrite=overwrite)
        with self.proving() as prove, staged as made, self._building() as built:
            with stage("writing", self.summary.bytes_written, BYTES) as count:
                written = execute(plan, self.source, made, shards=self.shards, progress=count)
            check_written(made, self.shards)
            plan = replace(plan, notes=(*plan.notes, *built()))
            record = receipt.receipt(
                source=self.source.provenance(),
                steps=plan.steps,
                layer_map=plan.layer_map,
                mlp_map=plan.mlp_map,
                axis_maps=plan.axis_runs(),
                options=self.options,
                command=command,
                notes=plan.all_notes,
                approximate=plan.approximate,
                transfer=self.source.transfer,
                bytes_shared=written.shared,
            )
            page = replace(self, plan=plan)._card(command=command, card=card)
            output.copy_files(made, companions)
            output.write_files(made, {CARD: page.encode(), RECEIPT: receipt.to_bytes(record), **self.attached})
            output.write_files(made, {CONFIG: receipt.to_bytes(plan.config)})  # last: now it is a checkpoint
            prove(made)
            if confirm is not None:
                confirm(made)
            self.source.check_unchanged()
        done = replace(self.summary.downloaded_from(self.source), bytes_shared=written.shared, notes=plan.all_notes)
        return replace(done, seconds=time.perf_counter() - began)

    def _building(self) -> AbstractContextManager[Callable[[], Sequence[str]]]:
        """Return a context in which transformers is asked about the result; its value returns what is to be noted."""
        if self.asks == "nothing":
            return nullcontext(tuple)
        from surgeon.models.building import building

        return building(spec_of(self.source), self.result, config_only=self.asks == "config")

    def _card(self, *, command: str | None, card: Path | None) -> str:
        models = receipt.base_models(self.source)
        made_from = " and ".join(f"`{name}`" for name in models or [receipt.public_name(self.source)])
        done = [next(iter(step)) for step in self.plan.steps]
        layers, parameters = self.summary.layers, self.summary.parameters
        facts = {
            "layers": f"{layers[0]} → {layers[1]}",
            "parameters": f"{parameters[0]:,} → {parameters[1]:,}",
        }
        maps = {"attention": self.plan.layer_map, "MLP": self.plan.mlp_layers}
        maps = {"layer": self.plan.layer_map} if self.plan.mlp_map is None else maps
        for of, layer_map in maps.items():
            facts[f"source layer of each {of}"] = " ".join("new" if i is None else str(i) for i in layer_map)
        return receipt.model_card(
            title=self.summary.output.name,
            base_models=models,
            done=f"Made from {made_from} by surgeon: {', then '.join(done)}.",
            facts=facts,
            command=command,
            notes=self.plan.all_notes,
            source_card=card,
            relation=next((verb_named(verb).relation for verb in reversed(done)), ""),
        )
