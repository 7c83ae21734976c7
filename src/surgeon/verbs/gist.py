"""The verb `gist`: add gist tokens to a model."""

import os
from dataclasses import dataclass, replace

from surgeon.checkpoint.tokenizer_files import add_to_tokenizer, suppress
from surgeon.errors import PlanError
from surgeon.gist.architecture import refusal
from surgeon.gist.tokens import KEY as GIST
from surgeon.gist.tokens import GistTokens, names, read_gist
from surgeon.options import Checked, OptionError, Verb, option, revision_option, takes
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.vocabulary import add_tokens

VERB = Verb(plans="add_gist", then="finetune {output} --gist --data instructions.jsonl")


@dataclass(frozen=True, kw_only=True)
class GistOptions(Checked):
    """The options of `gist`."""

    tokens: int = option("Number of tokens that make up a gist.", 1, metavar="K", group="gists")
    distinct: bool = option("Add K different tokens, instead of one that a gist repeats K times.", False, group="gists")
    revision: str | None = revision_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise OptionError("tokens", f"a gist cannot have {self.tokens} tokens", hint="--tokens is 1 or more.")


@takes(GistOptions)
def add_gist(model: "str | os.PathLike[str] | Surgery", options: GistOptions) -> Surgery:
    """Return the surgery that gives `model` gist tokens. Nothing is trained.

    One token is added, which a gist repeats; with `distinct` one for each position. Its rows are the means of all rows.
    Tokenizer, config and generation config learn of it. (`surgeon.gist` is the package with the rest about gists.)

    Raises PlanError when the architecture lets a prompt past a mask, when the model has gist tokens already, or when
    it has no tokenizer.json.

        surgeon.add_gist("SmolLM2-135M", tokens=4).save("SmolLM2-with-gist")
    """
    begun = open_model(model, revision=options.revision)
    anatomy, config = begun.anatomy, begun.spec.config
    tokens, distinct = options.tokens, options.distinct
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
