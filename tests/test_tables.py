"""Each table, lightly: it says what transformers writes, grows exactly, and what holds nothing can go.

The toys of toys.TABLED have thorough tests of their own (test_widen.py, test_narrow.py and others). Here are the tables
of all other types, and of each the axes that it lets change, and the words with which it refuses the rest.
"""

import dataclasses
from dataclasses import replace
from functools import cache, partial

import pytest
import tabled
from later import LATER
from test_narrow import drawn, narrowed, silent

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.families import FAMILIES
from surgeon.checkpoint.header import TensorSpec
from surgeon.errors import CheckpointError, PlanError
from surgeon.surgery import open_model
from surgeon.transforms.narrow import Kept, layers_with, narrow

if LATER:
    from exact64 import EXACT, difference, logits64
    from test_narrow import logits_without_epsilon

pytestmark = pytest.mark.usefixtures("one_thread")

GROWN = {
    "hidden": {"hidden_size": 1.5},
    "ffn": {"intermediate_size": 71},
    "expert_ffn": {"expert_intermediate_size": 71},
    "heads": {"attention_heads": 12},
    "head_dim": {"head_dim": "2x"},
    "all": {"layers": 4, "hidden_size": 2.0, "intermediate_size": "2x", "attention_heads": "2x", "head_dim": "2x"},
}
# Where a head's size is hidden / heads.
GROWN_SQUARE = {
    "hidden": {"hidden_size": 1.5},
    "ffn": {"intermediate_size": 71},
    "head_dim": {"hidden_size": 2.0, "head_dim": "2x"},
    "all": {"layers": 4, "hidden_size": 4.0, "intermediate_size": "2x", "head_dim": "2x"},
}
CUT = {
    "ffn": ("ffn",),
    "expert_ffn": ("expert_ffn",),
    "heads": ("heads", "kv_heads"),
    "hidden": ("hidden",),
    "experts": ("experts",),
}

LATENT = ("youtu", "deepseek_v2", "deepseek_v2-lite", "deepseek_v3", "glm4_moe_lite")
SLOPES = "it tells positions by"
NO_DENSE = "all its layers have experts"
HYBRID = ("qwen3_5_text", "qwen3_next")
REFUSED = {
    **{(name, op): NO_DENSE for name in ("mellum", "solar_open") for op in ("ffn", "all")},
    **{(name, op): "four sizes" for name in LATENT for op in ("head_dim", "all")},
    **{(name, op): "a share of its dimensions rotates" for name in HYBRID for op in ("head_dim", "all")},
    ("ernie4_5_moe", "all"): "derives which layers have experts",
    ("flex_olmo", "heads"): "must be copies",
    **{("llama4_text", op): "without gains" for op in ("head_dim", "all")},
    ("minimax_m2", "heads"): "must be copies",
    ("olmoe", "hidden"): "must be copies",
    ("bloom", "hidden"): "layer norm behind its embedding",
    ("bloom", "ffn"): "takes its MLP to be 320 wide",
    ("bloom", "all"): SLOPES,
    ("codegen", "hidden"): "rotary head of 10 dims cannot grow to 15",
    ("codegen", "all"): "four blocks",
    **{("falcon-alibi", op): "divides by the size of a head" for op in ("hidden", "head_dim", "all")},
    ("mpt", "ffn"): "takes its MLP to be 320 wide",
    ("mpt", "all"): SLOPES,
    **{("olmo-clipped", op): "are clipped" for op in ("head_dim", "all")},
    ("stablelm-parallel", "hidden"): "rotary head of 10 dims cannot grow to 15",
    ("stablelm-parallel", "all"): "a norm of its own",
    ("ministral3", "head_dim"): "rope type 'yarn'",
    ("ministral3", "all"): "rope type 'yarn'",
    ("olmo3", "heads"): "must be copies",
}
NOT_CUT = {
    **{(name, "ffn"): "has MLP neurons to choose from" for name in ("mellum", "solar_open")},
    **{(name, "hidden"): SLOPES for name in ("bloom", "falcon-alibi", "mpt")},
    **{(name, "ffn"): "takes its MLP to be 320 wide" for name in ("bloom", "mpt")},
    ("codegen", "hidden"): "four blocks",
    ("stablelm-parallel", "hidden"): "a norm of its own",
}
# transformers holds their routers in float32, whatever is asked for: 2^-24 of each weight.
ROUNDED = {"ernie4_5_moe": 1e-6, "hunyuan_v1_moe": 1e-6}

if LATER:
    before64 = cache(logits64)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a function from a name of tabled.TYPES to its checkpoint in float64, built once. Read-only."""
    directory = tmp_path_factory.mktemp("tabled")
    return cache(lambda name: tabled.build64(name, directory / name))


def is_square(name):
    """Return whether a head's size is hidden / heads, so that neither changes alone."""
    family = FAMILIES[name.partition("-")[0]]
    flag = family.square_heads
    return "head_dim" not in family.sizes or flag is True or flag in tabled.TYPES[name]


def has_sized_experts(name):
    """Return whether experts have a size of their own."""
    rows = [row for part in FAMILIES[name.partition("-")[0]].mlp for row in part.values()]
    return any("expert_ffn" in axes_of(dim) for row in rows for dim in row.axes)


def growth(name, operation):
    """Return what an operation asks for, {} where the family leaves no such choice; a hidden size is a factor."""
    options = dict((GROWN_SQUARE if is_square(name) else GROWN).get(operation, ()))
    if operation == "expert_ffn" and not has_sized_experts(name):
        return {}
    if operation == "ffn" and "ffn" not in FAMILIES[name.partition("-")[0]].sizes:
        options["intermediate_size"] = 400  # more than 4 x 80, which the code takes it to be
    return options


def kept(anatomy, operation):
    """Return what an operation keeps: of square families in shapes that they have."""
    sizes = anatomy.sizes
    six = dict.fromkeys(range(anatomy.depth), (0, 1, 3, 4, 6, 7))
    if operation == "experts" and anatomy.expert_groups > 1:
        return Kept(experts=dict.fromkeys(sorted(layers_with(anatomy, "experts")), (0, 2, 4, 5, 6, 7)))
    if operation == "heads" and sizes["group"] == 1:
        return Kept(kv_heads=six)
    if not anatomy.is_square or operation != "hidden":
        return drawn(anatomy, CUT[operation])
    if sizes["group"] == 1:
        return Kept(hidden=tuple(range(10, 70)), kv_heads=six)
    if sizes["kv_heads"] == 1:
        return Kept(hidden=tuple(range(10, 70)), heads={layer: (heads,) for layer, heads in six.items()})
    return Kept(hidden=tuple(range(20, 60)), kv_heads={layer: (layer % 2,) for layer in range(anatomy.depth)})


def together(name, operations, refusals):
    """Return the operations as tests have them: those that are refused one by one, all others at once."""
    free = [operation for operation in operations if (name, operation) not in refusals]
    return [*([operation] for operation in operations if operation not in free), *([free] if free else [])]


def growths(name):
    """Return the operations of each test of growing; to clone everything widens heads too."""
    possible = [operation for operation in GROWN if growth(name, operation)]
    padded = [operation for operation in possible if operation not in ("head_dim", "all")]
    alone = ["all"] if (name, "all") not in REFUSED else ["head_dim", "all"]
    return [*together(name, padded, REFUSED), *([operation] for operation in alone)]


def cuts(name):
    """Return the operations of each test of cutting."""
    takes = tabled.TYPES[name].keys() & {"num_experts_per_tok", "moe_k", "moe_topk"}
    missing = {"heads"} if is_square(name) else set()
    missing |= set() if has_sized_experts(name) else {"expert_ffn"}
    missing |= set() if takes else {"experts"}
    possible = [operation for operation in CUT if operation not in missing]
    if FAMILIES[name.partition("-")[0]].norm_kind == "rms" or not takes:
        return together(name, possible, NOT_CUT)
    # What keeps experts from being chosen is a channel of its own, which moves the mean that a layer norm subtracts.
    return [*together(name, [operation for operation in possible if operation != "experts"], NOT_CUT), ["experts"]]


WIDER = [(name, "+".join(operations)) for name in tabled.TYPES for operations in growths(name)]
NARROWER = [(name, "+".join(operations)) for name in tabled.TYPES for operations in cuts(name)]


@pytest.mark.parametrize("name", tabled.TYPES)
def test_every_tensor_that_transformers_writes_has_the_shape_that_the_table_says(name, small):
    anatomy = open_model(small(name)).anatomy

    for tensor, spec in anatomy.spec.tensors.items():
        row, part = anatomy.row(tensor)
        sizes = [anatomy.sizes | {"?": size} for size in spec.shape]  # a size that is none of the table's
        implied = tuple(dim.size(own) for dim, own in zip(row.axes, sizes, strict=True))
        assert implied == spec.shape, tensor
        assert part != "buffer"


@pytest.mark.parametrize("name", tabled.TYPES)
def test_a_tensor_that_is_missing_or_longer_is_refused_by_its_name(name, small):
    anatomy = open_model(small(name)).anatomy
    spec = anatomy.spec

    for tensor, value in spec.tensors.items():
        if "expert" in tensor and "experts.3" not in tensor:
            continue  # one expert stands for all
        others = {other: found for other, found in spec.tensors.items() if other != tensor}
        with pytest.raises(CheckpointError) as caught:
            read_anatomy(replace(spec, tensors=others))
        assert tensor in str(caught.value)
        if {"?"} in map(axes_of, anatomy.row(tensor)[0].axes[-1:]):
            continue
        longer = TensorSpec(value.dtype, (*value.shape[:-1], sum(value.shape[-1:]) + 1))
        with pytest.raises(CheckpointError, match="but config.json implies"):
            read_anatomy(replace(spec, tensors=others | {tensor: longer}))


@pytest.mark.parametrize(("name", "operation"), WIDER)
def test_a_wider_model_computes_what_the_original_computes_or_is_refused(name, operation, small, tmp_path):
    source = small(name)
    options = {option: size for part in operation.split("+") for option, size in growth(name, part).items()}
    if "hidden_size" in options:
        options["hidden_size"] = int(options["hidden_size"] * open_model(source).anatomy.sizes["hidden"])
    if (name, operation) in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[name, operation]):
            surgeon.grow(source, **options)
        return

    surgery = surgeon.grow(source, **options)
    surgery.save(tmp_path / "wide")

    assert surgery.plan.all_notes == ()
    assert difference(logits64(tmp_path / "wide"), before64(source)) <= ROUNDED.get(name, EXACT)


@pytest.mark.parametrize(("name", "operation"), NARROWER)
def test_removing_what_holds_nothing_changes_nothing_or_is_refused(name, operation, small, tmp_path):
    anatomy = open_model(small(name)).anatomy
    parts = [kept(anatomy, part) for part in operation.split("+")]
    found = {
        field.name: getattr(part, field.name)
        for part in parts
        for field in dataclasses.fields(Kept)
        if getattr(part, field.name) is not None
    }
    keep = Kept(**found)
    if (name, operation) in NOT_CUT:
        with pytest.raises(PlanError, match=NOT_CUT[name, operation]):
            narrowed(small(name), tmp_path / "narrow", keep)
        return
    source = silent(small(name), tmp_path / "silent", keep)

    cut = narrowed(source, tmp_path / "narrow", keep)

    assert difference(logits_without_epsilon(cut), logits_without_epsilon(source)) <= EXACT


# --- experts -------------------------------------------------------------------------------------------------------

# One that experts compete in in groups, one with shared experts, fused ones, ones of another layout, and a layer norm.
MIXTURES = ("deepseek_v3", "qwen2_moe", "granitemoe", "llama4_text", "phimoe")


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_with_the_largest_weights_stay_and_the_model_loads(name, small, tmp_path):
    left = 6 if name == "deepseek_v3" else 4
    width = {"expert_intermediate_size": 20} if has_sized_experts(name) else {"intermediate_size": 20}

    surgeon.prune(small(name), experts=left, score="magnitude", **width).save(tmp_path / "cut")

    sizes = open_model(tmp_path / "cut").anatomy.sizes
    assert (sizes["experts"], sizes["expert_ffn" if has_sized_experts(name) else "ffn"]) == (left, 20)
    assert logits64(tmp_path / "cut").isfinite().all()


@pytest.mark.parametrize(
    ("experts", "message"),
    [(5, "compete in 3 groups, each of which keeps as many: 5"), (3, r"layer 1 would keep \[1, 1, 1\]")],
)
def test_groups_of_experts_stay_alike(experts, message, small):
    with pytest.raises(PlanError, match=message):
        surgeon.prune(small("deepseek_v3"), experts=experts, score="uniform").summary()


def test_other_experts_of_a_group_than_of_the_next_are_not_kept(small):
    anatomy = open_model(small("deepseek_v3")).anatomy

    with pytest.raises(PlanError, match=r"layer 1 would keep \[3, 2, 1\]"):
        narrow(anatomy, Kept(experts=dict.fromkeys((1, 2), (0, 1, 2, 4, 5, 7))))


def test_experts_without_a_size_of_their_own_grow_and_shrink_with_the_mlp(small):
    for verb in (surgeon.grow, partial(surgeon.prune, score="uniform")):
        with pytest.raises(PlanError, match="experts of olmoe have the MLP's size") as caught:
            verb(small("olmoe"), expert_intermediate_size=20 if verb is not surgeon.grow else 80)
        assert "--intermediate-size" in caught.value.hint


def test_neurons_of_experts_that_no_text_can_rank_are_refused_before_one_is_read(small, tmp_path):
    for name, option in (("qwen2_moe", "expert_intermediate_size"), ("granitemoe", "intermediate_size")):
        with pytest.raises(PlanError, match="neurons of experts are not ranked by contribution"):
            surgeon.prune(small(name), data=[str(tmp_path / "none.txt")], **{option: 20})
