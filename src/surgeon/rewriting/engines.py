"""The engines that write answers: transformers on any device, and vLLM's offline engine where it is installed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from surgeon.anatomy.config import text_config
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.source import Source
from surgeon.errors import MeasureError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
VLLM_HINT = 'In an environment of its own: pip install "surgeon[vllm]"; or --engine transformers.'


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How answers are written: the longest, greedy at temperature 0, and how many prompts and tokens a batch has."""

    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class Written:
    """An answer: its text, its number of tokens with the one that ends it, and whether it has one."""

    text: str
    num_tokens: int
    is_finished: bool


class Engine(Protocol):
    """Writes answers to prompts. The same batch, attempt and seed give the same answers again."""

    def plan(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the indices of the prompts in the batches in which they are written."""

    def write(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], attempt: int) -> list[Written]:
        """Return the answers to the prompts of one batch, which are those of these rows, for the n-th time."""


def chosen(engine: str, device: str) -> str:
    """Return the engine that "auto" stands for: vLLM on CUDA where it is installed, else transformers."""
    if engine != "auto":
        return engine
    return "vllm" if device.startswith("cuda") and find_spec("vllm") is not None else "transformers"


def seed_of(seed: int, row: int, attempt: int) -> int:
    """Return the seed of a draw, below 2**63: it depends on nothing that was drawn before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row} {attempt}".encode()).digest()[:8], "big") >> 1


class TransformersEngine:
    """Batches of prompts, padded on the left, through `generate`. The model is loaded when it is first needed."""

    def __init__(self, source: Source, tokenizer: "PreTrainedTokenizerBase", device: str, writing: Writing) -> None:
        self._source, self._tokenizer, self._device, self._writing = source, tokenizer, device, writing

    @cached_property
    def _model(self) -> Any:
        from surgeon.evals.generation import load_whole

        return load_whole(self._source, self._device)

    def plan(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return batches of prompts of about one length, the longest first."""
        from surgeon.evals.generation import check_prompts, planned, stop_tokens

        _, pad = stop_tokens(self._model, self._tokenizer)
        check_prompts(self._model, [*prompts, [pad]])
        limits = {"most_tokens": self._writing.batch_tokens, "new_tokens": self._writing.max_new_tokens}
        batches, _ = planned(self._model, prompts, pad, batch_size=self._writing.batch_size, **limits)
        return batches

    def write(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], attempt: int) -> list[Written]:
        """Return the answers to the prompts of one batch."""
        from surgeon.evals.generation import continued, stop_tokens

        stops, _ = stop_tokens(self._model, self._tokenizer)
        written = continued(
            self._model,
            self._tokenizer,
            prompts,
            max_new_tokens=self._writing.max_new_tokens,
            temperature=self._writing.temperature,
            seed=seed_of(self._writing.seed, rows[0], attempt),
        )
        return [self._written(row, stops) for row in written]

    def _written(self, row: Sequence[int], stops: set[int]) -> Written:
        from surgeon.evals.generation import decoded

        end = next((place for place, token in enumerate(row) if token in stops), None)
        count = len(row) if end is None else end + 1
        return Written(decoded(row, stops, self._tokenizer).strip(), count, end is not None)


class VllmEngine:
    """All prompts at once through vLLM's offline engine, which batches them itself."""

    def __init__(self, source: Source, tokenizer: "PreTrainedTokenizerBase", trusts: bool, writing: Writing) -> None:
        self._source, self._tokenizer, self._writing, self._trusts = source, tokenizer, writing, trusts
        try:
            self._vllm: Any = import_module("vllm")
        except ImportError as error:
            raise MeasureError(f"vLLM cannot be imported: {error}", hint=VLLM_HINT) from error

    @cached_property
    def _model(self) -> Any:
        from surgeon.models.loading import loadable

        name, revision = loadable(self._source, weights=True)
        # generation_config: the checkpoint's own may sample, penalise repetition, or keep 50 tokens only.
        return self._vllm.LLM(
            model=name,
            tokenizer=name,
            revision=revision,
            tokenizer_revision=revision,
            trust_remote_code=self._trusts,
            generation_config="vllm",
            seed=self._writing.seed,
            enable_prefix_caching=True,
        )

    def plan(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return one batch of all prompts."""
        return [list(range(len(prompts)))]

    def write(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], attempt: int) -> list[Written]:
        """Return the answers to the prompts. Raises MeasureError where vLLM gives fewer."""
        stops = sorted(_stop_tokens(self._source, self._tokenizer))
        sampling = [
            self._vllm.SamplingParams(
                n=1,
                temperature=self._writing.temperature,
                max_tokens=self._writing.max_new_tokens,
                seed=seed_of(self._writing.seed, row, attempt) >> 32,
                stop_token_ids=stops,
            )
            for row in rows
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._model.generate(asked, sampling, use_tqdm=False)
        if len(outputs) != len(asked):
            raise MeasureError(f"vLLM gave {len(outputs)} answers to {len(asked)} prompts", hint=VLLM_HINT)
        return [self._written(output.outputs[0], set(stops)) for output in outputs]

    def _written(self, completion: Any, stops: set[int]) -> Written:
        from surgeon.evals.generation import decoded

        ids = list(completion.token_ids)
        text = decoded(ids, stops, self._tokenizer)
        return Written(text.strip(), len(ids), completion.finish_reason == "stop")


def _stop_tokens(source: Source, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens that end an answer: those of the generation config, of the config and of the tokenizer."""
    stored = read_json(source.fetch(GENERATION)) if GENERATION in source.companions else {}
    values = (
        stored.get("eos_token_id") if isinstance(stored, dict) else None,
        text_config(source.config).get("eos_token_id"),
        tokenizer.eos_token_id,
    )
    lists = (value if isinstance(value, list) else [value] for value in values)
    return {token for tokens in lists for token in tokens if isinstance(token, int)}
