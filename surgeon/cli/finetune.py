"""`surgeon finetune`: the options of the verb, and where the run and its result are written."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Debug, Device, Json, Model, Revision, spread
from surgeon.options import keywords_of
from surgeon.verbs import finetune as verb

GROUP = "training"
EXAMPLE = "surgeon finetune gpt2-27 --data text.txt --teacher gpt2-large --max-steps 300 -o healed"

STOPPED = 143  # the status of a process that SIGTERM ended, as shells report it


@spread
def finetune(
    model: Model,
    *,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="DATA",
            help="Text, or records with text, prompt and completion, instruction and output, or messages: .txt, "
            ".jsonl, .parquet, a directory of them, or a Hub dataset. Repeatable.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The result. Default: MODEL-finetune.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoints, metrics, plot. Default: OUTPUT.run.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the run directory, or begin one there.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output once the new one is complete.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, tokens, memory and time, and train nothing.")
    ] = False,
    num_processes: Annotated[
        int, typer.Option(metavar="N", help="Number of processes to start on this machine (one per GPU).")
    ] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the result: keep (the source's), float32, bfloat16 or float16.")
    ] = "keep",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file: 5GB, 500MB.")] = "5GB",
    options: verb.FinetuneOptions,
    device: Device = "auto",
    revision: Revision = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished output to this Hub repository.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the Hub repository private if it is created.")
    ] = False,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: Debug = False,
) -> None:
    """Train a model on data: heal a cut (until its loss recovers), train new layers, distil from a teacher."""
    from surgeon.cli.terminal import emit, emit_json, log, results_alone
    from surgeon.cli.training_line import TrainingLine
    from surgeon.train.launch import is_first, is_launched, relaunch, second_to_the_first

    if num_processes < 1:
        raise typer.BadParameter("at least 1", param_hint="--num-processes")
    if dry_run:
        with results_alone():
            estimate = verb.estimate_finetune(
                model,
                data=data,
                device=device,
                revision=revision,
                num_processes=num_processes if num_processes > 1 else None,
                **keywords_of(options),
            )
        emit_json(estimate.to_dict()) if json else emit(estimate.to_text())
        return
    if num_processes > 1 and not is_launched():
        verb.checked(options)  # so that a mistake is one error, and not one per process
        sys.exit(relaunch(sys.argv[1:], processes=num_processes))
    with second_to_the_first(), results_alone():
        trained = verb.finetune(
            model,
            data=data,
            output=output,
            run_dir=run_dir,
            resume=resume,
            overwrite=overwrite,
            dtype=dtype,
            max_shard_size=max_shard_size,
            device=device,
            revision=revision,
            watcher=TrainingLine(quiet=quiet),
            command=shlex.join(["surgeon", *sys.argv[1:]]),
            **keywords_of(options),
        )
    if not is_first():
        return
    if trained.output is None:
        log(f"stopped at step {trained.steps:,}; the same command with --resume continues")
        sys.exit(STOPPED)
    entries = trained.to_dict()
    if push_to_hub is not None:
        from surgeon.checkpoint.hub import push

        entries["url"] = push(trained.output, push_to_hub, private=private)
        log(f"uploaded to {entries['url']}")
    if json:
        emit_json(entries)
        return
    emit(trained.to_text())
    if (following := _next(model, str(trained.output), options)) is not None:
        emit(f"\nnext: {following}")


def _next(model: str, output: str, options: verb.FinetuneOptions) -> str | None:
    """Return the command that a user may want next, None for adapters that only PEFT loads."""
    if options.gist_reader == "frozen":
        return f"surgeon compress {model} --adapter {output} --prompt TEXT"
    if options.keep_adapter:
        return None
    return f"surgeon evaluate {output} " + ("--gist --data RECORDS" if options.gist else "--data TEXT")
