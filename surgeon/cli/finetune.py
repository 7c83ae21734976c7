"""`surgeon finetune`: its options are the fields of `surgeon.train.settings.Settings`, and what writes a checkpoint."""

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from surgeon.cli import options
from surgeon.train.settings import Settings

GROUP = "training"
EXAMPLE = "surgeon finetune gpt2-27 --data text.txt --teacher gpt2-large --max-steps 300 -o healed"

STOPPED = 143  # as the shell says of a process that SIGTERM ended


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command`, which takes its `settings` as a dictionary, as a command that takes them one by one."""
    hints = get_type_hints(Settings)
    own = list(inspect.signature(command).parameters.values())
    made = []
    for item in fields(Settings):
        many = hints[item.name] == tuple[str, ...]
        flag = f"--{item.name.replace('_', '-')}"
        option = typer.Option(flag, metavar=item.metadata["metavar"], help=item.metadata["help"])
        kind = list[str] | None if many else hints[item.name]
        default = None if many else item.default
        assert default is not MISSING, f"{item.name}: a setting without a default is an argument"
        parameter = inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
        made.append(parameter)

    def flat(**given: Any) -> None:
        settings = {item.name: given.pop(item.name) for item in fields(Settings)}
        many = {name: tuple(settings[name] or ()) for name in settings if hints[name] == tuple[str, ...]}
        command(**given, settings=settings | many)

    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    at = next(index for index, item in enumerate(own) if item.name == "settings")
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in (*own[:at], *made, *own[at + 1 :])]
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    flat.__annotations__ = {item.name: item.annotation for item in parameters}
    return flat


@_with_settings
def finetune(
    model: options.Model,
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
        int, typer.Option(metavar="N", help="Start so many processes on this machine, one for each device.")
    ] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the result: keep (the source's), float32, bfloat16 or float16.")
    ] = "keep",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file: 5GB, 500MB.")] = "5GB",
    settings: dict[str, Any],
    device: options.Device = "auto",
    revision: options.Revision = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished output to this Hub repository.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the Hub repository private if it is created.")
    ] = False,
    json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: options.Debug = False,
) -> None:
    """Train a model on data: heal a cut, train new layers, distil from a teacher."""
    import surgeon
    from surgeon.cli.terminal import emit, emit_json, log, results_alone
    from surgeon.cli.training_line import TrainingLine
    from surgeon.train.launch import is_first, is_launched, relaunch, second_to_the_first

    if num_processes < 1:
        raise typer.BadParameter("at least 1", param_hint="--num-processes")
    if dry_run:
        many = num_processes if num_processes > 1 else None
        with results_alone():
            found = surgeon.estimate_finetune(
                model, data=data, device=device, revision=revision, num_processes=many, **settings
            )
        emit_json(found.to_dict()) if json else emit(found.to_text())
        return
    if num_processes > 1 and not is_launched():
        Settings(**settings)  # said once, and at once
        sys.exit(relaunch(sys.argv[1:], processes=num_processes))
    with second_to_the_first(), results_alone():
        trained = surgeon.finetune(
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
            **settings,
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
    if (following := _next(model, str(trained.output), settings)) is not None:
        emit(f"\nnext: {following}")


def _next(model: str, output: str, settings: Mapping[str, Any]) -> str | None:
    """Return the command that a user may want next; adapters that are not merged are for PEFT to load."""
    if settings.get("gist_reader") == "frozen":
        return f"surgeon compress {model} --adapter {output} --prompt TEXT"
    if settings.get("keep_adapter"):
        return None
    return f"surgeon evaluate {output} " + ("--gist --data RECORDS" if settings.get("gist") else "--data TEXT")
