"""The verb `generate`: what a model writes behind a text, or behind a compressed prompt and a text."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import text_config
from surgeon.checkpoint.source import Source, open_source, spec_of
from surgeon.errors import DataError, PlanError
from surgeon.gist.tokens import read_gist

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.gist.prompt import GistPrompt

MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote: the continuation alone, without special tokens.

    `text_tokens` counts what it read beside a compressed prompt, `new_tokens` what it wrote, the end included.
    """

    text: str
    text_tokens: int
    gist_tokens: int
    new_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return asdict(self)


def generate(
    model: str | os.PathLike[str],
    text: str,
    *,
    gist: str | os.PathLike[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int = 0,
    chat: bool = False,
    device: str = "auto",
    revision: str | None = None,
) -> Generation:
    """Return what a checkpoint or Hub model writes behind a text, up to an end-of-text token or the last position.

    `gist` is a directory that `surgeon.compress` wrote: the prompt that stands in front of the text. With a
    `temperature` the model draws, among the likeliest tokens that make up `top_p`, from `seed`; at 0 it is greedy.
    `chat` puts the text into the tokenizer's chat template, as a gist of a chat always does.

    Raises PlanError for options that contradict each other, DataError for a text that is empty or too long,
    CheckpointError for a gist that is damaged or of another model, MeasureError for a model that cannot be run.

        print(surgeon.generate("gpt2", "The meaning of life", max_new_tokens=20).text)
    """
    began = monotonic()
    _check(max_new_tokens, temperature, top_p, beams)
    source = open_source(model, revision=revision)
    read_anatomy(spec_of(source))

    from surgeon.models.device import resolve_device
    from surgeon.models.loading import load_on, load_tokenizer, loadable

    place = resolve_device(device)
    tokenizer = load_tokenizer(*loadable(source))
    encoder = bool(source.config.get("is_encoder_decoder"))
    if gist is None:
        ids = _text_tokens(text, tokenizer, chat=chat, encoder=encoder)
    else:
        ids = _tokens_behind(Path(gist), source, text, tokenizer, chat=chat, encoder=encoder)
    loaded = load_on(source, place)
    prompt = None if gist is None else _loaded_gist(Path(gist), loaded, source)
    stops = _stops(loaded, source, tokenizer)
    loaded.generation_config = _generation_config(loaded, stops, temperature=temperature, top_p=top_p, beams=beams)
    written = _write(loaded, prompt, ids, max_new_tokens=max_new_tokens, seed=seed)
    end = next((i for i, token in enumerate(written) if token in stops), len(written))
    said = str(tokenizer.decode(written[:end], skip_special_tokens=True))
    count = min(end + 1, len(written))
    return Generation(said, len(ids), 0 if prompt is None else len(prompt.ids), count, monotonic() - began)


def _write(model: Any, prompt: "GistPrompt | None", ids: list[int], *, max_new_tokens: int, seed: int) -> list[int]:
    """Return the tokens that a model writes behind `ids`, and behind a compressed prompt if there is one."""
    import torch

    from surgeon.gist.compress import position_limit
    from surgeon.models.loading import quiet_transformers

    before = 0 if prompt is None else prompt.states.offset + len(prompt.ids)
    if (limit := position_limit(model)) is not None:
        if before + len(ids) >= limit:
            raise DataError(
                f"the text ends at position {before + len(ids)}, and the model has {limit}", hint="Shorten the text."
            )
        max_new_tokens = min(max_new_tokens, limit - before - len(ids))
    given = torch.tensor([ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        if prompt is not None:
            return list(prompt.generate(given, max_new_tokens=max_new_tokens)[0].tolist())
        written = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens)
    return list(written[0, 1 if model.config.is_encoder_decoder else len(ids) :].tolist())


def _generation_config(model: Any, stops: set[int], *, temperature: float, top_p: float, beams: int) -> Any:
    """Return a config of our own: that of the checkpoint may sample, penalise what was said, or keep 50 tokens only."""
    from transformers import GenerationConfig

    theirs = model.generation_config
    draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    pads = theirs.pad_token_id if theirs.pad_token_id is not None else min(stops, default=0)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        **({"do_sample": False} | draws),
        num_beams=beams,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pads,
        suppress_tokens=theirs.suppress_tokens,
        decoder_start_token_id=theirs.decoder_start_token_id,
    )


def _text_tokens(text: str, tokenizer: "PreTrainedTokenizerBase", *, chat: bool, encoder: bool) -> list[int]:
    from surgeon.data.rows import begin_of_text, encode, templated

    if chat:
        ids = encode(templated([{"role": "user", "content": text}], tokenizer, "the text", answer=True), tokenizer)
    elif encoder:
        ids = encode(text, tokenizer) + [int(i) for i in [tokenizer.eos_token_id] if i is not None]
    else:
        ids = [*begin_of_text(tokenizer), *encode(text, tokenizer)]
    if not ids:
        raise DataError("there is no text to go on from", hint="Give a TEXT, or --input-file.")
    return ids


def _tokens_behind(
    gist: Path, source: Source, text: str, tokenizer: "PreTrainedTokenizerBase", *, chat: bool, encoder: bool
) -> list[int]:
    """Return the tokens of a text behind a compressed prompt, which is looked at before the model is loaded."""
    from surgeon.gist.layout import CHAT, LAYOUTS, text_tokens
    from surgeon.gist.prompt import check_model
    from surgeon.gist.saved import read

    about = read(gist).about
    check_model(about, source, gist)
    layout, known = about.get("layout"), read_gist(source.config)
    if layout not in LAYOUTS or known is None:
        raise DataError(f"{gist} has no layout that is known: {layout!r}", hint="Compress the prompt again.")
    if chat and layout != CHAT:
        raise PlanError(
            f"{gist} holds a prompt in plain text, and a chat needs one that was its system turn",
            hint="Compress it with --chat, or leave out --chat here.",
        )
    return text_tokens(text, known, tokenizer, layout=layout, encoder=encoder)


def _loaded_gist(gist: Path, model: Any, source: Source) -> "GistPrompt":
    from surgeon.gist.prompt import load

    return load(gist, model, checkpoint=source)


def _stops(model: Any, source: Source, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens that end a text, after the model, its config and its tokenizer."""
    named = (
        model.generation_config.eos_token_id,
        text_config(source.config).get("eos_token_id"),
        tokenizer.eos_token_id,
    )
    lists = (value if isinstance(value, list) else [value] for value in named)
    return {value for values in lists for value in values if isinstance(value, int)}


def _check(max_new_tokens: int, temperature: float, top_p: float, beams: int) -> None:
    """Raises PlanError for numbers that make no sense, alone or together."""
    if max_new_tokens < 1 or beams < 1:
        name, found = ("--max-new-tokens", max_new_tokens) if max_new_tokens < 1 else ("--beams", beams)
        raise PlanError(f"{name} is {found}; 1 is the least", hint=f"Set {name} to 1 or more.")
    if not 0 <= temperature < float("inf"):
        raise PlanError(f"--temperature is {temperature}", hint="0 is greedy, 1 draws as the model says.")
    if not 0 < top_p <= 1:
        raise PlanError(f"--top-p is {top_p}, not above 0 and up to 1", hint="1 keeps all tokens.")
    if top_p < 1 and not temperature:
        raise PlanError("--top-p says nothing to a greedy model", hint="Add --temperature 1.")
