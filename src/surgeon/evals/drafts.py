"""A model as the draft of its baseline: the tokens that exact speculative sampling would accept, and does.

Sources: Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318): a drafted token is accepted with
probability min(1, p / q), so the share that is accepted is Σ min(p, q) = 1 - total variation.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import spec_of
from surgeon.cost.drafting import acceptance_of, draft_speed, time_share
from surgeon.errors import MeasureError
from surgeon.evals.compare import Scored, estimate
from surgeon.evals.evaluation import EvalContext, Evaluation
from surgeon.evals.generation import load_whole
from surgeon.evals.options import DRAFTED, SAMPLES, SEQUENCE_LENGTH, EvaluationOptions
from surgeon.evals.perplexity import ONE_ROW, read_stream, streamed
from surgeon.measure.figure_sums import FigureSums, compare
from surgeon.models.device import groups, row_bytes
from surgeon.models.loading import quiet_transformers
from surgeon.models.streaming import StreamedModel
from surgeon.progress import meter, stage
from surgeon.search.figures import Figures

PROMPTS, PROMPT_TOKENS = 8, 32  # of a measured sampling: rows of the text, of which so many tokens are the prompt
MEASURED = {"acceptance": "overlap", "agreement": "agreeing", "kl": "kl"}  # figures, by the sums that they are of
TIMED = 20  # steps of one token that are timed


def evaluate_acceptance(context: EvalContext, options: EvaluationOptions) -> Evaluation:
    """Return how many of a model's tokens its baseline would accept, and with `max_new_tokens` does accept."""
    length = options.sequence_length or SEQUENCE_LENGTH
    shape = {"samples": options.samples or SAMPLES, "sequence_length": length}
    columns = options.columns
    streams = [read_stream(options.data, one, **shape, whole_rows=True, columns=columns) for one in context.tokenizers]
    context.check_same([[other.tokens.tolist()] for other in streams])
    tokens = streams[0].tokens
    length = min(length, len(tokens))
    most = min(filter(None, map(positions_of, context.sources)), default=length)
    context.check_length(length, "rows have", f"Use --sequence-length {most}.")
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    draft, target = (streamed(source, context.device) for source in context.sources)
    sums = compared(draft, target, rows)
    sizes = (length - 1,) * len(rows)
    figures = {name: estimate(values, sizes) for name, values in sums.items()}
    counts = {"tokens": sum(sizes), "rows": len(rows)}
    scored = Scored(draft.label, figures, counts, {name: tuple(values) for name, values in sums.items()}, sizes)
    share = time_share(*(read_anatomy(spec_of(source)) for source in context.sources))
    drafting: dict[str, Any] = {"target": target.label, **_arithmetic(figures["acceptance"].value, share)}
    if options.max_new_tokens is not None:
        drafting["measured"] = _sampled(context, rows, options)
    notes = [*([ONE_ROW] if len(rows) < 2 else []), *streams[0].notes, *_said(drafting)]
    setup = context.setup(options.data, streams[0].digest, columns) | {"sequence_length": length, "stride": None}
    return Evaluation.of(options.metric, [scored], setup | {"drafting": drafting}, notes)


def compared(draft: StreamedModel, target: StreamedModel, rows: Tensor) -> dict[str, list[float]]:
    """Return for each row, of shape (R, T), the sums over its T - 1 predicting tokens.

    "acceptance": Σ_v min(p, q); "agreement": both think the same token the most likely; "kl": KL(target || draft) in
    nats.
    """
    found = both_figures(draft, target, rows)[0]
    return {name: list(getattr(found, of)) for name, of in MEASURED.items()}


def both_figures(model: StreamedModel, target: StreamedModel, rows: Tensor) -> tuple[Figures, Figures]:
    """Return the figures of a model beside a target, and the target's own, on rows of tokens, shape (R, T)."""
    models = (target, model)
    sums, own_sums = FigureSums(len(rows)), FigureSums(len(rows))
    numbers = 2 * (model.hidden_size + target.hidden_size)
    progress = meter("comparing", rows.numel(), model.depth + target.depth)
    with torch.no_grad():
        for start, stop in groups(len(rows), row_bytes(rows.shape[1], numbers), target.states_bytes):
            batches = [each.start(rows[start:stop]) for each in models]
            for each, own in zip(models, batches, strict=True):
                each.run(own, progress=progress)
            with target.finish(batches[0]) as true_head, model.finish(batches[1]) as head:
                at = start
                for whole, guess in zip(*batches, strict=True):
                    sums.begin(at, guess.hidden)
                    own_sums.begin(at, None)
                    compare(head, whole, whole.hidden, [sums, own_sums], true_head=true_head)
                    at += len(whole.tokens)
    return sums.figures(), own_sums.figures()


def _arithmetic(acceptance: float, share: float) -> dict[str, Any]:
    """Return what the acceptance promises where a draft's token takes `share` of the target's time."""
    speed = draft_speed(acceptance, share)
    return {
        "time_share": share,
        "expected_speed": speed.times,
        "draft_tokens": speed.tokens,
    }


def _said(drafting: dict[str, Any]) -> list[str]:
    """Return the sentences for people."""
    share, times = drafting["time_share"], drafting["expected_speed"]
    best = f"{times:.2f} x with {drafting['draft_tokens']} tokens drafted" if times > 1 else "drafting is no faster"
    by_weights = (
        f"by its weights a token of the draft takes {share:.0%} of the target's time, and drafting pays where the "
        f"acceptance is above that; expected here: {best}"
    )
    said = [by_weights]
    if (found := drafting.get("measured")) is not None:
        said.append(
            f"sampled {found['tokens']:,} tokens with {found['draft_tokens']} drafted at once: "
            f"{found['tokens_a_round']:.2f} tokens a round, an acceptance of {found['acceptance']:.3f} "
            f"(by the distributions there {found['expected_acceptance']:.3f}), {found['speed']:.2f} x as fast; a token "
            f"of the draft takes {found['time_share']:.0%} of the time"
        )
    return said


# --- sampling -------------------------------------------------------------------------------------------------------

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def _fixed_length(new: int) -> dict[str, Any]:
    """Return the options of `generate` for so many tokens, whatever they are."""
    return {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}


def _sampled(context: EvalContext, rows: Tensor, options: EvaluationOptions) -> dict[str, Any]:
    """Return what exact speculative sampling does: transformers' own, one sequence at a time, at temperature 1."""
    assert options.max_new_tokens is not None
    drafted = options.draft_tokens or DRAFTED
    draft, target = (load_whole(source, context.device) for source in context.sources)
    prompts = rows[:PROMPTS, : min(PROMPT_TOKENS, rows.shape[1])].to(target.device)
    most = min(filter(None, map(positions_of, context.sources)), default=None)
    if most is not None and prompts.shape[1] + options.max_new_tokens > most:
        raise MeasureError(
            f"{prompts.shape[1]} tokens and {options.max_new_tokens} new ones are more than the {most} positions",
            hint=f"Use --max-new-tokens {most - prompts.shape[1]}.",
        )
    with stage("sampling"), torch.no_grad(), quiet_transformers():
        check_greedy(target, draft, prompts[:1], drafted, options.max_new_tokens)
        rounds, new, seconds, expected = 0, 0, 0.0, []
        for number, prompt in enumerate(prompts):
            began = time.perf_counter()
            written, calls = speculated(target, draft, prompt[None], drafted, options.max_new_tokens, seed=number)
            seconds += time.perf_counter() - began
            rounds, new = rounds + calls, new + written.shape[1] - len(prompt)
            expected.append(_expected(target, draft, written, len(prompt)))
        alone = _time_alone(target, prompts, options.max_new_tokens)
        steps = [_step_time(model, prompts[:1]) for model in (draft, target)]
    overlap, counted = map(sum, zip(*expected, strict=True))
    return {
        "tokens": new,
        "draft_tokens": drafted,
        "rounds": rounds,
        "tokens_a_round": new / rounds,
        "acceptance": acceptance_of(new / rounds, drafted),
        "expected_acceptance": overlap / counted,
        "speed": alone / (seconds / new),
        "time_share": steps[0] / steps[1],
    }


@contextmanager
def fixed(draft: Any, drafted: int) -> Iterator[None]:
    """Return a context in which a draft always proposes `drafted` tokens.

    transformers' defaults stop a draft that is unsure, and change the number over time, also across calls: what is
    measured then is their rule.
    """
    config = draft.generation_config
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    before = {name: getattr(config, name) for name in names}
    for name, value in zip(names, (drafted, "constant", 0.0), strict=True):
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def speculated(
    target: Any, draft: Any, prompt: Tensor, drafted: int, new: int, *, seed: int | None = None
) -> tuple[Tensor, int]:
    """Return what a target writes after a prompt, shape (1, P), with a draft, and how often the target ran.

    With a `seed` it samples at temperature 1; without one it is greedy. The prompt is run with the first round.
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = target.register_forward_pre_hook(count)
    options = _fixed_length(new)
    if seed is not None:
        torch.manual_seed(seed)
        options |= SAMPLED
    try:
        with fixed(draft, drafted):
            written: Tensor = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, **options
            )
    finally:
        hook.remove()
    return written, calls


def check_greedy(target: Any, draft: Any, prompt: Tensor, drafted: int, new: int) -> None:
    """Raises MeasureError where greedy writing with a draft differs from greedy writing without: it must not.

    Ties of rounding aside: the tokens may differ from a place on at which both have nearly one logit.
    """
    alone = target.generate(prompt, attention_mask=torch.ones_like(prompt), **_fixed_length(new))
    written, _ = speculated(target, draft, prompt, drafted, new)
    if torch.equal(alone, written):
        return
    place = int((alone != written).nonzero()[0, 1])
    logits = target(alone[:, :place]).logits[0, -1].detach().float()
    gap = float((logits[alone[0, place]] - logits[written[0, place]]).abs())
    if gap > 1e-3 * float(logits.abs().max()):  # far above rounding, in float32 and in bfloat16 below a real choice
        raise MeasureError(
            f"with the draft the target writes another text from token {place - prompt.shape[1]} on",
            hint="transformers cannot draft for this model.",
        )


def _expected(target: Any, draft: Any, written: Tensor, first: int) -> tuple[float, int]:
    """Return Σ min(p, q) over the tokens that were written after the first, and how many they are."""
    p, q = (model(written[:, :-1]).logits[0, first - 1 :].float().softmax(-1) for model in (target, draft))
    known = min(p.shape[-1], q.shape[-1])
    return float(torch.minimum(p[:, :known], q[:, :known]).sum()), len(p)


def _time_alone(target: Any, prompts: Tensor, new: int) -> float:
    """Return the seconds of a token that a target samples without a draft, the median over prompts."""
    seconds = []
    for number, prompt in enumerate(prompts[:3]):
        torch.manual_seed(number)
        began = time.perf_counter()
        mask = torch.ones_like(prompt[None])
        target.generate(prompt[None], attention_mask=mask, **_fixed_length(new), **SAMPLED)
        seconds.append((time.perf_counter() - began) / new)
    return median(seconds)


def _step_time(model: Any, prompt: Tensor) -> float:
    """Return the seconds of a step of one token after a cached prompt, the median of several."""
    cache = model(prompt, use_cache=True).past_key_values
    seconds: list[float] = []
    token = prompt[:, -1:]
    for _ in range(TIMED):
        began = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        if token.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds)
