"""`surgeon distill`."""

import sys
import time

from surgeon.cli.command import Debug, Json, Model, Quiet, data_words, emit_next, spread
from surgeon.cli.terminal import emit, emit_json, log, results_alone
from surgeon.options import keywords_of
from surgeon.rewriting.loop import Progress
from surgeon.rewriting.options import DistillOptions
from surgeon.verbs import distill as verb

GROUP = "training"
EXAMPLE = "surgeon distill SmolLM2-135M-Instruct --data gsm8k.jsonl -o gsm8k-distill.jsonl"
SECONDS = {True: 0.5, False: 60.0}  # between two lines, on a terminal and elsewhere


@spread
def distill(
    model: Model,
    options: DistillOptions,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let a model rewrite a dataset's answers in its own words, which train what is cut from it (self-distillation)."""
    line = ProgressLine(quiet=quiet)
    try:
        with results_alone():  # vLLM logs to standard output
            done = verb.distill(model, **keywords_of(options) | {"watch": line})
    except (KeyboardInterrupt, SystemExit):
        line.clear()
        if line.is_begun:
            log("stopped; the same command goes on with the rows that are left")
        raise
    line.clear()
    if json:
        emit_json(done.to_dict())
        return
    emit(done.to_text())
    emit_next("finetune", "CUT-MODEL", *data_words([str(done.output)], options.columns))


class ProgressLine:
    """One line with rows, acceptance, tokens a second and the time left; elsewhere than on a terminal one a minute."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._shown = self._began = time.monotonic()
        self._first: int | None = None
        self.is_begun = False

    def __call__(self, progress: Progress) -> None:
        self.is_begun = True
        now = time.monotonic()
        if self._quiet or now - self._shown < SECONDS[self._live]:
            return
        self._shown = now
        rate = progress.tokens_per_second or 0.0
        words = f"{progress.done:,} of {progress.rows:,} rows, {progress.accepted / max(progress.done, 1):.0%} accepted"
        words += f", {rate:,.0f} tokens/s{self._left(progress, now)}"
        if self._live:
            sys.stderr.write(f"\r\x1b[K{words}")
            sys.stderr.flush()
        else:
            log(words)

    def _left(self, progress: Progress, now: float) -> str:
        """Return the time that the rest takes, from the rows since the first time that this was asked."""
        if self._first is None:
            self._first, self._began = progress.done, now
            return ""
        done = progress.done - self._first
        minutes = (now - self._began) / done * (progress.rows - progress.done) / 60 if done else 0
        return f", {minutes:,.0f} min left" if minutes >= 1 else ""

    def clear(self) -> None:
        """Take the line away."""
        if self._live and not self._quiet and self.is_begun:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
