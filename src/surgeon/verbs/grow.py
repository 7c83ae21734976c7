"""The verb `grow`: make a model deeper, wider, or give it experts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.derived import DONOR, JoinedSource, alone
from surgeon.checkpoint.source import spec_of
from surgeon.errors import PlanError
from surgeon.growth.settings import LearnOptions
from surgeon.options import (
    OptionError,
    Verb,
    check_counts,
    layer_numbers,
    option,
    reads_of,
    revision_option,
    seed_option,
    takes,
)
from surgeon.plan.expressions import Read
from surgeon.surgery import Surgery, open_model, open_source
from surgeon.transforms.deepen import DEPTH_METHODS, donate
from surgeon.transforms.grow import check_size, grown_depth, growth
from surgeon.transforms.widths import WIDTH_METHODS

VERB = Verb(keeps_function=True, counts_layers=True, plans="grow", then="finetune {output} {data}")
_SIZE = "a number or 2x. Default: unchanged"


@dataclass(frozen=True, kw_only=True)
class GrowOptions(LearnOptions):
    """The options of `grow`."""

    layers: int | str | None = option(
        "Layers of the result: a number, 2x, 150%, or +2: two more than there are. Default: unchanged.",
        None,
        metavar="N",
        group="depth",
    )
    depth_method: str = option(
        "New layers: identity (keeps the function), stack, interleave, solar or interpolate (these do not).",
        "identity",
        metavar="METHOD",
        choices=DEPTH_METHODS,
        group="depth",
    )
    at: Sequence[int] | None = option(
        "Put a new layer after each of these source layers: 3,7,11-13. Default: spread evenly.",
        None,
        metavar="LAYERS",
        parse=layer_numbers,
        group="depth",
    )
    donor: str | os.PathLike[str] | None = option(
        "Append this model's next layers instead of copies (Inheritune).",
        None,
        metavar="MODEL",
        reads=True,
        group="depth",
    )
    hidden_size: int | str | None = option(f"Hidden size: {_SIZE}.", None, metavar="N", group="width")
    intermediate_size: int | str | None = option(f"Size of the MLP: {_SIZE}.", None, metavar="N", group="width")
    expert_intermediate_size: int | str | None = option(
        f"Size of each expert's MLP: {_SIZE}.", None, metavar="N", group="width"
    )
    attention_heads: int | str | None = option(
        "Attention heads: a number or 2x. Default: unchanged, or as the hidden size asks.",
        None,
        metavar="N",
        group="width",
    )
    key_value_heads: int | str | None = option(
        "Key-value heads: a number or 2x. Default: as many more as there are more heads.",
        None,
        metavar="N",
        group="width",
    )
    head_dim: int | str | None = option(f"Size of a head: {_SIZE}.", None, metavar="N", group="width")
    width_method: str = option(
        "New width: auto (clone for multiples, else pad), clone, pad; or zero-pad, uneven, advanced (approximate).",
        "auto",
        metavar="METHOD",
        choices=WIDTH_METHODS,
        group="width",
    )
    noise: float = option(
        "Noise that makes copies differ, relative to the weights, from 0 to 1; the function is kept. 0: none.",
        0.5,
        metavar="F",
        group="width",
    )
    experts: int | None = option(
        "Turn every MLP into N experts that start as copies of it.", None, metavar="N", group="experts"
    )
    experts_per_token: int = option("Experts that each token uses.", 2, metavar="K", group="experts")
    seed: int = seed_option()
    revision: str | None = revision_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            grown_depth(self.layers, 1)
        for name, size in self.widths.items():
            if size is not None:
                check_size(size, name)
        check_counts(self, "experts", least=2)
        check_counts(self, "experts_per_token")
        if self.learn is not None or self.data or self.eval_data or self.run_dir:
            self.check_learning({"donor": self.donor, "experts": self.experts})

    @property
    def widths(self) -> dict[str, int | str | None]:
        """The sizes that were asked for, by their option."""
        sizes = ("hidden_size", "intermediate_size", "expert_intermediate_size")
        heads = ("attention_heads", "key_value_heads", "head_dim")
        return {name: getattr(self, name) for name in (*sizes, *heads)}


@takes(GrowOptions)
def grow(model: "str | os.PathLike[str] | Surgery", options: GrowOptions) -> Surgery:
    """Return the surgery that makes `model` deeper and wider, with its function kept unless a method says otherwise.

    With a `donor`, its next layers are appended instead of copies (Inheritune's growth). With `experts`, every MLP
    becomes that many equal experts. With `learn`, the maps of the growth are trained for that many steps on `data`, and
    the better of learned and exact on held-out text is returned.

    Raises PlanError when the family's code cannot express the result.

        surgeon.grow("gpt2", hidden_size="2x", layers=16).save("gpt2-grown")
    """
    begun = open_model(model, revision=options.revision, reads=reads_of(options))
    if options.donor is not None:
        return _with_donor(begun, options, options.donor)
    grown = growth(
        begun.anatomy,
        layers=options.layers,
        depth_method=options.depth_method,
        at=options.at,
        width_method=options.width_method,
        noise=options.noise,
        experts=options.experts,
        experts_per_token=options.experts_per_token,
        seed=options.seed,
        **options.widths,
    )
    if options.learn is None:
        return replace(begun, plan=begun.plan.then(grown.plan))
    from surgeon.verbs.learning import learn

    return learn(begun, grown, options, seed=options.seed)


def _with_donor(begun: Surgery, options: GrowOptions, donor: str | os.PathLike[str]) -> Surgery:
    """Return the surgery that appends the next layers of another model."""
    layers, others = options.layers, (options.experts, options.at, *options.widths.values())
    if layers is None or options.depth_method != "identity" or any(other is not None for other in others):
        raise OptionError(
            "donor", "a donor gives layers, nothing else", hint="Give --layers with --donor; grow more afterwards."
        )
    if isinstance(alone(begun.source, DONOR), JoinedSource):
        raise PlanError("this surgery has a donor already", hint="Save it, and grow what was saved.")
    donor_source = open_source(donor)
    anatomy = begun.anatomy
    joined = JoinedSource(begun.source, donor_source, DONOR)
    plan = donate(anatomy, read_anatomy(spec_of(donor_source)), grown_depth(layers, anatomy.depth), joined.prefix)
    offered = {name: Read(name) for name in joined.tensors if name.startswith(joined.prefix)}
    passed = replace(begun.plan, tensors={**begun.plan.tensors, **offered})
    step = {"grow": {"layers": layers, "donor": os.fspath(donor)}}
    return replace(begun, source=joined, plan=passed.then(replace(plan, steps=(step,))))
