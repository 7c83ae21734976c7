"""`surgeon prune`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import options

_FEWER = "Default: as many as there are."


@options.writes
def prune(
    model: options.Model,
    score: Annotated[
        str,
        typer.Option(
            metavar="SCORE",
            help="What decides: angular, block-influence, relative-magnitude, perplexity, taylor, magnitude, random, "
            "last, or uniform (weight selection).",
        ),
    ] = "angular",
    layers: Annotated[
        str | None, typer.Option(metavar="N", help="Layers of the result: 24, or 75% of the source's.")
    ] = None,
    target_parameters: Annotated[
        float | None, typer.Option(metavar="N", help="Remove layers until so many parameters are left: 6.7e9.")
    ] = None,
    target_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove layers until the weights take no more: 12GB.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(metavar="N", help=f"Hidden size. {_FEWER}")] = None,
    intermediate_size: Annotated[int | None, typer.Option(metavar="N", help=f"Neurons of each MLP. {_FEWER}")] = None,
    attention_heads: Annotated[int | None, typer.Option(metavar="N", help=f"Attention heads. {_FEWER}")] = None,
    key_value_heads: Annotated[
        int | None, typer.Option(metavar="N", help="Key-value heads; whole groups of heads go with them.")
    ] = None,
    experts: Annotated[int | None, typer.Option(metavar="N", help=f"Experts of each layer. {_FEWER}")] = None,
    like: Annotated[
        str | None, typer.Option(metavar="SMALL", help="Take all sizes from this model; goes with --score uniform.")
    ] = None,
    contiguous: Annotated[
        bool | None,
        typer.Option("--contiguous/--free", help="Remove one block, or any layers. Default: as the method has it."),
    ] = None,
    protect: Annotated[
        str | None,
        typer.Option(metavar="FIRST,LAST", help="How many first and last layers stay. Default: as the method has it."),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="With --score perplexity: score anew after every removal (SLEB).")
    ] = False,
    tokens: Annotated[
        str, typer.Option(metavar="last|all", help="With --score angular: the last token of a sample, or all.")
    ] = "last",
    data: options.Data = None,
    samples: options.Samples = 32,
    sequence_length: options.SequenceLength = 256,
    scores_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Cut by the scores in this scores.json; runs no model.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure perplexity on the text, before and after.")
    ] = True,
    curve: Annotated[
        bool, typer.Option("--curve", help="Measure perplexity for every number of layers up to half of them.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the scores, and the curve, to this .png, .svg or .pdf.")
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    revision: options.Revision = None,
    *,
    writing: options.Writing,
) -> None:
    """Remove the layers, neurons, heads and experts that matter least."""
    import surgeon
    from surgeon.cli import write
    from surgeon.cli.progress import TokenMeter
    from surgeon.cli.prune_report import PruneReport, check_plot

    if tokens not in ("last", "all"):
        raise typer.BadParameter(f"{tokens!r} is neither last nor all", param_hint="--tokens")
    guard = None if protect is None else options.numbers(protect, "--protect")
    if guard is not None and len(guard) != 2:
        raise typer.BadParameter(f"{protect!r} is not two numbers such as 1,1", param_hint="--protect")
    if plot is not None:
        check_plot(plot)
    meter = TokenMeter(quiet=writing.quiet)
    plan = partial(
        surgeon.prune,
        surgeon.open_model(model, revision=revision),
        score=score,
        layers=layers,
        target_parameters=target_parameters,
        target_memory=target_memory,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        attention_heads=attention_heads,
        key_value_heads=key_value_heads,
        experts=experts,
        like=like,
        contiguous=contiguous,
        protect=None if guard is None else (guard[0], guard[1]),
        greedy=greedy,
        all_tokens=tokens == "all",
        data=data or (),
        samples=samples,
        sequence_length=sequence_length,
        scores_from=scores_from,
        evaluate=evaluate,
        device=device,
        seed=seed,
        meter=meter,
    )
    surgery = plan(measure=False)
    if not writing.dry_run:
        write.check(surgery, writing)  # before what may take an hour
        surgery = plan()
    report = PruneReport(surgery, evaluate=evaluate, curve=curve, plot=plot, meter=meter)
    if not writing.dry_run:
        report.check()
    write.run(surgery, writing, report=report)
