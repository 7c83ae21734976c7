"""The verb `generate`: a model's continuation of a text, or of a compressed prompt and a text."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import text_config
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import DataError, PlanError
from surgeon.gist.tokens import read_gist
from surgeon.options import (
    Checked,
    OptionError,
    check_counts,
    check_seed,
    device_option,
    option,
    progress_option,
    revision_option,
    seed_option,
    takes,
    trust_option,
)
from surgeon.progress import Progress, stage
from surgeon.showing import Shown
from surgeon.surgery import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.gist.prompt import GistPrompt


@dataclass(frozen=True, slots=True, repr=False)
class Generation(Shown):
    """A continuation, without special tokens.

    `text_tokens` counts the tokens of the text, without a compressed prompt; `new_tokens` counts the tokens that were
    generated, the end-of-text token included.

        generation = surgeon.generate("gpt2", "The meaning of life", max_new_tokens=20)
        print(generation.text, generation.new_tokens)
    """

    text: str
    text_tokens: int
    gist_tokens: int
    new_tokens: int
    seconds: float

    @property
    def headline(self) -> str:
        """The beginning of the text, and its length."""
        return f"{self.text[:60]!r}{'...' if len(self.text) > 60 else ''}, {self.new_tokens} tokens"

    def to_text(self) -> str:
        """Return the continuation."""
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Checked):
    """The options of `generate`."""

    gist: str | os.PathLike[str] | None = option(
        "A prompt from surgeon compress, placed before the text.", None, metavar="DIR", reads=True, group="prompt"
    )
    max_new_tokens: int = option("Longest continuation, in tokens.", 256, metavar="N", group="sampling")
    temperature: float = option("Sample at this temperature; 0 is greedy.", 0.0, metavar="T", group="sampling")
    top_p: float = option(
        "Sample from the likeliest tokens that make up this probability.", 1.0, metavar="P", group="sampling"
    )
    beams: int = option("Number of beams of a beam search.", 1, metavar="N", group="sampling")
    seed: int = seed_option()
    chat: bool = option("Put the text into the chat template, as a user's turn.", False, group="prompt")
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    progress: Progress | bool | None = progress_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        check_counts(self, "max_new_tokens", "beams")
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(
                "temperature", f"--temperature is {self.temperature}", hint="0 is greedy, 1 samples from the model."
            )
        if not 0 < self.top_p <= 1:
            raise OptionError(
                "top_p", f"--top-p is {self.top_p}, not above 0 and at most 1", hint="1 keeps all tokens."
            )
        if self.top_p < 1 and not self.temperature:
            raise OptionError("top_p", "--top-p has no effect without --temperature", hint="Add --temperature 1.")


@takes(GenerateOptions)
def generate(model: str | os.PathLike[str], text: str, options: GenerateOptions) -> Generation:
    """Return a model's continuation of a text, up to an end-of-text token or the last position of the model.

    `model` is a checkpoint directory or a Hub id. `gist` is a directory that `surgeon.compress` wrote; its prompt goes
    before the text. With a `temperature` tokens are sampled from `seed`, among the likeliest that make up `top_p`; at
    0 decoding is greedy. `chat` puts the text into the tokenizer's chat template, as a gist of a chat always does.

    Raises PlanError for options that contradict each other, DataError for a text that is empty or too long,
    CheckpointError for a gist that is damaged or of another model, MeasureError for a model that cannot be run.

        print(surgeon.generate("gpt2", "The meaning of life", max_new_tokens=20))
    """
    source = open_source(model, revision=options.revision)
    read_anatomy(spec_of(source))

    from surgeon.models.loading import runs

    with runs(source.label, trust_remote_code=options.trust_remote_code):
        return _generated(source, text, options)


def _generated(source: Source, text: str, options: GenerateOptions) -> Generation:
    """Return the continuation of a text by the model of a source."""
    began = monotonic()

    from surgeon.models.device import resolve_device
    from surgeon.models.loading import check_tokens, load_on, load_tokenizer, loadable, num_known

    device = resolve_device(options.device)
    tokenizer = load_tokenizer(*loadable(source))
    gist = None if options.gist is None else Path(options.gist)
    if gist is None:
        ids = _text_ids(text, source, tokenizer, chat=options.chat)
    else:
        ids = _text_ids_after(gist, text, source, tokenizer, chat=options.chat)
    loaded = load_on(source, device)
    check_tokens(max(ids, default=0), num_known(loaded), source.label)
    prompt = None if gist is None else _loaded_gist(gist, loaded, source)
    stops = _stop_tokens(loaded, source, tokenizer)
    loaded.generation_config = _generation_config(loaded, stops, options)
    with stage("generating"):
        new_ids = _continuation(loaded, prompt, ids, max_new_tokens=options.max_new_tokens, seed=options.seed)
    end = next((place for place, token in enumerate(new_ids) if token in stops), len(new_ids))
    return Generation(
        text=str(tokenizer.decode(new_ids[:end], skip_special_tokens=True)),
        text_tokens=len(ids),
        gist_tokens=0 if prompt is None else len(prompt.ids),
        new_tokens=min(end + 1, len(new_ids)),
        seconds=monotonic() - began,
    )


def _continuation(
    model: Any, prompt: "GistPrompt | None", ids: list[int], *, max_new_tokens: int, seed: int
) -> list[int]:
    """Return the tokens that a model generates after `ids`, which stand after a compressed prompt if there is one."""
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
    input_ids = torch.tensor([ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        if prompt is not None:
            return list(prompt.generate(input_ids, max_new_tokens=max_new_tokens)[0].tolist())
        sequences = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=max_new_tokens)
    return list(sequences[0, 1 if model.config.is_encoder_decoder else len(ids) :].tolist())


def _generation_config(model: Any, stops: set[int], options: GenerateOptions) -> Any:
    """Return a new config: the checkpoint's own may sample, penalise repetition, or keep 50 tokens only."""
    from transformers import GenerationConfig

    stored = model.generation_config
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        **sampling,
        num_beams=options.beams,
        eos_token_id=sorted(stops) or None,
        pad_token_id=stored.pad_token_id if stored.pad_token_id is not None else min(stops, default=0),
        suppress_tokens=stored.suppress_tokens,
        decoder_start_token_id=stored.decoder_start_token_id,
    )


def _text_ids(text: str, source: Source, tokenizer: "PreTrainedTokenizerBase", *, chat: bool) -> list[int]:
    """Return the tokens of a text, with the special tokens that the model expects around it."""
    from surgeon.data.rows import begin_of_text, encode, templated

    if chat:
        ids = encode(templated([{"role": "user", "content": text}], tokenizer, "the text", answer=True), tokenizer)
    elif source.config.get("is_encoder_decoder"):
        ids = encode(text, tokenizer) + [int(token) for token in [tokenizer.eos_token_id] if token is not None]
    else:
        ids = [*begin_of_text(tokenizer), *encode(text, tokenizer)]
    if not ids:
        raise DataError("there is no text to go on from", hint="Give a TEXT, or --input-file.")
    return ids


def _text_ids_after(
    gist: Path, text: str, source: Source, tokenizer: "PreTrainedTokenizerBase", *, chat: bool
) -> list[int]:
    """Return the tokens of a text after a compressed prompt. The prompt is checked before the model is loaded."""
    from surgeon.gist.layout import CHAT, LAYOUTS, text_tokens
    from surgeon.gist.prompt import check_model
    from surgeon.gist.saved import read

    about = read(gist).about
    check_model(about, source, gist)
    layout, gist_tokens = about.get("layout"), read_gist(source.config)
    if layout not in LAYOUTS or gist_tokens is None:
        raise DataError(f"{gist} has an unknown layout: {layout!r}", hint="Compress the prompt again.")
    if chat and layout != CHAT:
        raise PlanError(
            f"{gist} holds a prompt in plain text, and --chat needs a prompt that was compressed as a system turn",
            hint="Compress it with --chat, or leave out --chat here.",
        )
    encoder = bool(source.config.get("is_encoder_decoder"))
    return text_tokens(text, gist_tokens, tokenizer, layout=layout, encoder=encoder)


def _loaded_gist(gist: Path, model: Any, source: Source) -> "GistPrompt":
    from surgeon.gist.prompt import load

    return load(gist, model, checkpoint=source)


def _stop_tokens(model: Any, source: Source, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens that end a text: those of the model, of its config and of its tokenizer."""
    values = (
        model.generation_config.eos_token_id,
        text_config(source.config).get("eos_token_id"),
        tokenizer.eos_token_id,
    )
    lists = (value if isinstance(value, list) else [value] for value in values)
    return {token for tokens in lists for token in tokens if isinstance(token, int)}
