"""A narrower model computes what the original does where what is removed held nothing, and keeps the rest's bytes."""

import json
import random
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import toys
from later import LATER

import surgeon
from surgeon.anatomy.axes import Axis, Index, Sum, axes_of, parse, survivors
from surgeon.anatomy.families import written_and_read
from surgeon.errors import PlanError
from surgeon.plan.expressions import Affine
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.layers import keep_layers
from surgeon.transforms.narrow import Kept, layers_with, narrow
from surgeon.transforms.uniform import uniform, uniform_head_dim

if LATER:
    import torch
    from exact64 import EXACT, WithoutEpsilon, build64, difference, load64, logits, logits32, logits64
    from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")

FREE = (
    *("llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("phi3-partial-rotary", "olmo2", "smollm3", "granite", "cohere2", "mixtral", "qwen3_moe"),
    *("qwen3_moe-sparse-step", "gpt_oss"),
)
DERIVED = ("gpt2", "gpt2-inverse-layer-idx", "gpt_neox", "gpt_neox-serial", "opt", "opt-post-norm")
EXPERTS = ("mixtral", "qwen3_moe", "qwen3_moe-sparse-step", "gpt_oss")
# With one epsilon for norms over channels and over heads, or none in the config: it leaves 1e-7 to 1e-2 of the logits.
ONE_EPSILON = ("qwen3", "qwen3_moe", "qwen3_moe-sparse-step", "gemma3_text", "olmo2", "opt")
ROUNDED = 4e-6  # in float32, of the largest logit: rounding, for in float64 nothing is left. Measured: up to 2.6e-6
WRONG = 1e-2  # of logits of order 1. What a wrong cut leaves is more

# What is kept of each axis; heads of DERIVED follow from hidden / 10.
SIZES = {"ffn": 37, "expert_ffn": 19, "kv_heads": 1, "group": 3, "experts": 5}
OPERATIONS = {
    "neurons": ("ffn",),
    "heads in groups": ("heads",),
    "groups": ("kv_heads",),
    "channels": ("hidden",),
    "experts": ("experts",),
    "all": ("hidden", "ffn", "heads", "kv_heads", "experts"),
}


def axes_for(name, operation):
    """Return the fields of Kept that an operation cuts in a toy, () where it has none of them or not alone."""
    missing = {"experts"} if name not in EXPERTS else {"ffn"} if name == "qwen3_moe" else set()
    wanted = [axis for axis in OPERATIONS[operation] if axis not in missing]
    if name in DERIVED:
        wanted = [axis for axis in wanted if axis != "heads"]
        alone = {"hidden", "kv_heads"} & set(wanted)
        return () if len(alone) == 1 and operation != "channels" else (*wanted, "kv_heads") if alone else tuple(wanted)
    return tuple(wanted)


CASES = [(name, op) for name in (*FREE, *DERIVED) for op in OPERATIONS if axes_for(name, op)]
EXACTLY = [(name, op) for name, op in CASES if name != "opt-post-norm" or "hidden" not in axes_for(name, op)]


def drawn(anatomy, fields, seed=0):
    """Return a Kept that cuts these fields: other positions in every layer, and other heads in every group."""
    sizes, draw = anatomy.sizes, random.Random(seed)

    def some(size, count):
        return tuple(sorted(draw.sample(range(size), count)))

    def in_layers(axis, pick):
        return {layer: pick(layer) for layer in sorted(layers_with(anatomy, axis))}

    derived = "kv_heads" not in anatomy.family.sizes
    counts = SIZES | ({"kv_heads": 6, "group": 1} if derived else {})
    hidden = (
        60 if derived and "head_dim" not in anatomy.family.sizes else sizes["hidden"] * 5 // 6 // 24 * 24
    )  # by 8 and by 3: some families insist that heads divide it
    options = {}
    if "hidden" in fields:
        options["hidden"] = some(sizes["hidden"], hidden)
    for axis in ("ffn", "expert_ffn", "kv_heads", "experts"):
        if axis in fields:
            options[axis] = in_layers(axis, lambda _, axis=axis: some(sizes[axis], counts[axis]))
    if "kv_heads" in fields and anatomy.shares_heads:
        by_stack = [some(sizes["kv_heads"], counts["kv_heads"]) for _ in anatomy.stacks]
        options["kv_heads"] = {layer: by_stack[layer // anatomy.depth] for layer in options["kv_heads"]}
    if "heads" in fields:
        groups = counts["kv_heads"] if "kv_heads" in fields else sizes["kv_heads"]
        options["heads"] = in_layers(
            "group", lambda _: tuple(some(sizes["group"], counts["group"]) for _ in range(groups))
        )
    return Kept(**options)


# --- an oracle: every position of a stored dimension, by its place on each axis ------------------------------------


def coordinates(dim, sizes):
    """Return, for each position of a dimension, its position on each of the axes that it lies on."""
    if isinstance(dim, Axis):
        return [{} if dim.name.isdigit() else {dim.name: i} for i in range(dim.size(sizes))]
    if isinstance(dim, Sum):
        return [point for block in dim.blocks for point in coordinates(block, sizes)]
    factors = [coordinates(factor, sizes) for factor in dim.factors]
    return [{axis: i for point in points for axis, i in point.items()} for points in product(*factors)]


def stays(kept, layer, point, sizes):
    """Return whether `kept` keeps the place that has these positions on its axes."""
    for axis, i in point.items():
        in_stream = axis in ("hidden", "projected") or (axis == "embed" and sizes["embed"] == sizes["hidden"])
        if in_stream and kept.hidden is not None and i not in kept.hidden:
            return False
        if axis in ("q_dim", "k_dim", "v_dim") and kept.head_dim is not None and i not in kept.head_dim:
            return False
        found = getattr(kept, axis, None)
        if axis in ("ffn", "expert_ffn", "kv_heads", "experts") and found is not None and i not in found[layer]:
            return False
        if axis == "group" and kept.heads is not None:
            groups = list(range(sizes["kv_heads"])) if kept.kv_heads is None else kept.kv_heads[layer]
            if i not in kept.heads[layer][groups.index(point["kv_heads"])]:
                return False
    return True


def left(anatomy, kept, name):
    """Return, for each dimension of a tensor, the positions that stay: all of one that no axis names."""
    place = anatomy.locate(name)
    layer = place[0] if place else None
    sizes = [anatomy.sizes | {"?": size} for size in anatomy.spec.tensors[name].shape]
    return [
        [j for j, point in enumerate(coordinates(dim, own)) if stays(kept, layer, point, anatomy.sizes)]
        for dim, own in zip(anatomy.row(name)[0].axes or [Axis("?")] * len(sizes), sizes, strict=True)
    ]


# --- a model in which what is removed holds nothing ----------------------------------------------------------------


def weights(directory):
    return load_file(directory / "model.safetensors")


def silent(source, directory, kept, *, fill_mean=True):
    """Return `directory`, now holding the model of `source` with nothing in what `kept` does not keep.

    Channels are never written (with layer norms: they hold the mean of the others, and no shift follows; with
    `fill_mean` false they are zero there too), neurons and heads are
    not read, and no token ever takes a removed expert. Where a norm looks at all heads, theirs are not written either.
    """
    anatomy, tensors = open_model(source).anatomy, weights(source)
    wide_norms = any("kv_heads" in axes_of(dim) for row in anatomy.family.norm.values() for dim in row.axes)
    for name, value in tensors.items():
        row, _ = anatomy.row(name)
        write, read = written_and_read(row)
        for dim, stay in enumerate(left(anatomy, kept, name)):
            gone = sorted(set(range(value.shape[dim])) - set(stay))
            if not gone or "experts" in (axes := axes_of(row.axes[dim])):
                continue
            if axes & {"hidden", "embed"}:
                is_branch = any(name.endswith(norm) for norm in anatomy.family.branch_norms)
                if row.kind == "shift":
                    value.index_fill_(dim, torch.tensor(gone), 0)
                elif dim == write and (row.kind != "gain" or is_branch):
                    mean = value.index_select(dim, torch.tensor(stay)).mean(dim, keepdim=True)
                    fill = mean if fill_mean and anatomy.family.norm_kind == "layer" else torch.zeros_like(mean)
                    value.index_copy_(dim, torch.tensor(gone), fill.repeat_interleave(len(gone), dim))
            elif dim == read or ((wide_norms or kept.head_dim) and axes & {"q_dim", "k_dim"}):
                value.index_fill_(dim, torch.tensor(gone), 0)
    if kept.experts is not None:
        never_chosen(anatomy, tensors, kept)
    copied(source, directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def copied(source, directory):
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())


def never_chosen(anatomy, tensors, kept):
    """Give one channel, which stays, a positive constant that only routers read: minus 1000 times it for the removed.

    Its constant comes from the embedding, nothing else writes it, and gains keep its sign.
    """
    channel = 0 if kept.hidden is None else kept.hidden[0]
    for name, value in tensors.items():
        row, part = anatomy.row(name)
        write, _ = written_and_read(row)
        if row.kind == "embedding":
            value[..., channel] = 3.0
        elif row.kind == "gain" and axes_of(row.axes[-1]) == {"hidden"}:
            value[channel] = 1.0
        elif write is not None and axes_of(row.axes[write]) == {"hidden"}:
            value.select(write, channel).fill_(0)
        elif part == "mlp" and [axes_of(dim) for dim in row.axes] == [{"experts"}, {"hidden"}]:
            gone = set(range(anatomy.sizes["experts"])) - set(kept.experts[anatomy.stacks[0].locate(name)[0]])
            value[sorted(gone), channel] = -1000.0
        elif row.kind == "logit" and part == "mlp":  # it sways the choice
            gone = set(range(anatomy.sizes["experts"])) - set(kept.experts[anatomy.locate(name)[0]])
            value[..., sorted(gone)] = -1000.0


@pytest.fixture(scope="module")
def quiet_transformers(toy64, tmp_path_factory):
    """Return a function from a toy's name to what all operations keep of it and its silenced copy in float64."""
    directory = tmp_path_factory.mktemp("silent")

    @cache
    def build(name):
        kept = drawn(open_model(toy64(name)).anatomy, axes_for(name, "all"))
        return kept, silent(toy64(name), directory / name, kept)

    return build


def only(kept, fields, anatomy):
    """Return what `kept` says of these fields alone. Without the groups that go, those that stay keep their heads."""
    part = Kept(**{field: getattr(kept, field) for field in fields})
    if part.heads is None or part.kv_heads is not None or kept.kv_heads is None:
        return part
    heads = {}
    for layer, found in kept.heads.items():
        by_group = dict(zip(kept.kv_heads[layer], found, strict=True))
        first = tuple(range(len(found[0])))  # of a group that goes later, any will do
        heads[layer] = tuple(by_group.get(group, first) for group in range(anatomy.sizes["kv_heads"]))
    return replace(part, heads=heads)


def narrowed(source, out, kept):
    """Return `out`, now holding what is `kept` of the model of `source`."""
    model = open_model(source)
    Surgery(model.source, narrow(model.anatomy, kept)).save(out)
    return out


def logits_without_epsilon(directory, head_dim=None):
    """Return the logits in float64 with norms that add next to nothing under the root.

    With `head_dim`, attention logits are divided by its square root.
    """
    model = load64(directory)
    for module in model.modules():
        if head_dim and hasattr(module, "scaling"):
            module.scaling = head_dim**-0.5
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-18)
    with WithoutEpsilon():
        return logits(model)


def of(name):
    """Return what computes the logits of a toy in float64."""
    return logits_without_epsilon if name in ONE_EPSILON else logits64


if LATER:
    before64, before64_without_epsilon, before32 = cache(logits64), cache(logits_without_epsilon), cache(logits32)


def before(name, directory):
    """Return the logits of a silenced toy, which never changes, in float64."""
    return (before64_without_epsilon if name in ONE_EPSILON else before64)(directory)


@pytest.mark.parametrize(("name", "operation"), EXACTLY)
def test_removing_what_holds_nothing_changes_nothing(name, operation, quiet_transformers, tmp_path):
    kept, source = quiet_transformers(name)
    part = only(kept, axes_for(name, operation), open_model(source).anatomy)

    cut = narrowed(source, tmp_path / "narrow", part)

    assert difference(of(name)(cut), before(name, source)) <= EXACT
    if operation == "all" and name not in ONE_EPSILON:
        expected = before32(source)
        assert difference(logits32(cut), expected) <= ROUNDED * expected.abs().max()


@pytest.mark.parametrize("name", ["gemma", "cohere2"])
def test_a_head_of_its_own_follows_too(name, tmp_path):
    """Gemma multiplies its embeddings by sqrt(hidden); here no tied head asks for the factor back."""
    source = build64(name, tmp_path / "source", tie_word_embeddings=False)
    kept = drawn(open_model(source).anatomy, ("hidden",))
    silenced = silent(source, tmp_path / "silent", kept)

    cut = narrowed(silenced, tmp_path / "narrow", kept)

    assert "lm_head.weight" in weights(cut)
    assert difference(logits64(cut), logits64(silenced)) <= EXACT


PADDED = ("llama", "llama-tied", "gemma", "gemma2", "cohere2", "mixtral", "gpt_oss", "gpt2", "gpt_neox", "opt")


@pytest.mark.parametrize("name", PADDED)
def test_narrowing_undoes_padding(name, toy64, tmp_path):
    """With layer norms too: padding gives the new channels the mean of the old, and a shift of zero."""
    sizes = open_model(toy64(name)).anatomy.sizes
    surgeon.grow(toy64(name), hidden_size=sizes["hidden"] * 5 // 4).save(tmp_path / "wide")
    heads = {layer: tuple(range(sizes["heads"])) for layer in range(6)} if name in DERIVED else None

    back = narrowed(tmp_path / "wide", tmp_path / "back", Kept(hidden=tuple(range(sizes["hidden"])), kv_heads=heads))

    assert open_model(back).anatomy.sizes == sizes
    logits_of = of(name)
    assert difference(logits_of(back), logits_of(toy64(name))) <= EXACT


# --- the bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FREE, *DERIVED])
def test_what_is_kept_is_kept_bit_for_bit_but_for_the_gains_of_norms(name, toy64, tmp_path):
    anatomy = open_model(toy64(name)).anatomy
    fields = axes_for(name, "all")
    kept = drawn(anatomy, fields, seed=1)

    after = weights(narrowed(toy64(name), tmp_path / "narrow", kept))

    for tensor, value in weights(toy64(name)).items():
        renamed, positions = tensor, left(anatomy, kept, tensor)
        layer, _, rest = tensor.partition(".experts.")
        if rest.partition(".")[0].isdigit():
            number = int(rest.partition(".")[0])
            stay = kept.experts[anatomy.stacks[0].locate(tensor)[0]]
            if number not in stay:
                continue
            renamed = f"{layer}.experts.{stay.index(number)}.{rest.partition('.')[2]}"
        for dim, stay in enumerate(positions):
            value = value.index_select(dim, torch.tensor(stay))
        found, row = after.pop(renamed), anatomy.row(tensor)[0]
        factor = (row.axes[-1].size(anatomy.sizes) / len(positions[-1])) ** 0.5
        add_one, scales = 1 - anatomy.family.init_gain, anatomy.family.scales_embedding
        is_final = anatomy.stacks[0].locate(tensor) is None
        if row.kind == "embedding" and scales:
            torch.testing.assert_close(found, value * factor, rtol=1e-15, atol=0)
        elif row.kind == "gain" and factor != 1 and not (scales and is_final):
            torch.testing.assert_close(found + add_one, (value + add_one) * factor, rtol=1e-14, atol=1e-15)
        else:  # the final norm of a head that is tied to a scaled embedding, too: the factors cancel
            assert torch.equal(found, value), tensor
    assert not after


def test_every_layer_keeps_its_own_neurons_and_every_group_its_own_heads(toy64, tmp_path):
    ffn = {layer: tuple(range(layer, layer + 9)) for layer in range(6)}
    heads = {layer: ((0, layer % 3 + 1), (2 - layer % 3, 3)) for layer in range(6)}

    cut = narrowed(toy64("llama"), tmp_path / "narrow", Kept(ffn=ffn, heads=heads))

    old, new = weights(toy64("llama")), weights(cut)
    for layer in range(6):
        name = f"model.layers.{layer}."
        assert torch.equal(new[name + "mlp.up_proj.weight"], old[name + "mlp.up_proj.weight"][layer : layer + 9])
        assert torch.equal(new[name + "mlp.down_proj.weight"], old[name + "mlp.down_proj.weight"][:, layer : layer + 9])
        queries = old[name + "self_attn.q_proj.weight"].view(2, 4, 10, 96)
        rows = [queries[group, head] for group in (0, 1) for head in heads[layer][group]]
        assert torch.equal(new[name + "self_attn.q_proj.weight"], torch.cat(rows))
        assert torch.equal(new[name + "self_attn.k_proj.weight"], old[name + "self_attn.k_proj.weight"])


def test_experts_that_stay_are_renumbered_in_each_layer(toy64, tmp_path):
    experts = {0: (0, 2, 5), 1: (1, 2, 6), 2: (4, 5, 6), 3: (0, 1, 2), 4: (0, 3, 6), 5: (2, 3, 4)}

    cut = narrowed(toy64("mixtral"), tmp_path / "narrow", Kept(experts=experts))

    old, new = weights(toy64("mixtral")), weights(cut)
    for layer, stay in experts.items():
        name = f"model.layers.{layer}.block_sparse_moe."
        assert torch.equal(new[name + "gate.weight"], old[name + "gate.weight"][list(stay)])
        for j, number in enumerate(stay):
            assert torch.equal(new[f"{name}experts.{j}.w2.weight"], old[f"{name}experts.{number}.w2.weight"])
        assert f"{name}experts.3.w2.weight" not in new
    assert config_of(cut)["num_local_experts"] == 3


def test_layers_and_widths_in_one_pass_are_the_steps_one_by_one(toy64, tmp_path):
    begun = open_model(toy64("gemma3_text"))
    shorter = Surgery(begun.source, keep_layers(begun.anatomy, [0, 2, 5]))
    kept = drawn(shorter.anatomy, axes_for("gemma3_text", "all"))

    replace(shorter, plan=shorter.plan.then(narrow(shorter.anatomy, kept))).save(tmp_path / "one")
    shorter.save(tmp_path / "short")
    narrowed(tmp_path / "short", tmp_path / "two", kept)

    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert config_of(tmp_path / "one") == config_of(tmp_path / "two")


def test_everything_kept_is_the_same_files(toy64, tmp_path):
    every = tuple(range(10))
    kept = Kept(hidden=tuple(range(48)), ffn={i: tuple(range(52)) for i in range(6)}, head_dim=every)

    cut = narrowed(toy64("qwen3"), tmp_path / "narrow", kept)

    assert (cut / "model.safetensors").read_bytes() == (toy64("qwen3") / "model.safetensors").read_bytes()
    assert config_of(cut) == config_of(toy64("qwen3"))


# --- what is not exact says so, and what is wrong is seen ----------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "opt-post-norm", "cohere2"])
def test_channels_of_zero_still_move_the_mean_that_layer_norms_subtract(name, toy64, tmp_path):
    kept = drawn(open_model(toy64(name)).anatomy, axes_for(name, "channels"))
    source = silent(toy64(name), tmp_path / "silent", kept, fill_mean=False)

    cut = narrowed(source, tmp_path / "narrow", kept)

    assert difference(logits_without_epsilon(cut), logits_without_epsilon(source)) > WRONG
    model = open_model(source)
    (note,) = narrow(model.anatomy, kept).all_notes
    assert note.startswith("approximate: norms")
    assert note.endswith("held the mean")


@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "opt-post-norm", "gpt_neox", "cohere2", "llama", "gemma3_text", "gpt_oss"]
)
def test_a_narrow_model_generates_the_same_with_and_without_a_cache(name, toy64, tmp_path):
    kept = drawn(open_model(toy64(name)).anatomy, axes_for(name, "all"), seed=2)
    model = load64(narrowed(toy64(name), tmp_path / "narrow", kept))

    def generated(use_cache):
        return model.generate(**toys.inputs(model), max_new_tokens=12, do_sample=False, use_cache=use_cache)

    assert torch.equal(generated(True), generated(False))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "cohere2"])
def test_gains_without_their_factor_are_seen(name, quiet_transformers, tmp_path):
    kept, source = quiet_transformers(name)
    model = open_model(source)
    plan = narrow(model.anatomy, only(kept, axes_for(name, "channels"), model.anatomy))
    plain = {
        tensor: expr.source if isinstance(expr, Affine) and "norm" in tensor else expr
        for tensor, expr in plan.tensors.items()
    }

    Surgery(model.source, replace(plan, tensors=plain)).save(tmp_path / "narrow")

    assert plain != plan.tensors
    assert difference(logits64(tmp_path / "narrow"), before64(source)) > WRONG


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt_oss", "qwen3", "mixtral"])
def test_other_positions_than_those_that_hold_nothing_are_missed(name, quiet_transformers, tmp_path):
    kept, source = quiet_transformers(name)
    other = drawn(open_model(source).anatomy, axes_for(name, "all"), seed=3)

    assert kept != other
    assert difference(logits64(narrowed(source, tmp_path / "narrow", other)), before64(source)) > WRONG


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_shares_of_all_experts_are_approximate(norm_topk_prob, tmp_path):
    source = build64("qwen3_moe", tmp_path / "source", norm_topk_prob=norm_topk_prob)

    anatomy = open_model(source).anatomy

    notes = narrow(anatomy, drawn(anatomy, ("experts",))).all_notes
    assert [note[:37] for note in notes] == ([] if norm_topk_prob else ["approximate: the weights of a token's"])


def test_sizes_that_the_kernel_for_experts_refuses_are_told(toy64):
    anatomy = open_model(toy64("mixtral")).anatomy

    (note,) = narrow(anatomy, drawn(anatomy, ("ffn",))).all_notes

    assert "multiples of 8, and 37 is none" in note
    assert not narrow(anatomy, Kept(ffn={layer: tuple(range(40)) for layer in range(6)})).all_notes


# --- smaller heads -------------------------------------------------------------------------------------------------

# Their logits are not divided by the square root of a head's size.
FIXED = {"gemma2": {}, "gemma3_text": {}, "granite": {}, "gpt2": {"scale_attn_weights": False, "hidden_size": 96}}
DIVIDED = ("llama", "llama-biases", "qwen3", "phi3", "phi3-partial-rotary", "cohere2", "mixtral", "gpt_neox")


def with_small_heads(name, tmp_path, **overrides):
    """Return a toy with heads of 12 dims, silent but for 6 of them, and what is kept."""
    sizes = {"hidden_size": 96} if name in DERIVED else {"head_dim": 12}
    source = build64(name, tmp_path / "source", **sizes | overrides)
    anatomy = open_model(source).anatomy
    options = {"hidden": tuple(range(0, 96, 2))} if name in DERIVED else {}
    kept = Kept(head_dim=uniform_head_dim(anatomy, 6), **options)
    return silent(source, tmp_path / "silent", kept), kept


@pytest.mark.parametrize("name", FIXED)
def test_dims_of_a_head_that_hold_nothing_can_go(name, tmp_path):
    source, kept = with_small_heads(name, tmp_path, **FIXED[name])

    cut = narrowed(source, tmp_path / "narrow", kept)

    assert difference(logits_without_epsilon(cut), logits_without_epsilon(source)) <= EXACT
    assert not [note for note in narrow(open_model(source).anatomy, kept).all_notes if "attention logits" in note]


@pytest.mark.parametrize("name", DIVIDED)
def test_where_logits_are_divided_by_the_root_of_a_heads_size_only_that_is_left(name, tmp_path):
    """Rotary frequencies, gains and places are right: with the divisor of the larger head nothing has changed."""
    source, kept = with_small_heads(name, tmp_path)

    cut = narrowed(source, tmp_path / "narrow", kept)

    assert "approximate: attention logits" in str(narrow(open_model(source).anatomy, kept).all_notes)
    assert difference(logits_without_epsilon(cut), logits_without_epsilon(source)) > WRONG
    assert difference(logits_without_epsilon(cut, head_dim=12), logits_without_epsilon(source)) <= EXACT


@pytest.mark.parametrize(
    ("name", "overrides", "new", "expected"),
    [
        ("llama", {"head_dim": 12}, 6, (0, 2, 4, 6, 8, 10)),
        ("llama", {"head_dim": 12}, 4, (0, 3, 6, 9)),
        ("llama", {"head_dim": 12}, 12, tuple(range(12))),
        ("cohere2", {"head_dim": 12}, 6, (0, 1, 4, 5, 8, 9)),
        ("phi3-partial-rotary", {"head_dim": 12}, 6, (0, 2, 4, 6, 8, 10)),
        ("phi3-partial-rotary", {"head_dim": 20}, 10, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)),
        ("phi3-partial-rotary", {"head_dim": 20}, 5, (0, 4, 8, 12, 16)),
        ("opt", {}, 6, (0, 2, 4, 5, 7, 9)),
    ],
)
def test_the_dims_that_stay_are_every_nth_pair_and_the_rest_evenly(name, overrides, new, expected, tmp_path):
    anatomy = open_model(build64(name, tmp_path / "source", **overrides)).anatomy

    assert uniform_head_dim(anatomy, new) == expected


@pytest.mark.parametrize(
    ("name", "overrides", "new", "message", "hint"),
    [
        ("llama", {"head_dim": 12}, 8, "rotary head of 12 dims cannot shrink to 8", "fit: 2, 4, 6."),
        ("llama", {"head_dim": 12}, 3, "rotary head of 12 dims cannot shrink to 3", "fit: 2, 4, 6."),
        ("llama", {"head_dim": 12}, 24, "rotary head of 12 dims cannot shrink to 24", "fit: 2, 4, 6."),
        ("phi3-partial-rotary", {}, 2, "rotary head of 10 dims cannot shrink to 2", "fit: 5."),
        ("llama", {"head_dim": 2}, 1, "cannot shrink to 1", "number of heads instead"),
        ("gpt_oss", {}, 2, "rope type 'yarn' derives", "number of heads instead"),
        ("opt", {}, 11, "cannot keep 11 of 10", "1 to 10"),
    ],
)
def test_a_size_of_heads_with_other_frequencies_is_refused_with_those_that_fit(
    name, overrides, new, message, hint, tmp_path
):
    anatomy = open_model(build64(name, tmp_path / "source", **overrides)).anatomy

    with pytest.raises(PlanError, match=message) as caught:
        uniform_head_dim(anatomy, new)
    assert hint in caught.value.hint


# --- refusals ------------------------------------------------------------------------------------------------------


def everywhere(positions, layers=6):
    return dict.fromkeys(range(layers), positions)


@pytest.mark.parametrize(
    ("name", "kept", "message", "hint"),
    [
        ("llama", {"hidden": ()}, "no channels .* would be left", "at least one"),
        ("llama", {"hidden": (0, 96)}, "96 does not exist", "0 to 95"),
        ("llama", {"hidden": (-1, 3)}, "-1 does not exist", "0 to 95"),
        ("llama", {"hidden": (3, 2)}, "not in ascending order", "lowest first"),
        ("llama", {"hidden": (2, 2)}, "not in ascending order", "lowest first"),
        ("llama", {"hidden": tuple(range(90))}, "90 is no multiple of 8", "--hidden-size 88"),
        (
            "llama",
            {"heads": everywhere(((0, 1, 2), (0, 1, 2)))} | {"hidden": tuple(range(80))},
            "80 .* of 6",
            "size 78",
        ),
        ("llama", {"ffn": {}}, "layer 0 is not listed", "0, 1, 2, 3, 4, 5"),
        ("llama", {"ffn": everywhere((0, 1), 5)}, "MLP neurons to keep: layer 5 is not listed", "0, 1, 2, 3, 4, 5"),
        ("llama", {"ffn": everywhere((0, 1), 7)}, "layer 6 has no MLP neurons, or does not exist", "4, 5"),
        ("llama", {"ffn": everywhere((0, 52))}, "MLP neurons of layer 0: 52 does not exist", "0 to 51"),
        ("llama", {"ffn": everywhere(())}, "no MLP neurons of layer 0 would be left", "at least one"),
        (
            "llama",
            {"ffn": everywhere((0, 1)) | {3: (0,)}},
            "some layers would keep 1 MLP neurons, others 2",
            "one number",
        ),
        ("llama", {"heads": everywhere(((0,),))}, "layer 0 keeps 2 key-value heads, but lists heads for 1", "each"),
        ("llama", {"heads": everywhere(((0,), (4,)))}, "heads of layer 0, group 1: 4 does not exist", "0 to 3"),
        ("llama", {"heads": everywhere(((0,), (1, 2)))}, "keep 1 heads, others 2", "one number"),
        ("llama", {"kv_heads": everywhere((1,)), "heads": everywhere(((0,), (1,)))}, "keeps 1 key-value heads", "each"),
        ("llama", {"kv_heads": everywhere((2,))}, "key-value heads of layer 0: 2 does not exist", "0 to 1"),
        ("llama", {"head_dim": (0, 1, 2)}, "cannot shrink to 3", "2."),
        ("qwen3", {"head_dim": (0, 1)}, r"a head of 2 has \[0, 5\], not \[0, 1\]", "[0, 5]"),
        ("phi3-partial-rotary", {"head_dim": (0, 2, 3, 6, 8)}, r"has \[0, 2\], not \[0, 2, 3\]", "[0, 2, 4, "),
        ("llama", {"experts": everywhere((0,))}, "no layer of this llama has experts", "another axis"),
        ("mixtral", {"experts": everywhere((0, 1))}, "a token takes 3 experts, and 2 would be left", "3 or more"),
        ("qwen3_moe", {"ffn": everywhere((0, 1))}, "no layer of this qwen3_moe has MLP neurons", "size of experts"),
        ("qwen3_moe-sparse-step", {"ffn": everywhere((0, 1))}, "layer 1 has no MLP neurons", "[0, 2, 3, 4]"),
        ("qwen3_moe-sparse-step", {"experts": everywhere((0, 1, 2))}, "layer 0 has no experts", "[1, 5]"),
        ("gpt2", {"kv_heads": everywhere((0, 1, 2))}, "80 is not 3 x 10", "--hidden-size 30 with 3 heads"),
        ("gpt2", {"hidden": tuple(range(60))}, "60 is not 8 x 10", "--hidden-size 60 with 6 heads"),
        ("opt", {"hidden": tuple(range(67))}, "67 is not 8 x 10", "--hidden-size 60 with 6 heads"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_can(name, kept, message, hint, toy64):
    with pytest.raises(PlanError, match=message) as caught:
        narrow(open_model(toy64(name)).anatomy, Kept(**kept))
    assert hint in caught.value.hint


def test_a_model_without_a_table_is_not_cut_in_width(tmp_path):
    with pytest.raises(PlanError, match="'unheard_of' has no table") as caught:
        narrow(open_model(toys.unheard_of("llama", tmp_path / "toy")).anatomy, Kept(hidden=(0,)))
    assert "llama" in caught.value.hint


def test_a_hidden_size_that_a_projection_must_differ_from_is_refused(tmp_path):
    anatomy = open_model(build64("opt-post-norm", tmp_path / "source", word_embed_proj_dim=60)).anatomy

    with pytest.raises(PlanError, match=r"embed and hidden both 60, opt has no .*project_in") as caught:
        narrow(anatomy, drawn(anatomy, ("hidden", "kv_heads")))
    assert "more or fewer of hidden than 60" in caught.value.hint


def test_a_config_that_does_not_say_what_a_token_takes_is_refused(toy64):
    anatomy = open_model(toy64("mixtral")).anatomy
    config = {key: value for key, value in anatomy.spec.config.items() if key != "num_experts_per_tok"}

    with pytest.raises(PlanError, match="does not say how many experts a token takes"):
        narrow(replace(anatomy, spec=replace(anatomy.spec, config=config)), Kept(experts=everywhere((0, 1, 2))))


# --- the config and the plan ---------------------------------------------------------------------------------------


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama",
            {"hidden_size": 72, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1}
            | {"rms_norm_eps": pytest.approx(96 / 72 * 1e-6)},
        ),
        (
            "qwen2",
            {
                "hidden_size": 48,
                "head_dim": 10,
                "num_attention_heads": 3,
                "rms_norm_eps": pytest.approx(1.6666e-6, 1e-4),
            },
        ),
        ("gpt_oss", {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 37, "head_dim": 10}),
        ("qwen3_moe-sparse-step", {"num_local_experts": 5, "moe_intermediate_size": 28, "intermediate_size": 37}),
        ("gpt2", {"n_embd": 60, "n_head": 6, "n_inner": 37, "layer_norm_epsilon": pytest.approx(80 / 60 * 1e-5)}),
        ("opt", {"hidden_size": 60, "word_embed_proj_dim": 60, "num_attention_heads": 6, "ffn_dim": 37}),
        ("opt-post-norm", {"hidden_size": 60, "word_embed_proj_dim": 44, "num_attention_heads": 6}),
        ("gemma2", {"head_dim": 10, "query_pre_attn_scalar": 13, "num_attention_heads": 3}),
    ],
)
def test_the_config_says_the_sizes_that_are_left(name, expected, toy64):
    anatomy = open_model(toy64(name)).anatomy

    config = narrow(anatomy, drawn(anatomy, axes_for(name, "all"))).config

    assert {key: config[key] for key in expected} == expected


def test_a_size_that_the_code_derives_is_written_out(tmp_path):
    """GPT-2 without n_inner takes 4 times the hidden size, which is not what it was any more."""
    anatomy = open_model(build64("gpt2", tmp_path / "source", n_inner=None)).anatomy

    assert narrow(anatomy, drawn(anatomy, ("hidden", "kv_heads"))).config["n_inner"] == 320


def test_every_key_that_counts_experts_follows(toy64):
    anatomy = open_model(toy64("mixtral")).anatomy
    both = replace(anatomy, spec=replace(anatomy.spec, config={**anatomy.spec.config, "num_experts": 7}))

    config = narrow(both, drawn(anatomy, ("experts",))).config

    assert (config["num_local_experts"], config["num_experts"]) == (5, 5)


def test_the_plan_says_what_was_asked_and_where_channels_come_from(toy64):
    anatomy = open_model(toy64("opt")).anatomy
    kept = drawn(anatomy, axes_for("opt", "all"))

    plan = narrow(anatomy, kept)

    assert plan.steps == ({"narrow": {"hidden": 60, "ffn": 37, "heads": 6, "kv_heads": 6}},)
    assert plan.axes == {"hidden": kept.hidden, "embed": kept.hidden}
    assert plan.layer_map == tuple(range(6))


# --- positions -----------------------------------------------------------------------------------------------------

DIMENSIONS = (
    *("(kv_heads group q_dim)", "(kv_heads group q_dim + kv_heads k_dim + kv_heads v_dim)", "(kv_heads group)"),
    *(
        "(kv_heads (group q_dim + k_dim + v_dim))",
        "(ffn 2)",
        "(ffn + ffn)",
        "(2 ffn)",
        "(positions + 2)",
        "hidden",
        "1",
    ),
)


@pytest.mark.parametrize("text", DIMENSIONS)
def test_the_positions_that_survive_are_those_whose_every_coordinate_does(text):
    (dim,) = parse(text)
    sizes = {"kv_heads": 3, "group": 4, "q_dim": 5, "k_dim": 5, "v_dim": 5, "ffn": 7, "positions": 6, "hidden": 11}
    heads = {0: (1, 2), 1: (0, 3), 2: (0, 1)}

    def keep(axis, position, outer):
        if axis == "group":
            return position in heads[outer["kv_heads"]]
        return {"kv_heads": position != 1, "q_dim": position % 2 == 0, "ffn": position > 2}.get(axis, position != 4)

    expected = tuple(
        j
        for j, point in enumerate(coordinates(dim, sizes))
        if all(keep(axis, i, {other: point[other] for other in point if other != axis}) for axis, i in point.items())
    )

    def kept(axis, outer):
        return Index.of(i for i in range(sizes[axis]) if keep(axis, i, outer))

    assert survivors(dim, sizes, kept) == expected
    assert survivors(dim, sizes, lambda *_: None) == tuple(range(dim.size(sizes)))


@pytest.mark.parametrize(
    ("old", "new"), [(12, 4), (12, 6), (10, 3), (8, 3), (5, 4), (97, 61), (7, 7), (9, 1), (4096, 3000)]
)
def test_uniform_positions_are_those_of_weight_selection(old, new):
    spaced = torch.linspace(0, old - 1, new, dtype=torch.float64).round().long()
    expected = torch.arange(new) * (old // new) if old % new == 0 else spaced

    assert uniform(old, new) == tuple(expected.tolist())


def test_uniform_positions_ascend_whatever_the_sizes():
    for old in range(1, 60):
        for new in range(1, old + 1):
            found = uniform(old, new)
            assert len(set(found)) == len(found) == new
            assert list(found) == sorted(found)
            assert 0 <= found[0] <= found[-1] < old


@pytest.mark.parametrize("new", [0, 6, -1])
def test_more_positions_than_there_are_cannot_be_kept(new):
    with pytest.raises(PlanError, match=f"cannot keep {new} of 5 positions"):
        uniform(5, new)
