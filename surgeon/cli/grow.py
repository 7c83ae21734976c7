"""`surgeon grow`."""

from typing import Annotated

import typer

from surgeon.cli import options

_SIZE = "a number or 2x"


@options.writes
def grow(
    model: options.Model,
    layers: Annotated[str | None, typer.Option(metavar="N", help="Layers of the result: a number, 2x or 150%.")] = None,
    depth_method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="identity (keeps the function), stack, interleave, solar or interpolate (which do not).",
        ),
    ] = "identity",
    at: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Put a new layer after each of these: 3,7,11. Default: evenly.")
    ] = None,
    donor: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Append this model's next layers instead (Inheritune).")
    ] = None,
    hidden_size: Annotated[str | None, typer.Option(metavar="N", help=f"Hidden size: {_SIZE}.")] = None,
    intermediate_size: Annotated[str | None, typer.Option(metavar="N", help=f"Size of the MLP: {_SIZE}.")] = None,
    attention_heads: Annotated[str | None, typer.Option(metavar="N", help=f"Attention heads: {_SIZE}.")] = None,
    key_value_heads: Annotated[str | None, typer.Option(metavar="N", help=f"Key-value heads: {_SIZE}.")] = None,
    head_dim: Annotated[str | None, typer.Option(metavar="N", help=f"Size of a head: {_SIZE}.")] = None,
    width_method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="auto (clone for multiples, else pad), clone, pad; or zero-pad, uneven, advanced (approximate).",
        ),
    ] = "auto",
    noise: Annotated[
        float, typer.Option(help="What sets copies apart, relative to the weights; the function is kept. 0: none.")
    ] = 0.5,
    experts: Annotated[
        int | None, typer.Option(metavar="N", help="Turn every MLP into N experts that start as copies of it.")
    ] = None,
    experts_per_token: Annotated[int, typer.Option(metavar="K", help="How many experts each token takes.")] = 2,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Load the result and compare its logits with the source's. Default: below 1 B parameters.",
        ),
    ] = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    *,
    writing: options.Writing,
) -> None:
    """Make a model deeper and wider, with its function kept."""
    import surgeon
    from surgeon.cli import write

    surgery = surgeon.grow(
        model,
        layers=layers,
        depth_method=depth_method,
        at=None if at is None else options.numbers(at, "--at"),
        donor=donor,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        attention_heads=attention_heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        width_method=width_method,
        noise=noise,
        experts=experts,
        experts_per_token=experts_per_token,
        seed=seed,
        revision=revision,
    )
    write.run(surgery, writing, verify=verify)
