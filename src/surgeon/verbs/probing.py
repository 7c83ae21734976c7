"""The probe of `advise`: two short runs of a copy of the model, on fresh and on repeated text, and what they lead to.

Both runs have the same steps, rate and rows held out. The first sees fresh text, and its held-out losses are fitted by
L∞ + c D^-β, from WARM times the warm-up on. The second sees the first quarter of that text, PASSES times, so what its
held-out loss ends above the first one's is what repetition costs. That replaces the constants of the law of over-fit
which depend on a model and its training; how the cost grows with passes and with N / U stays the law's.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import Source
from surgeon.cost.advice import Facts, Row
from surgeon.cost.laws import OVERFIT
from surgeon.data.usage import in_pieces, texts_of
from surgeon.errors import DataError
from surgeon.evals.evaluation import EvalContext, open_evaluated
from surgeon.train.run_dir import Request
from surgeon.verbs.finetune import TrainingOptions, task_of

if TYPE_CHECKING:
    from surgeon.train.trainer import EvalLosses

BATCH = 8  # rows of a step
POINTS, PASSES = 8, 4  # evaluations of a run, and passes of the second one over its text
WARM = 5  # times the warm-up: a fit begins after it
HELD_OUT = 8  # every so many pieces of text one is held out
ROWS = 64  # that are held out, at most
CLOSE = 0.05  # nats above the original's loss at which a cut is healed
LONGEST = 8.0  # times the tokens of the probe, up to which a fit is believed


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The runs of a probe: `steps` of BATCH rows of `length` tokens of `data`. `original` is what a cut model was."""

    data: Sequence[str]
    columns: str | None
    length: int
    steps: int
    lr: str
    lora: int | None
    device: str
    original: str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A curve L = floor + c D^-β, D in tokens."""

    floor: float
    c: float
    beta: float

    def tokens_to(self, loss: float) -> float:
        """Return the tokens after which the curve reaches a loss; infinity where it never does."""
        return (self.c / (loss - self.floor)) ** (1 / self.beta) if loss > self.floor and self.c > 0 else math.inf


def fit(tokens: Sequence[float], losses: Sequence[float]) -> Fit:
    """Return the curve that fits losses after so many tokens best, by least squares; β from 0.05 to 2."""
    best: tuple[float, Fit] | None = None
    for step in range(161):
        beta = 0.05 * 40 ** (step / 160)
        x = [count**-beta for count in tokens]
        mean, level = math.fsum(x) / len(x), math.fsum(losses) / len(losses)
        spread = math.fsum((each - mean) ** 2 for each in x)
        c = math.fsum((each - mean) * loss for each, loss in zip(x, losses, strict=True)) / spread
        floor = level - c * mean
        error = math.fsum((floor + c * each - loss) ** 2 for each, loss in zip(x, losses, strict=True))
        if best is None or error < best[0]:
            best = error, Fit(floor, c, beta)
    assert best is not None, "there are values of β"
    return best[1]


def leaving_one_out(tokens: Sequence[float], losses: Sequence[float]) -> list[Fit]:
    """Return the fits without each of the points, whose spread says what the fit is worth."""
    every = range(len(tokens))
    return [fit([tokens[i] for i in every if i != out], [losses[i] for i in every if i != out]) for out in every]


def probed(source: Source, probe: Probe, facts: Facts, context: EvalContext) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of the probe, and its losses as entries for JSON with `notes`.

    Raises DataError for a text that is too short for PASSES passes over a quarter of it.
    """
    length, steps = probe.length, probe.steps
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        files = _written(probe, place, context, tokens=steps * BATCH * length)
        runs = {
            name: _run(source, files[name], files["held-out"], place / name, probe) for name in ("fresh", "repeated")
        }
        short = _shortfall(source, files["held-out"], probe, context)
    tokens = [run.step * BATCH * length for run in runs["fresh"]]
    warm = _warmup(steps) * WARM * BATCH * length
    used = [place for place, count in enumerate(tokens) if count >= warm]
    curve = [_validation(run) for run in runs["fresh"]]
    points = [float(tokens[i]) for i in used], [curve[i] for i in used]
    fits = [fit(*points), *leaving_one_out(*points)]
    rows = [_overfit(fits[0], runs, facts, tokens[-1])]
    if short is not None:
        rows.append(_healed(fits, curve[0] - short + CLOSE, tokens[used[0]], tokens[-1], facts))
    said = {name: [[run.step, run.validation, run.probe] for run in each] for name, each in runs.items()}
    return rows, {"steps": steps, "tokens": tokens[-1], **said, "notes": []}


def _overfit(curve: Fit, runs: Mapping[str, Sequence["EvalLosses"]], facts: Facts, tokens: int) -> Row:
    """Return the epoch after which held-out text gets worse, by the penalty and the gap that were measured."""
    fresh, repeated = runs["fresh"], runs["repeated"]
    costs = _validation(repeated[-1]) - _validation(fresh[-1])
    gap = _gap(repeated[-1]) - _gap(repeated[0]) - (_gap(fresh[-1]) - _gap(fresh[0]))  # what is not of the text
    again, ratio = PASSES - 1, facts.body / (tokens / PASSES)
    law = replace(
        OVERFIT,
        b=max(0.0, curve.c),
        beta=curve.beta,
        penalty=max(0.0, costs) / again**OVERFIT.delta / ratio**OVERFIT.kappa,
        gap_factor=max(0.0, gap) / again**OVERFIT.gamma / ratio**OVERFIT.gap_kappa,
    )
    turning = law.turning(facts.body, facts.unique)
    shown = "no epoch of the first 100,000" if math.isinf(turning) else f"epoch {turning:.2g}"
    return Row(
        quantity="probe: over-fit",
        value=None if math.isinf(turning) else turning,
        shown=f"after {shown}; {PASSES} passes cost {costs:+.3f}, gap {gap:+.3f} nats",
        law="penalty and gap measured on repeated text; their growth with passes and N / U as under over-fit",
        range=f"{PASSES} passes over {tokens // PASSES:,} tokens; a text up to {LONGEST:g} times that",
        inside=facts.unique <= LONGEST * tokens / PASSES and facts.epochs <= LONGEST * PASSES,
        says=law.verdict(facts.body, facts.unique, facts.epochs),
    )


def _healed(fits: Sequence[Fit], loss: float, first: int, tokens: int, facts: Facts) -> Row:
    """Return the tokens after which the loss is within CLOSE of the original's."""
    found = sorted(each.tokens_to(loss) for each in fits)
    needed = fits[0].tokens_to(loss)
    low, high = (f"{each:,.0f}" if math.isfinite(each) else "never" for each in (found[0], found[-1]))
    middle = f"{needed:,.0f}" if math.isfinite(needed) else "not by this curve"
    middle = f"fewer than {first:,}" if needed < first else middle
    return Row(
        quantity="probe: to heal",
        value=needed if math.isfinite(needed) else None,
        shown=f"{middle} ({low} to {high}) tokens to {loss:.3f} nats; here {facts.unique:,}",
        law=f"L∞ + c D^-β fitted to fresh text (β {fits[0].beta:.2g}), to the original's loss + {CLOSE}; "
        "the interval leaves one point out",
        range=f"up to {LONGEST:g} times the {tokens:,} tokens of the probe",
        inside=math.isfinite(found[-1]) and needed <= LONGEST * tokens,
    )


def _validation(run: "EvalLosses") -> float:
    assert run.validation is not None, "rows are held out"
    return run.validation


def _gap(run: "EvalLosses") -> float:
    assert run.probe is not None, "rows are trained"
    return _validation(run) - run.probe


def _warmup(steps: int) -> int:
    return max(1, steps // (WARM * POINTS))


# --- the runs -----------------------------------------------------------------------------------------------------


def _written(probe: Probe, place: Path, context: EvalContext, *, tokens: int) -> dict[str, Path]:
    """Write the fresh text, its first quarter and held-out text of the same kind, and return their files."""
    tokenizer = context.tokenizers[0]
    counts: dict[str, int] = {"fresh": 0, "repeated": 0, "held-out": 0}
    wanted = {"fresh": tokens, "repeated": tokens // PASSES, "held-out": ROWS * probe.length}
    files = {name: place / f"{name}.jsonl" for name in counts}
    number = 0
    with files["fresh"].open("w") as fresh, files["repeated"].open("w") as again, files["held-out"].open("w") as held:
        every = {"fresh": fresh, "repeated": again, "held-out": held}
        for text in texts_of(probe.data, tokenizer, most=1 << 40, columns=probe.columns):
            for piece in in_pieces(text):
                number += 1
                names = ("held-out",) if number % HELD_OUT == 0 else ("repeated", "fresh")
                size = len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
                for name in names:
                    if counts[name] < wanted[name]:
                        every[name].write(json.dumps({"text": piece}) + "\n")
                        counts[name] += size
            if all(counts[name] >= wanted[name] for name in counts):
                return files
    if counts["fresh"] < tokens // 2 or not counts["held-out"]:
        raise DataError(
            f"the probe reads {tokens:,} tokens and there are {counts['fresh']:,}, apart from those held out",
            hint="Lower --probe-steps or --sequence-length, or give more data.",
        )
    return files


def _run(source: Source, data: Path, held_out: Path, place: Path, probe: Probe) -> "Sequence[EvalLosses]":
    """Train a copy of the model, and return the evaluations after the first step; what was trained is dropped."""
    from surgeon.train.runner import Runner

    steps = probe.steps
    training = TrainingOptions(
        max_steps=steps,
        batch_size=BATCH,
        sequence_length=probe.length,
        lr=probe.lr,
        warmup=_warmup(steps),
        schedule="constant",  # so that a loss is that of a run that ends there
        eval_data=(str(held_out),),
        eval_every=max(1, steps // POINTS),
        eval_rows=ROWS,
        save_every=0,
        lora=probe.lora,
    )
    task = task_of(source, training)
    request = Request(model=source.provenance(), data=(str(data),), settings=task.record(), others={})
    runner = Runner(source, (str(data),), task, run_dir=place, device=probe.device)
    with runner.held(request, resume=False):
        runner.fit()
    return runner.reporter.evaluations


def _shortfall(source: Source, held_out: Path, probe: Probe, context: EvalContext) -> float | None:
    """Return by how much the model's loss is above that of its original, on the held-out rows; None without one."""
    if probe.original is None:
        return None
    from surgeon.data.rows import read_rows
    from surgeon.evals.compare import paired
    from surgeon.evals.perplexity import streamed
    from surgeon.measure.separation import final_states

    sources = [source, open_evaluated(probe.original, None)]
    length = probe.length
    tokens = read_rows([str(held_out)], context.tokenizers[0], samples=ROWS, sequence_length=length).tokens
    sums, others = (final_states(streamed(each, context.device), tokens)[1] for each in sources)
    return paired(sums, others, [tokens.shape[1] - 1] * len(tokens)).value
