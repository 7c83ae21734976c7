"""The verb `compress`: a prompt to a saved gist, checked against the masked pass before it is there."""

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
from surgeon.checkpoint.output import check_space, check_target, staged, write_files
from surgeon.checkpoint.receipt import versions
from surgeon.checkpoint.source import CONFIG, Source, fingerprint, open_source, spec_of
from surgeon.errors import OutputError, PlanError
from surgeon.gist.architecture import refusal
from surgeon.gist.compressor import Compressor
from surgeon.gist.tokens import GistTokens, read_gist

if TYPE_CHECKING:
    from surgeon.gist.cost import CostTable

ABOUT = "gist.json"  # by which a directory is known to hold a compressed prompt


@dataclass(frozen=True, slots=True)
class Compression:
    """A prompt that was compressed: where it is, how long it was, and how it was checked.

    `stored_as` is the file of its states: adapter_model.safetensors, which PEFT loads, or gist.safetensors. `check` has
    `difference`, how far what follows is from the masked pass, relative to the largest logit, and what is `allowed`.
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

    def to_text(self) -> str:
        """Return this for people."""
        found = [
            ("tokens", f"{self.prompt_tokens:,} → {self.gist_tokens}"),
            ("states", f"{text.size(self.state_bytes)}, in {self.stored_as}"),
            ("positions", "from 0" if not self.position_offset else f"from {self.position_offset}, where it was"),
            ("checked", f"{self.check['difference']:.1e} of the largest logit, {self.check['allowed']:.0e} allowed"),
            ("output", self.output),
        ]
        lines = [text.rows(found)]
        if self.cost is not None:
            lines += ["", self.cost.to_text()]
        return "\n".join(lines)


def compress(
    model: str | os.PathLike[str],
    prompt: str,
    *,
    tokens: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    chat: bool = False,
    keep_text: bool = False,
    bench: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> Compression:
    """Write a prompt as the states of a gist into the directory `output`, and return what was found.

    `tokens` is the length of the gist, by default the checkpoint's. With `chat` the prompt is the system turn of the
    tokenizer's chat template. `keep_text` keeps the prompt in gist.json, which else holds its SHA-256. `bench` measures
    what a call costs with nothing cached, the whole prompt, and the gist. `adapter` is a directory of adapters that
    were trained to compress for a frozen reader: the gist is theirs, and the model without them reads it.

    Raises PlanError for a model without gist tokens, or that cannot have any, and for other adapters; DataError for a
    prompt that is empty or too long; MeasureError for a model that cannot be run; VerificationError where the gist does
    not replace the prompt; OutputError.

        surgeon.compress("SmolLM2-gist", "You are a helpful bot.", output="bot")
    """
    began = monotonic()
    source = open_source(model, revision=revision)
    gist = _checked(source)
    count = len(gist.ids_of(tokens))
    compressor = None if adapter is None else Compressor(Path(adapter))
    if compressor is not None:
        compressor.check(source)
    target = Path(f"{Path(source.label).name}-compress-{count}T" if output is None else output)
    _check_target(target, overwrite=overwrite, source=source)

    from surgeon.gist import saved
    from surgeon.gist.compress import compress_ids
    from surgeon.gist.layout import CHAT, TEXT, prompt_tokens
    from surgeon.models.device import resolve_device
    from surgeon.models.loading import load_on, load_tokenizer, loadable

    place = resolve_device(device)
    layout, encoder = CHAT if chat else TEXT, bool(source.config.get("is_encoder_decoder"))
    tokenizer = load_tokenizer(*loadable(source))
    ids = prompt_tokens(prompt, gist, tokenizer, num_tokens=count, layout=layout, encoder=encoder)
    loaded = load_on(source, place)
    if compressor is not None:
        compressor.attach(loaded)
    states, check = compress_ids(loaded, ids, count)
    base = source.provenance()
    about = {
        "model": base | {"fingerprint": fingerprint(source), "type": str(source.config.get("model_type"))},
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "token_ids": ids[-count:],
        "layout": layout,
        "prompt": _told(prompt, len(ids) - count, keep_text=keep_text),
        "check": asdict(check),
        "versions": versions(),
    } | ({} if compressor is None else {"compressor": compressor.told()})
    files = saved.files_of(states, about, base=base.get("path") or base["id"])
    check_space(target, sum(map(len, files.values())))
    with staged(target, overwrite=overwrite) as stage:
        write_files(stage, files)
        saved.read(stage)  # what a reader finds, before anyone can
    cost = None
    if bench:
        from surgeon.gist.cost import measure
        from surgeon.models.adapters import without_adapters

        with without_adapters(loaded) if compressor is not None else nullcontext():
            cost = measure(loaded, ids, states)
    seconds = monotonic() - began
    return Compression(
        str(target),
        len(ids) - count,
        count,
        states.offset,
        saved.storage_of(states),
        states.num_bytes,
        asdict(check),
        cost,
        seconds,
    )


def _checked(source: Source) -> GistTokens:
    """Return the gist tokens of a checkpoint. Raises PlanError where it has none, or could not be checked."""
    anatomy = read_anatomy(spec_of(source))
    gist = read_gist(source.config)
    if gist is None:
        raise PlanError(f"{source.label} has no gist tokens", hint=f"surgeon gist {source.label} --tokens 4")
    if (reason := refusal(source.config, anatomy.depth)) is not None:
        raise PlanError(reason, hint="surgeon gist --check MODEL says which models can be gisted.")
    return gist


def _check_target(target: Path, *, overwrite: bool, source: Source) -> None:
    """Refuse an output that must not be written. Raises OutputError; only a compressed prompt is ever replaced."""
    with suppress(OSError):
        if overwrite and target.is_dir() and not target.is_symlink() and any(target.iterdir()):
            if not (target / ABOUT).is_file() or (target / CONFIG).exists():
                raise OutputError(
                    f"{target} is not a compressed prompt, so it is not replaced",
                    hint="Remove it yourself, or choose -o.",
                )
            return
    check_target(target, overwrite=False, source=source.origin)


def _told(prompt: str, num_tokens: int, *, keep_text: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"tokens": num_tokens, "sha256": hashlib.sha256(prompt.encode()).hexdigest()}
    return said | {"text": prompt} if keep_text else said
