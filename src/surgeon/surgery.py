"""Opening a model, and a surgery on it: a source and the plan for it, which can be looked at, continued and saved."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.config import runtime_notes
from surgeon.checkpoint.derived import DerivedSource, alone
from surgeon.checkpoint.header import QUANTIZATION_FILES, CheckpointSpec, is_quantized
from surgeon.checkpoint.source import Source, content_of, is_adapter, open_directory, spec_of
from surgeon.checkpoint.tokenizer_files import is_tokenizer_file
from surgeon.draft import Asks, Confirm, Draft, Summary
from surgeon.errors import CheckpointError, HubError, PlanError
from surgeon.mistyped import close_path
from surgeon.options import DTYPES, Reads, size_in_bytes, verb_named
from surgeon.plan.execute import Shard, lay_out, peak_memory, ranges_read, shareable_files
from surgeon.plan.plan import Plan, changed_keys, identity
from surgeon.plan.rounding import dtype_cost
from surgeon.plan.schemes import check_no_metadata
from surgeon.progress import Progress, watched
from surgeon.showing import Shown

_BLOCKS = (0, *(2**power for power in range(9, 17)))  # sizes of disk blocks to share; 0: the order of the source


@dataclass(frozen=True, repr=False)
class Surgery(Shown):
    """A source and the plan for it. Only headers are read until `save`, which writes `attachments` too: those
    without content are files of the source that the result does not have.

    `begun_with` is the anatomy of the source, where the caller has read it already. `reads` are the files, directories
    and names on the Hub that decide the plan, by the options that name them: the result must not replace any.
    `also_read` are the tensors that are to be read before the plan is carried out, for scores.

        surgery = surgeon.truncate("gpt2-large", layers=18)
        surgery = surgeon.grow(surgery, layers=20)  # one pass, with nothing written in between
        print(surgery.plan.layer_map, surgery.anatomy.sizes["hidden"])
        surgery.save("gpt2-large-20", dtype="bfloat16")
    """

    source: Source
    plan: Plan
    attachments: Mapping[str, bytes | None] = field(default_factory=dict, repr=False)  # file name: content
    begun_with: Anatomy | None = field(default=None, repr=False, compare=False)
    reads: Reads = field(default_factory=dict, repr=False, compare=False)
    also_read: Sequence[str] = field(default=(), repr=False, compare=False)

    @property
    def headline(self) -> str:
        """The source, what is done to it, and its layers before and after."""
        done = ", then ".join(next(iter(step)) for step in self.plan.steps) or "unchanged"
        return f"{self.source.label}, {done}, {self.before.depth} → {len(self.plan.layer_map)} layers"

    def to_text(self) -> str:
        """Return what `save` would do, for people."""
        return self.summary().to_text()

    @cached_property
    def before(self) -> Anatomy:
        """The anatomy of the model that the surgery began with; of two joined, of the base."""
        return self.begun_with or read_anatomy(spec_of(alone(self.source)))

    @cached_property
    def spec(self) -> CheckpointSpec:
        """The config and the tensors of the result."""
        return self.plan.result(spec_of(self.source))

    @cached_property
    def anatomy(self) -> Anatomy:
        """The anatomy of the result: what the next step of a chain is planned from."""
        if not self.plan.steps and self.plan.config == self.before.spec.config:
            return self.before
        return read_anatomy(self.spec)

    def companion(self, file: str) -> bytes | None:
        """Return a file that goes with the weights, as the result will hold it; None where there is none."""
        if file in self.attachments:
            return self.attachments[file]
        return content_of(self.source.fetch(file)) if file in self.source.companions else None

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer, as the result will hold them."""
        names = filter(is_tokenizer_file, {**dict.fromkeys(self.source.companions), **self.attachments})
        return {name: content for name in names if (content := self.companion(name)) is not None}

    @property
    def name(self) -> str:
        """The result's name where the user gives none: the source's, and what was done."""
        label = Path(self.source.label)
        base = label.name or label.resolve().name or "model"
        verbs = [next(iter(step)) for step in self.plan.steps]
        depth = len(self.plan.layer_map)
        done = [f"{verb}-{depth}L" if verb_named(verb).counts_layers else verb for verb in verbs]
        return "-".join([base, *done])

    def check_saved(self) -> None:
        """Raises PlanError for a model that is planned but not yet on the disk: it cannot be scored."""
        if self.plan.steps:
            done = ", then ".join(next(iter(step)) for step in self.plan.steps)
            raise PlanError(
                f"scores are taken from a checkpoint, and this one is not saved yet: it is still to be made ({done})",
                hint="Save it, and prune the saved checkpoint.",
            )

    def prepare(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "keep",
        max_shard_size: int | str = "5GB",
        block: int | None = None,
    ) -> Draft:
        """Return the result that `save` would write with these options, not yet written. Reads headers only.

        Raises PlanError for an impossible dtype or size, CheckpointError for a result that would not be sound.
        """
        source, dtype = spec_of(self.source), DTYPES.spelled("dtype", dtype)
        plan = (self.plan if dtype == "keep" else self.plan.cast(dtype)).simplified(source)
        if not plan.moves_only:
            plan = replace(plan, notes=(*plan.notes, *dtype_cost(plan, source.tensors)))
        result = plan.result(source)
        if not plan.metadata and is_quantized(source.config):
            check_no_metadata(source.config, self.source.label)
        anatomy = read_anatomy(result)
        known = runtime_notes(self.before.spec.config, self.before.depth)
        found = runtime_notes(result.config, len(plan.layer_map))
        plan = replace(plan, notes=(*plan.notes, *(note for kind, note in found.items() if kind not in known)))
        target = Path(out or self.name)
        attachments: dict[str, bytes | None] = {**self._quantization_files(plan), **self.attachments}
        shards = lay_out(plan, result, self.source, max_shard_bytes=size_in_bytes(max_shard_size))
        shards, block, shared = self._placed(shards, plan, target, block)
        before = self.before.spec
        summary = Summary(
            output=target,
            layers=(self.before.depth, len(plan.layer_map)),
            parameters=(before.num_parameters, result.num_parameters),
            bytes_read=plan.bytes_read(source),
            bytes_downloaded=self.source.missing(ranges_read(plan, self.source, also=self.also_read)),
            bytes_written=result.nbytes,
            bytes_shared=shared,
            layer_map=plan.layer_map,
            mlp_map=plan.mlp_map,
            files=tuple(shard.file for shard in shards),
            config_changes=changed_keys(before.config, result.config),
            notes=plan.all_notes,
            peak_memory=peak_memory(plan, result, source),
            seconds=0.0,
        )
        options = {"dtype": dtype, "max_shard_size": max_shard_size, "block": block}
        reads, asks = self._all_reads(), self._asks(source, anatomy)
        proving = self.proving
        return Draft(self.source, plan, tuple(shards), summary, options, attachments, reads, result, asks, proving)

    def proving(self) -> AbstractContextManager[Confirm]:
        """Return a context that is entered before a result is written; its value is called with what is written."""
        return nullcontext(lambda made: None)

    def _asks(self, source: CheckpointSpec, result: Anatomy) -> Asks:
        """Return what transformers must be asked of a result, beyond what the family's table has checked."""
        changed = changed_keys(source.config, result.spec.config).keys() - {"dtype", "torch_dtype"}
        shapes = ({name: tensor.shape for name, tensor in spec.tensors.items()} for spec in (source, result.spec))
        if not changed and next(shapes) == next(shapes):  # layers of other shapes may have changed places
            return "nothing"
        is_tabled = result.family is not None and not result.family.opaque  # all its tensors are
        return "tensors" if not is_tabled else "config" if result.sizes != self.before.sizes else "nothing"

    def _all_reads(self) -> Reads:
        """Return what is read, with the source that is open: it may be another than the option named."""
        sources = (self.source, self.source.base if isinstance(self.source, DerivedSource) else self.source)
        places = tuple(str(each.origin) for each in sources if each.origin is not None)
        return {**self.reads, "this command": places} if places else self.reads

    def _quantization_files(self, plan: Plan) -> dict[str, bytes]:
        """Return the files beside the weights that name quantized layers, as they must be where layers have moved."""
        names = [name for name in QUANTIZATION_FILES if name in self.source.companions]
        if not names:
            return {}
        if plan.mlp_map is not None:
            raise PlanError(
                f"{names[0]} may name whole layers, and this would put halves of two into one",
                hint="Keep whole layers of a quantized checkpoint.",
            )
        from surgeon.anatomy.quantized import follow_quantization_file

        return {
            name: follow_quantization_file(name, content_of(self.source.fetch(name)), self.before, plan.layer_map)
            for name in names
        }

    def _placed(self, shards: list[Shard], plan: Plan, target: Path, block: int | None) -> tuple[list[Shard], int, int]:
        """Return the shards in an order that lets disk blocks be shared, the size of a block, and the bytes shared.

        The size is 0 where the order of the source stays, whether or not blocks are shared.
        """
        if block is not None and block not in _BLOCKS:
            hint = "Give 0, or a power of two from 512 to 65536."
            raise PlanError(f"no disk has blocks of {block!r} bytes", hint=hint)
        files = shareable_files(plan, self.source, target)
        offered = max(files.values(), default=0)
        wanted = offered if block is None else block
        if not wanted and not offered:
            return shards, 0, 0
        from surgeon.plan.sharing import could_share, is_same_order, placed

        tensors = self.source.tensors
        chosen = placed(shards, plan, tensors, block=wanted) if wanted else shards
        shared = sum(could_share(shard, plan, tensors, block=offered, files=files) for shard in chosen)
        return chosen, 0 if is_same_order(shards, chosen) else wanted, shared

    def summary(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "keep",
        max_shard_size: int | str = "5GB",
        block: int | None = None,
    ) -> Summary:
        """Return what `save` with these options would do. Reads headers only."""
        return self.prepare(out, dtype=dtype, max_shard_size=max_shard_size, block=block).summary

    def save(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "keep",
        max_shard_size: int | str = "5GB",
        block: int | None = None,
        overwrite: bool = False,
        progress: Progress | bool | None = None,
        command: str | None = None,
    ) -> Summary:
        """Write the result and return what was done. It appears at `out` at once and whole, or not at all.

        `dtype` is "keep" (the source's bytes) or a floating dtype to store; `max_shard_size` a number of bytes or
        "5GB". `block` is the size of the disk blocks for whose sharing the tensors are placed: None, as the disk offers
        it; a receipt's, for the same bytes on any disk. `command` goes into the card and the receipt.

        Raises PlanError before anything is written, OutputError when it cannot be written.
        """
        with watched(progress):
            made = self.prepare(out, dtype=dtype, max_shard_size=max_shard_size, block=block)
            return made.write(overwrite=overwrite, command=command)


def open_model(
    model: "str | os.PathLike[str] | Surgery", *, revision: str | None = None, reads: Reads | None = None
) -> Surgery:
    """Return the model as a surgery that changes nothing yet; one that is already a surgery is continued.

    `reads` is what the options of this step name to be read.

        surgery = surgeon.open_model("gpt2")
        surgery.save("gpt2-bfloat16", dtype="bfloat16")
    """
    if isinstance(model, Surgery):
        if last := next((verb for step in model.plan.steps for verb in step if verb_named(verb).ends), None):
            raise PlanError(f"{last} is the last step of a chain: it stores what no surgery can change",
                            hint=f"Do the other steps first, and {last} the result.")  # fmt: skip
        return replace(model, reads={**model.reads, **reads}) if reads else model
    source = open_source(model, revision=revision)
    anatomy = _anatomy_of(source)
    plan = identity(anatomy.spec, depth=anatomy.depth)
    if anatomy.may_hold_more:
        from surgeon.transforms.settling import settle

        plan, anatomy = settle(source, anatomy, plan)
    return Surgery(source, plan, begun_with=anatomy, reads={"MODEL": (os.fspath(model),), **(reads or {})})


def _anatomy_of(source: Source) -> Anatomy:
    """Return the anatomy of a source. Raises CheckpointError, of a form of quantization that config.json hides too."""
    try:
        return read_anatomy(spec_of(source))
    except CheckpointError as error:
        hiding = next((name for name in QUANTIZATION_FILES if name in source.companions), None)
        if hiding is None or is_quantized(source.config):
            raise
        raise CheckpointError(
            f"{source.label} is quantized, as {hiding} says, and its config.json does not say so",
            hint=f"Add the rules of {hiding} to config.json as quantization_config; then whole layers can be cut.",
        ) from error


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")  # a local path can look like this too


def open_source(model: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """Return the checkpoint that `model` names, an adapter merged. `revision` is a branch, tag or commit on the Hub.

    Raises CheckpointError for a path that is no checkpoint, HubError for an id that the Hub does not have.
    """
    text = os.fspath(model)
    path = Path(os.path.expanduser(text))  # noqa: PTH111  # Path.expanduser raises for a user without a home here
    if not _HUB_ID.fullmatch(text) or path.exists():
        if revision is not None:
            message = f"{text} is a local path; a revision is for a model on the Hub"
            raise CheckpointError(message, hint="Leave out --revision.")
        if not is_adapter(path):
            return open_directory(path, label=text)
        from surgeon.checkpoint.lora import open_adapter

        return open_adapter(path, label=text, open_base=open_source)
    from surgeon.checkpoint.hub import open_hub

    try:
        return open_hub(text, revision=revision)
    except HubError as error:
        if (close := close_path(text, directory=True)) is None and "/" in text:
            raise
        hint = error.hint if close is None else f"Did you mean {close}?"
        raise HubError(f"there is no directory {text}, and {error}", hint=hint) from error
