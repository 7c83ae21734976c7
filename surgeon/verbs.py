"""The verbs that plan a surgery: each opens its model, plans with the transform of its name, and reads no weights."""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.joined import DONOR, JoinedSource
from surgeon.checkpoint.open import open_source
from surgeon.checkpoint.source import spec_of
from surgeon.errors import PlanError
from surgeon.gist import KEY as GIST
from surgeon.gist import GistTokens, names, read_gist
from surgeon.gist.architecture import refusal
from surgeon.gist.tokenizer import add_to_tokenizer, suppress
from surgeon.plan.expressions import Read
from surgeon.plan.plan import identity
from surgeon.surgery import Surgery
from surgeon.transforms.deepen import donate
from surgeon.transforms.grow import grow as plan_grow
from surgeon.transforms.grow import grown_depth
from surgeon.transforms.tokens import add_tokens
from surgeon.transforms.truncate import truncate as plan_truncate


def open_model(model: "str | os.PathLike[str] | Surgery", *, revision: str | None = None) -> Surgery:
    """Return the model as a surgery that changes nothing yet; one that is already a surgery is continued."""
    if isinstance(model, Surgery):
        return model
    source = open_source(model, revision=revision)
    anatomy = read_anatomy(spec_of(source))
    return Surgery(source, identity(anatomy.spec, depth=anatomy.depth))


def truncate(
    model: "str | os.PathLike[str] | Surgery",
    *,
    layers: int | str,
    inherit: Collection[str] | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Surgery:
    """Return the surgery that keeps the first `layers` layers of `model` ("50%" counts from its depth).

    `model` is a checkpoint directory, a Hub id, or a surgery to continue. With `inherit`, only these parts
    ("attention", "mlp", "norm", "embedding") keep their weights; the rest is drawn anew from `seed`.

    Raises PlanError when the model has fewer layers or cannot be cut.

        surgeon.truncate("gpt2-large", layers=6).save("gpt2-large-6")
    """
    begun = open_model(model, revision=revision)
    return replace(begun, plan=begun.plan.then(plan_truncate(begun.anatomy, layers, inherit=inherit, seed=seed)))


def grow(
    model: "str | os.PathLike[str] | Surgery",
    *,
    layers: int | str | None = None,
    depth_method: str = "identity",
    at: Sequence[int] | None = None,
    donor: str | os.PathLike[str] | None = None,
    hidden_size: int | str | None = None,
    intermediate_size: int | str | None = None,
    attention_heads: int | str | None = None,
    key_value_heads: int | str | None = None,
    head_dim: int | str | None = None,
    width_method: str = "auto",
    noise: float = 0.5,
    experts: int | None = None,
    experts_per_token: int = 2,
    seed: int = 0,
    revision: str | None = None,
) -> Surgery:
    """Return the surgery that makes `model` deeper and wider, with its function kept unless a method says otherwise.

    A size is a number or "2x". With a `donor`, its next layers are appended instead of copies (Inheritune's growth).
    With `experts`, every MLP becomes that many equal experts, and a token takes `experts_per_token` of them.

    Raises PlanError when the family's code cannot express the result.

        surgeon.grow("gpt2", hidden_size="2x", layers=16).save("gpt2-grown")
    """
    begun = open_model(model, revision=revision)
    options = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "attention_heads": attention_heads,
        "key_value_heads": key_value_heads,
        "head_dim": head_dim,
    }
    if donor is None:
        plan = plan_grow(
            begun.anatomy,
            layers=layers,
            depth_method=depth_method,
            at=at,
            width_method=width_method,
            noise=noise,
            experts=experts,
            experts_per_token=experts_per_token,
            seed=seed,
            **options,
        )
        return replace(begun, plan=begun.plan.then(plan))
    others = (experts, at, *options.values())
    if layers is None or depth_method != "identity" or any(option is not None for option in others):
        raise PlanError("a donor gives layers, nothing else", hint="Give --layers with --donor; grow more afterwards.")
    if isinstance(begun.source, JoinedSource):
        raise PlanError("this surgery has a donor already", hint="Save it, and grow what was saved.")
    given = open_source(donor)
    anatomy = begun.anatomy
    plan = donate(anatomy, read_anatomy(spec_of(given)), grown_depth(layers, anatomy.depth), DONOR)
    offered = {DONOR + name: Read(DONOR + name) for name in given.tensors}
    passed = replace(begun.plan, tensors={**begun.plan.tensors, **offered})
    step = {"grow": {"layers": layers, "donor": os.fspath(donor)}}
    return replace(begun, source=JoinedSource(begun.source, given), plan=passed.then(replace(plan, steps=(step,))))


def add_gist(
    model: "str | os.PathLike[str] | Surgery",
    *,
    tokens: int = 1,
    distinct: bool = False,
    revision: str | None = None,
) -> Surgery:
    """Return the surgery that gives `model` gist tokens, for gists of `tokens` tokens each. Nothing is trained.

    One token is added, which a gist repeats; with `distinct` one for each place. Its rows are the means of all rows.
    Tokenizer, config and generation config learn of it. (`surgeon.gist` is the package with the rest about gists.)

    Raises PlanError when the architecture lets a prompt past a mask, when the model has gist tokens already, or when
    it has no tokenizer.json.

        surgeon.add_gist("HuggingFaceTB/SmolLM2-135M", tokens=4).save("SmolLM2-gist")
    """
    begun = open_model(model, revision=revision)
    anatomy, config = begun.anatomy, begun.spec.config
    if tokens < 1:
        raise PlanError(f"a gist cannot have {tokens} tokens", hint="--tokens is 1 or more.")
    if (there := read_gist(config)) is not None:
        raise PlanError(
            f"the model has gist tokens already: {', '.join(there.tokens)}",
            hint="One gist token serves gists of any length; for others, begin with the model without.",
        )
    if (reason := refusal(config, anatomy.depth)) is not None:
        raise PlanError(reason, hint="surgeon gist --check MODEL says which models can be gisted.")
    ids, edited = add_to_tokenizer(begun.companion, names(tokens, distinct=distinct))
    gist = GistTokens(tuple(ids), tokens, distinct)
    plan = add_tokens(anatomy, ids)
    step = {"gist": {"tokens": tokens, "distinct": distinct, "token_ids": list(ids)}}
    plan = replace(plan, config={**plan.config, GIST: gist.to_config()}, steps=(step,))
    attachments = {**begun.attachments, **edited, **suppress(begun.companion, ids, config)}
    return replace(begun, plan=begun.plan.then(plan), attachments=attachments)
