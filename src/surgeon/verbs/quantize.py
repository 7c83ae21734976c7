"""The verb `quantize`: store the weights of a model's linear maps as codes of 8 or 4 bits, through a kept library."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgeon.data.documents import check_there
from surgeon.draft import VERIFIED_BELOW
from surgeon.errors import PlanError
from surgeon.options import (
    Checked,
    OptionError,
    Verb,
    Words,
    check_counts,
    columns_option,
    device_option,
    option,
    reads_of,
    revision_option,
    takes,
)
from surgeon.plan.schemes import BITS, COMPRESSED, GROUPS, TORCHAO, Scheme, version_of
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.quantize import NO_GROUP, WEIGHT, fitting_groups, linear_maps
from surgeon.transforms.quantize import quantize as plan_quantize
from surgeon.verbs.quantizing import Quantizing, QuantizingCost

VERB = Verb(plans="quantize", relation="quantized", ends=True, then="evaluate {output} {data} --baseline {source}")
SAMPLES, SEQUENCE_LENGTH = 32, 512  # of the text that is measured
USES = {
    "bitsandbytes": "it quantizes when a model is loaded, and its 4-bit files do not reload to the same model on a CPU",
    "quanto": "it is no longer maintained, and transformers cannot save what it makes",
    "hqq": "transformers does not let it run on a CPU",
    "gguf": "transformers reads it and does not write it; llama.cpp's own converter and llama-quantize do",
    "gptq": "its library needs a GPU, and of compressed-tensors the codes are rounded to the nearest",
    "awq": "its library needs a GPU, and of compressed-tensors the codes are rounded to the nearest",
    "llm-compressor": "it needs an older transformers; it takes any result of surgeon, in an environment of its own",
}


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Checked):
    """The options of `quantize`."""

    bits: int = option("Bits of a code: 8, or 4.", 8, metavar="N", group="codes")
    method: str = option(
        "The library whose form the codes have: torchao (8 bits, a scale for each row), compressed-tensors (8 or 4 "
        "bits in groups, as vLLM takes them), or auto: torchao for 8 bits, compressed-tensors for 4.",
        "auto",
        metavar="METHOD",
        choices=Words(("auto", TORCHAO, COMPRESSED), refused=USES),
        group="codes",
    )
    group_size: int | None = option(
        "With compressed-tensors: inputs that share a scale, 32, 64 or 128. Default: the largest that divides all.",
        None,
        metavar="G",
        group="codes",
    )
    data: Sequence[str] = option(
        "Text to measure on, before and after: perplexity, and KL from the source. Repeatable.",
        (),
        metavar="DATA",
        reads=True,
        group="text",
    )
    columns: str | None = columns_option("text")
    samples: int = option("Rows of that text.", SAMPLES, metavar="N", group="text")
    sequence_length: int = option("Tokens of a row.", SEQUENCE_LENGTH, metavar="N", group="text")
    verify: bool | None = option(
        "Load the result, and compare its logits with those of the model quantized in memory, before it takes its "
        "place. Default: below a billion parameters.",
        None,
        group="run",
    )
    device: str = device_option()
    revision: str | None = revision_option()

    def __post_init__(self) -> None:
        """Raise OptionError for bits that a method does not have, and for a group that no kernel takes."""
        super().__post_init__()
        check_counts(self, "samples")
        check_counts(self, "sequence_length", least=2)
        known = sorted({bits for each in BITS.values() for bits in each}, reverse=True)
        if self.bits not in known:
            raise OptionError("bits", f"--bits is {self.bits}; a code has 8 or 4", hint="--bits 8 or --bits 4.")
        if self.bits not in BITS[self.chosen]:
            raise OptionError(
                "bits",
                f"--bits {self.bits} does not go with --method {self.chosen}, which on a CPU stores 4 bits in bytes or "
                "passes over what it cannot take",
                hint=f"--method {COMPRESSED} packs 4 bits.",
            )
        if self.group_size is None:
            return
        if self.chosen == TORCHAO:
            raise OptionError(
                "group_size",
                f"--group-size has no effect with {TORCHAO}, which has a scale for each row",
                hint=f"Add --method {COMPRESSED}, or leave it out.",
            )
        if self.group_size not in GROUPS:
            sizes = ", ".join(map(str, sorted(GROUPS)))
            raise OptionError("group_size", f"--group-size is {self.group_size}, and kernels take {sizes}",
                              hint=f"One of: {sizes}.")  # fmt: skip

    @property
    def chosen(self) -> str:
        """The method, where none is named the one for the bits."""
        if self.method != "auto":
            return self.method
        return TORCHAO if self.bits in BITS[TORCHAO] and self.group_size is None else COMPRESSED


@takes(QuantizeOptions)
def quantize(model: "str | os.PathLike[str] | Surgery", options: QuantizeOptions) -> Quantizing:
    """Return the surgery that stores the weights of linear maps as codes of `bits`, in the form of a library.

    Maps inside the layers are quantized; embeddings, the head, norms and biases keep their bytes. It is the last step
    of a chain: prune and heal first. A result that does not reload to the logits of the model quantized in memory is
    not written.

    Raises PlanError where a library would pass something over (Conv1D, experts), where a group does not divide the
    inputs, and where the library is not there.

        surgeon.quantize("SmolLM2-135M", bits=8).save("SmolLM2-int8")
    """
    begun = open_model(model, revision=options.revision, reads=reads_of(options))
    check_there(options.data)
    weights = linear_maps(begun.anatomy, options.chosen)
    group_size = options.group_size
    if options.chosen == COMPRESSED and group_size is None:
        fitting = fitting_groups(weights)
        if not fitting:
            name, spec = next((name, spec) for name, spec in weights.items() if spec.shape[1] % min(GROUPS))
            raise PlanError(f"{name!r} has {spec.shape[1]} inputs, no whole number of groups of 32", hint=NO_GROUP)
        group_size = fitting[0]
    scheme = Scheme(options.chosen, options.bits, group_size)
    plan = plan_quantize(begun.anatomy, scheme)
    library = " ".join(filter(None, (scheme.method, version_of(scheme.method))))  # to plan takes none of it
    plan = replace(plan, steps=({"quantize": {**plan.steps[0]["quantize"], "library": library}},))
    small = begun.spec.num_parameters < VERIFIED_BELOW
    cost = QuantizingCost(
        begun, options.data, options.columns, options.samples, options.sequence_length, options.device
    )
    return Quantizing(
        source=begun.source,
        plan=begun.plan.then(plan),
        attachments=begun.attachments,
        begun_with=begun.begun_with,
        reads=begun.reads,
        begun=begun,
        scheme=scheme,
        modules=tuple(name.removesuffix(WEIGHT) for name in weights),
        verifies=small if options.verify is None else options.verify,
        cost=cost if options.data else None,
    )
