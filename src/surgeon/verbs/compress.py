"""The verb `compress`: a prompt as a saved gist, checked against the masked pass before it is written."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.output import check_apart, check_space, check_target, staged, write_files
from surgeon.checkpoint.receipt import versions
from surgeon.checkpoint.source import CONFIG, Source, fingerprint, spec_of
from surgeon.errors import OutputError, PlanError
from surgeon.gist.architecture import refusal
from surgeon.gist.compressor import Compressor
from surgeon.gist.tokens import GistTokens, read_gist
from surgeon.options import (
    Checked,
    Reads,
    adapter_option,
    check_counts,
    device_option,
    option,
    output_option,
    overwrite_option,
    progress_option,
    reads_of,
    revision_option,
    takes,
    trust_option,
)
from surgeon.progress import Progress, stage
from surgeon.showing import Shown
from surgeon.surgery import open_source

if TYPE_CHECKING:
    from surgeon.gist.cost import CostTable
    from surgeon.gist.states import GistStates

ABOUT = "gist.json"  # by which a directory is known to hold a compressed prompt


@dataclass(frozen=True, slots=True, repr=False)
class Compression(Shown):
    """A compressed prompt: its directory, its sizes and its check.

    `stored_as` is the file of its states: adapter_model.safetensors, which PEFT loads, or gist.safetensors. `check` has
    the `difference` between the logits after the gist and those of the masked pass, relative to the largest logit, and
    the difference that is `allowed`.

        bot = surgeon.compress("SmolLM2-gist", "You are a helpful bot.", output="bot")
        print(bot.prompt_tokens, bot.gist_tokens, bot.check["difference"])
    """

    output: str
    prompt_tokens: int
    gist_tokens: int
    position_offset: int
    stored_as: str
    state_bytes: int
    check: Mapping[str, Any]
    cost: "CostTable | None"
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"check": dict(self.check), "cost": None if self.cost is None else self.cost.to_dict()}

    @property
    def headline(self) -> str:
        """Where the gist is, its tokens and its size."""
        return f"{self.output}, {self.prompt_tokens:,} → {self.gist_tokens} tokens, {text.size(self.state_bytes)}"

    def to_text(self) -> str:
        """Return this for people."""
        rows = [
            ("tokens", f"{self.prompt_tokens:,} → {self.gist_tokens}"),
            ("states", f"{text.size(self.state_bytes)}, in {self.stored_as}"),
            ("positions", "from 0" if not self.position_offset else f"from {self.position_offset}, as in the prompt"),
            ("checked", f"{self.check['difference']:.1e} of the largest logit, {self.check['allowed']:.0e} allowed"),
            ("output", self.output),
        ]
        lines = [text.rows(rows)]
        if self.cost is not None:
            lines += ["", self.cost.to_text()]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Checked):
    """The options of `compress`."""

    tokens: int | None = option(
        "Number of gist tokens. Default: the --tokens of surgeon gist.", None, metavar="K", group="gists"
    )
    chat: bool = option("Use the prompt as the system turn of the chat template.", False, group="prompt")
    keep_text: bool = option("Store the prompt itself in gist.json, not only its SHA-256.", False, group="output")
    bench: bool = option(
        "Measure the cost of a call with nothing cached, with the whole prompt cached, and with the gist cached.",
        False,
        group="what is measured",
    )
    adapter: str | os.PathLike[str] | None = adapter_option()
    prompt_file: str | os.PathLike[str] | None = option(
        "The file that the prompt was read from, where there is one: it is not replaced.",
        None,
        on_command_line=False,
        reads=True,
        group="prompt",
    )
    output: str | os.PathLike[str] | None = output_option(
        "Where the result goes. Default: MODEL-compress-KT.", parse=Path
    )
    overwrite: bool = overwrite_option("Replace an existing compressed prompt once the new one is complete.")
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    progress: Progress | bool | None = progress_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "tokens")


@takes(CompressOptions)
def compress(model: str | os.PathLike[str], prompt: str, options: CompressOptions) -> Compression:
    """Write a prompt as the states of a gist into the directory `output`, and return how it was checked.

    `tokens` is the length of the gist, by default the checkpoint's. With `chat` the prompt is the system turn of the
    tokenizer's chat template. `keep_text` keeps the prompt in gist.json, which otherwise holds its SHA-256. `bench`
    measures a call with nothing cached, with the whole prompt, and with the gist. `adapter` is a directory of adapters
    that were trained with a frozen reader: the model with them computes the gist, the model without them reads it.

    Raises PlanError for a model without gist tokens, or that cannot have any, and for other adapters; DataError for a
    prompt that is empty or too long; MeasureError for a model that cannot be run; VerificationError where the gist does
    not replace the prompt; OutputError.

        surgeon.compress("SmolLM2-gist", "You are a helpful bot.", output="bot")
    """
    source = open_source(model, revision=options.revision)
    gist = _gist_of(source)

    from surgeon.models.loading import runs

    with runs(source.label, trust_remote_code=options.trust_remote_code):
        return _compressed(source, os.fspath(model), gist, prompt, options)


def _compressed(source: Source, model: str, gist: GistTokens, prompt: str, options: CompressOptions) -> Compression:
    """Return how a prompt was written as the states of a gist of the model of a source."""
    began = monotonic()
    count = len(gist.ids_of(options.tokens))
    compressor = None if options.adapter is None else Compressor(Path(options.adapter))
    target = Path(options.output or f"{Path(source.label).name}-compress-{count}T")
    _check_target(target, overwrite=options.overwrite, reads=reads_of(options) | {"MODEL": (model,)})
    if compressor is not None:
        compressor.check(source)

    from surgeon.gist import saved
    from surgeon.gist.compress import compress_ids
    from surgeon.gist.layout import CHAT, TEXT, prompt_tokens
    from surgeon.models.device import resolve_device
    from surgeon.models.loading import check_tokens, load_on, load_tokenizer, loadable, num_known

    device = resolve_device(options.device)
    layout, encoder = CHAT if options.chat else TEXT, bool(source.config.get("is_encoder_decoder"))
    tokenizer = load_tokenizer(*loadable(source))
    ids = prompt_tokens(prompt, gist, tokenizer, num_tokens=count, layout=layout, encoder=encoder)
    loaded = load_on(source, device)
    check_tokens(max(ids), num_known(loaded), source.label)
    if compressor is not None:
        compressor.attach(loaded)
    with stage("compressing"):
        states, check = compress_ids(loaded, ids, count)
    base = source.provenance()
    about = {
        "model": base | {"fingerprint": fingerprint(source), "type": str(source.config.get("model_type"))},
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "token_ids": ids[-count:],
        "layout": layout,
        "prompt": _described(prompt, len(ids) - count, keep_text=options.keep_text),
        "check": asdict(check),
        "versions": versions(),
    } | ({} if compressor is None else {"compressor": compressor.told()})
    source.check_unchanged()
    _write(saved.files_of(states, about, base=base.get("path") or base["id"]), target, overwrite=options.overwrite)
    with stage("measuring what a call costs"):
        cost = _cost(loaded, ids, states, has_adapters=compressor is not None) if options.bench else None
    return Compression(
        output=str(target),
        prompt_tokens=len(ids) - count,
        gist_tokens=count,
        position_offset=states.offset,
        stored_as=saved.storage_of(states),
        state_bytes=states.num_bytes,
        check=asdict(check),
        cost=cost,
        seconds=monotonic() - began,
    )


def _write(files: Mapping[str, bytes], target: Path, *, overwrite: bool) -> None:
    """Write a compressed prompt, and read it back before it takes its place."""
    from surgeon.gist import saved

    check_space(target, sum(map(len, files.values())))
    with staged(target, overwrite=overwrite) as stage:
        write_files(stage, files)
        saved.read(stage)


def _cost(model: Any, ids: list[int], states: "GistStates", *, has_adapters: bool) -> "CostTable":
    """Return what a call costs with nothing cached, with the whole prompt, and with the gist."""
    from surgeon.gist.cost import measure
    from surgeon.models.adapters import without_adapters

    with without_adapters(model) if has_adapters else nullcontext():
        return measure(model, ids, states)


def _gist_of(source: Source) -> GistTokens:
    """Return the gist tokens of a checkpoint. Raises PlanError where it has none, or could not be checked."""
    anatomy = read_anatomy(spec_of(source))
    gist = read_gist(source.config)
    if gist is None:
        raise PlanError(f"{source.label} has no gist tokens", hint=f"surgeon gist {source.label} --tokens 4")
    if (reason := refusal(source.config, anatomy.depth)) is not None:
        raise PlanError(reason, hint="surgeon gist --check MODEL says which models can be gisted.")
    return gist


def _check_target(target: Path, *, overwrite: bool, reads: Reads) -> None:
    """Refuse an output that must not be written. Raises OutputError; only a compressed prompt is ever replaced."""
    with suppress(OSError):
        if overwrite and target.is_dir() and not target.is_symlink() and any(target.iterdir()):
            if not (target / ABOUT).is_file() or (target / CONFIG).exists():
                raise OutputError(
                    f"{target} is not a compressed prompt, so it is not replaced",
                    hint="Remove it yourself, or choose -o.",
                )
            check_apart(target, reads)
            return
    check_target(target, overwrite=False, reads=reads)


def _described(prompt: str, num_tokens: int, *, keep_text: bool) -> dict[str, Any]:
    """Return the entry of gist.json about the prompt."""
    entry: dict[str, Any] = {"tokens": num_tokens, "sha256": hashlib.sha256(prompt.encode()).hexdigest()}
    return entry | {"text": prompt} if keep_text else entry
