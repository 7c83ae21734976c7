"""A compressed prompt in the place of its text, for transformers' `generate`: batched, with beams, with sampling.

It avoids errors that stay unnoticed by hand: a cache grows when it is used, so each call gets its own; `generate` needs
placeholders and a mask for cached tokens; a batch is padded before the gist, never between it and the text, where the
padding would push the gist out of a sliding window; a model must not write gist tokens.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from surgeon.checkpoint.source import Source, fingerprint
from surgeon.errors import CheckpointError, DataError, SurgeonError
from surgeon.gist.compress import encoded_behind, position_limit
from surgeon.gist.probes import logits_of, positions_from
from surgeon.gist.saved import read
from surgeon.gist.states import GistStates, written_from
from surgeon.models.loading import quiet_transformers
from surgeon.surgery import open_source

NAME_IT = "surgeon.gist.load(directory, model, checkpoint=DIR) names what the model was loaded from."


def load(
    directory: str | os.PathLike[str], model: Any, *, checkpoint: str | os.PathLike[str] | Source | None = None
) -> "GistPrompt":
    r"""Return the compressed prompt in `directory`, ready to be read by `model`, on its device and in its dtype.

    `checkpoint` is the source of the model's weights, by default the one that transformers loaded. Later changes of the
    model in memory are not noticed.
    Raises CheckpointError for a damaged file, and for another model than the one that compressed the prompt, which
    would write fluent nonsense.

        model = AutoModelForCausalLM.from_pretrained("SmolLM2-gist")
        prompt = surgeon.gist.load("gists/bot", model)
        prompt.generate(tokenizer("\nInput: ...", return_tensors="pt").input_ids, max_new_tokens=64)
    """
    place = Path(directory)
    saved = read(place)
    check_model(saved.about, _source_of(model) if checkpoint is None else _opened(checkpoint), place)
    states = saved.states.to(model.device, model.dtype)
    return GistPrompt(model, states, tuple(saved.about["token_ids"]), saved.about)


@dataclass(frozen=True, eq=False)
class GistPrompt:
    """A compressed prompt and the model that reads it. `ids` are the gist's tokens, `about` is its gist.json."""

    model: Any
    states: GistStates
    ids: tuple[int, ...]
    about: Mapping[str, Any]

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return the generated tokens after the prompt and each text, shape (B * sequences, new tokens).

        `options` are those of transformers' `generate`. Raises DataError where there are not enough positions.
        """
        num_new = options.get("max_new_tokens")
        limit = position_limit(self.model)
        if num_new is not None and limit is not None:
            needed = self.states.offset + len(self.ids) + input_ids.shape[1] + num_new
            if needed > limit and self.states.offset:
                raise DataError(
                    f"the text would end at position {needed}, and the model has {limit}",
                    hint="Write less (--max-new-tokens), or shorten the text.",
                )
        copies = {key: options.pop(key) for key in ("num_beams", "num_return_sequences") if key in options}
        arguments = self.generate_kwargs(input_ids, attention_mask, **copies)
        arguments["suppress_tokens"] = sorted(
            {*arguments["suppress_tokens"], *(options.pop("suppress_tokens", None) or [])}
        )
        with torch.no_grad(), quiet_transformers():
            written: Tensor = self.model.generate(**arguments, **options)
        return written[:, 1 if "encoder_outputs" in arguments else arguments["input_ids"].shape[1] :]

    def generate_kwargs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_beams: int | None = None,
        num_return_sequences: int | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of one call of transformers' `generate`, in which the gist stands before each text.

        `input_ids`, shape (B, T), are the texts after the gist, without a begin-of-text token; `attention_mask` is 0 at
        padding, on either side. Beams and sequences are arguments here, because the cache must hold as many rows. The
        result of `generate` begins with placeholders for the gist, except for an encoder-decoder.

        Raises DataError for a text without a token, or with a gist token.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[seen.bool()].to(self.model.device) for ids, seen in zip(input_ids, mask, strict=True)]
        self._check(rows)
        config = self.model.generation_config
        copies = {
            "num_beams": num_beams or config.num_beams or 1,
            "num_return_sequences": num_return_sequences or config.num_return_sequences or 1,
        }
        suppressed = sorted({*(config.suppress_tokens or []), *self.ids})
        # A config may switch caching off; `generate` then reads all tokens again and adds them to the gist's.
        arguments = {**copies, "use_cache": True, "suppress_tokens": suppressed}
        if self.states.encoded is not None:
            return arguments | self._encoded(rows)
        return arguments | self._cached(rows, max(copies.values()))

    def _cached(self, rows: Sequence[Tensor], copies: int) -> dict[str, Any]:
        """Return texts after placeholders, padded before them, with a cache for all but their last token.

        Texts of one length need no padding: then the cache holds the gist alone, and `generate` reads the texts.
        """
        before = torch.tensor(self.ids, device=self.model.device)
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), len(before) + longest, dtype=torch.long, device=self.model.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, -len(row) - len(before) :] = torch.cat([before, row])
            mask[i, -len(row) - len(before) :] = 1
        if all(len(row) == longest for row in rows):
            cache = self.states.cache(self.model.config, rows=len(rows))
        else:
            cache = self._read(rows, ids.shape[1] - 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if self.states.offset:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + self.states.offset
        return arguments

    def _read(self, rows: Sequence[Tensor], length: int) -> DynamicCache:
        """Return a cache of gist and text but its last token, each row read alone and then padded on the left."""
        caches = []
        with torch.no_grad():
            for row in rows:
                cache = self.states.cache()  # without sliding layers: the padded cache applies its windows itself
                if len(row) > 1:
                    first = self.states.offset + len(self.ids)
                    arguments = positions_from(self.model, first, len(row) - 1)
                    logits_of(self.model, row[None, :-1], past_key_values=cache, use_cache=True, **arguments)
                caches.append(cache)
        stacked = DynamicCache(config=self.model.config)
        for i in range(len(self.states.layers)):
            keys, values = ([getattr(cache.layers[i], kind) for cache in caches] for kind in ("keys", "values"))
            stacked.update(_stacked(keys, length), _stacked(values, length), i)
        return stacked

    def _encoded(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        """Return the encoder's states of the texts after the gist."""
        with torch.no_grad():
            return written_from([encoded_behind(self.model, self.states, row[None])[0] for row in rows])

    def _check(self, rows: Sequence[Tensor]) -> None:
        for i, row in enumerate(rows):
            if not len(row):
                raise DataError(f"text {i} has no token to go on from", hint="Give a text of one token or more.")
            if set(row.tolist()) & set(self.ids):
                raise DataError(f"text {i} has a gist token", hint="The gist is put before it; leave it out.")


def _stacked(rows: Sequence[Tensor], length: int) -> Tensor:
    """Return keys or values, each (1, heads, T, dim), as (B, heads, length, dim) with zeros before short ones."""
    padded = [torch.nn.functional.pad(row, (0, 0, length - row.shape[2], 0)) for row in rows]
    return torch.cat(padded)


def check_model(about: Mapping[str, Any], source: Source, place: Path) -> None:
    """Raise CheckpointError where `source` is not the checkpoint that compressed the prompt in `place`."""
    made_by = about.get("model")
    if not isinstance(made_by, Mapping) or "fingerprint" not in made_by:
        raise CheckpointError(f"{place} does not say which model compressed it", hint="Compress the prompt again.")
    if fingerprint(source) != made_by["fingerprint"]:
        known = made_by.get("path") or made_by.get("id")
        raise CheckpointError(
            f"{place} was compressed by another model ({known}), not by {source.label}",
            hint="A compressed prompt is read by the very weights that compressed it; compress it again.",
        )


def _source_of(model: Any) -> Source:
    """Return the checkpoint from which transformers loaded a model. Raises CheckpointError where it is not known."""
    name = getattr(model, "name_or_path", "")
    if not name:
        raise CheckpointError("the model does not say which checkpoint it was loaded from", hint=NAME_IT)
    revision = None if Path(name).exists() else getattr(model.config, "_commit_hash", None)
    return _opened(name, revision)


def _opened(checkpoint: str | os.PathLike[str] | Source, revision: str | None = None) -> Source:
    if not isinstance(checkpoint, str | os.PathLike):
        return checkpoint
    try:
        return open_source(checkpoint, revision=revision)
    except SurgeonError as error:
        raise CheckpointError(f"cannot tell which model this is: {error}", hint=NAME_IT) from error
