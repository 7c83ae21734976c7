"""A wider model computes what the original computes, says its sizes, and has new weights that can learn."""

import json
import re
from dataclasses import replace

import pytest
import toys
from later import LATER

import surgeon
from surgeon.anatomy.axes import Places, axes_of, places
from surgeon.errors import PlanError
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.axis_maps import AxisMap
from surgeon.transforms.widen import widen
from surgeon.transforms.widths import plan_widths

if LATER:
    import torch
    from exact64 import (
        CLOSE,
        EXACT,
        Exact64,
        build64,
        difference,
        load64,
        logits,
        logits32,
        logits64,
        original32,
        original64,
    )
    from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

# Families whose heads are a choice of their own; 8 heads of 10 dims, 2 key-value heads, MLPs of 52.
FREE = (
    *("llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("phi3-partial-rotary", "olmo2", "smollm3", "granite", "cohere2", "mixtral", "qwen3_moe"),
    *("qwen3_moe-sparse-step", "gpt_oss"),
)
# Families whose heads follow from the hidden size: 80 = 8 x 10.
DERIVED = ("gpt2", "gpt_neox", "gpt_neox-serial", "opt", "opt-post-norm")

HIDDEN = {
    "hidden 2x cloned": {"hidden_size": 2.0},
    "hidden 3x cloned": {"hidden_size": 3.0},
    "hidden 1.25x padded": {"hidden_size": 1.25},
    "hidden 1.5x padded": {"hidden_size": 1.5},
    "hidden 2x padded": {"hidden_size": 2.0, "width_method": "pad"},
}
FFN = {"ffn appended": {"intermediate_size": 71}, "ffn 2x": {"intermediate_size": "2x"}}
HEADS = {
    "heads 2x": {"attention_heads": "2x"},
    "heads appended": {"attention_heads": 12},
    "key-value heads split": {"key_value_heads": "2x"},
    "more heads a group": {"attention_heads": "2x", "key_value_heads": 2},
    "heads appended in their group": {"attention_heads": 12, "key_value_heads": 2},
    "groups and heads a group": {"attention_heads": "4x", "key_value_heads": "2x"},
    "head_dim 2x": {"head_dim": "2x"},
}
ALL = {
    "all cloned": {
        "layers": 8,
        "hidden_size": 2.0,
        "intermediate_size": "2x",
        "attention_heads": "2x",
        "head_dim": "2x",
    },
    "all padded": {"layers": 8, "hidden_size": 1.5, "intermediate_size": 71, "attention_heads": 12, "head_dim": "3x"},
}
ALL_DERIVED = {
    "wider heads": {"hidden_size": 2.0, "head_dim": "2x"},
    "all cloned": {"layers": 8, "hidden_size": 4.0, "intermediate_size": "2x", "head_dim": "2x"},
    "all padded": {
        "layers": 8,
        "hidden_size": 3.0,
        "intermediate_size": 71,
        "attention_heads": 12,
        "head_dim": "2x",
    },
}
REFUSED = {
    **{("olmo2", op): "must be copies" for op in ("heads appended", "heads appended in their group", "all padded")},
    **{("qwen3_moe", op): "no tensor .* intermediate size" for op in (*FFN, *ALL)},
    **{("gpt_oss", op): "rope type 'yarn'" for op in ("head_dim 2x", *ALL)},
    **{("opt-post-norm", op): "cannot be padded" for op in HIDDEN if "padded" in op},
    **{("opt-post-norm", op): "normalises after the sum" for op in ALL},
}
CASES = [(name, op) for name in FREE for op in HIDDEN | FFN | HEADS | ALL]
CASES += [(name, op) for name in DERIVED for op in HIDDEN | FFN | ALL_DERIVED]
OPERATIONS = HIDDEN | FFN | HEADS | ALL


def sizes_of(directory, name, operation):
    """Return the arguments of an operation; a hidden size in it is a factor."""
    options = dict((OPERATIONS | ALL_DERIVED if name in DERIVED else OPERATIONS)[operation])
    if "hidden_size" in options:
        options["hidden_size"] = int(options["hidden_size"] * open_model(directory).anatomy.sizes["hidden"])
    return options


def grown(directory, out, **options):
    """Return `out`, now holding the model of `directory`, grown."""
    surgeon.grow(directory, **options).save(out)
    return out


def weights(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(("name", "operation"), [case for case in CASES if case not in REFUSED])
def test_a_wider_model_computes_what_the_original_computes(name, operation, toy64, tmp_path):
    source = toy64(name)

    surgery = surgeon.grow(source, **sizes_of(source, name, operation))
    surgery.save(tmp_path / "wide")

    assert surgery.plan.all_notes == ()
    assert difference(logits64(tmp_path / "wide"), original64(source)) <= EXACT
    expected = original32(source)
    assert difference(logits32(tmp_path / "wide"), expected) <= CLOSE * expected.abs().max()


@pytest.mark.parametrize(("name", "operation"), REFUSED)
def test_what_a_family_cannot_express_is_refused(name, operation, toy64):
    with pytest.raises(PlanError, match=REFUSED[name, operation]) as caught:
        surgeon.grow(toy64(name), **sizes_of(toy64(name), name, operation))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        ("llama", {"hidden_size": 100}, "100 is no multiple of 8", "--hidden-size 104"),
        ("gemma2", {"hidden_size": 100}, "100 is no multiple of 8", "--hidden-size 104"),
        ("gemma3_text", {"attention_heads": 10}, "96 is no multiple of 10", "--hidden-size 100"),
        ("gpt2", {"hidden_size": 85}, "derives a head's size .* 85 is not 8 x 10", "10 a head"),
        ("gpt2", {"attention_heads": 12}, "80 is not 12 x 10", "--hidden-size 120"),
        ("gpt_neox", {"head_dim": 20}, "80 is not 8 x 20", "--hidden-size 160"),
        ("opt", {"hidden_size": 160, "head_dim": 12}, "160 is not 8 x 12", "12 a head"),
        ("opt", {"hidden_size": 160, "attention_heads": 16, "key_value_heads": 8}, "its own keys", "Leave out"),
        ("gpt_neox", {"hidden_size": 160, "attention_heads": 16, "key_value_heads": 8}, "its own keys", "Leave out"),
        ("llama", {"head_dim": 15}, "rotary head of 10 dims cannot grow to 15", "--head-dim 20"),
        ("qwen3", {"head_dim": 25}, "rotary head of 10 dims cannot grow to 25", "--head-dim 20"),
        ("llama", {"attention_heads": 9}, "9 attention heads cannot share 2", "key-value heads: 10"),
        ("llama", {"key_value_heads": 3}, "8 attention heads cannot share 3", "key-value heads: 9"),
        ("mistral", {"attention_heads": 15, "key_value_heads": 3}, "2 groups of 4 .* 3 groups of 5", "Keep 4 heads"),
        ("llama", {"hidden_size": 48}, "cannot grow hidden from 96 to 48", "larger"),
        ("llama", {"intermediate_size": 51}, "cannot grow ffn from 52 to 51", "larger"),
        ("llama", {"attention_heads": 4}, "cannot grow heads from 8 to 4", "larger"),
        ("llama", {"hidden_size": 144, "width_method": "clone"}, "144 is no multiple of 96", "pad"),
        ("llama", {"intermediate_size": 71, "width_method": "clone"}, "71 is no multiple of 52", "pad"),
        ("llama", {"hidden_size": 192, "width_method": "magic"}, "unknown --width-method 'magic'", "zero-pad"),
        ("llama", {"hidden_size": 192, "noise": -0.1}, "noise -0.1 is not from 0 to 1", "0.5"),
        ("llama", {"hidden_size": 192, "noise": 1.1}, "noise 1.1 is not from 0 to 1", "0.5"),
        ("llama", {"hidden_size": 192, "noise": float("nan")}, "noise nan is not from 0 to 1", "0.5"),
        ("llama", {"hidden_size": 192, "noise": float("inf")}, "noise inf is not from 0 to 1", "0.5"),
        ("llama", {}, "nothing to grow", "--hidden-size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_fits(name, options, message, hint, toy64):
    with pytest.raises(PlanError, match=message) as caught:
        surgeon.grow(toy64(name), **options)
    assert hint in caught.value.hint


def test_a_model_without_a_table_is_not_widened(tmp_path):
    with pytest.raises(PlanError, match="'unheard_of' has no table"):
        surgeon.grow(toys.unheard_of("llama", tmp_path / "toy"), hidden_size="2x")


ROPE = {
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 5, "long_factor": [2.0] * 5, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", ROPE)
def test_a_head_whose_frequencies_hang_together_is_not_widened(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 10000.0} | ROPE[kind]
    build64("llama", tmp_path / "source", rope_parameters=rope, max_position_embeddings=16)

    with pytest.raises(PlanError, match=f"rope type '{kind}'"):
        surgeon.grow(tmp_path / "source", head_dim="2x")


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_a_head_of_which_another_share_would_turn_is_not_widened(name, tmp_path):
    """A quarter of 10 dims is 2, of 20 dims 5: the frequencies of 5 are not those of 4."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    build64(name, tmp_path / "source", rope_parameters=rope)

    with pytest.raises(PlanError, match="2 of 10 dims rotate, 5 of 20 would"):
        surgeon.grow(tmp_path / "source", hidden_size=160, head_dim=20)


def test_heads_that_are_not_scaled_are_not_widened_but_joined_by_more(tmp_path):
    source = build64("gpt2", tmp_path / "source", scale_attn_weights=False)

    with pytest.raises(PlanError, match="scale_attn_weights"):
        surgeon.grow(source, hidden_size="2x", head_dim="2x")
    assert difference(logits64(grown(source, tmp_path / "wide", hidden_size="2x")), logits64(source)) <= EXACT


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_heads_grow_under_a_scaling_that_looks_at_each_frequency_alone(kind, tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": kind, "rope_theta": 10000.0} | (scaling if kind == "llama3" else {"factor": 2.0})
    source = build64("llama", tmp_path / "source", rope_parameters=rope)

    assert difference(logits64(grown(source, tmp_path / "wide", head_dim="2x")), logits64(source)) <= EXACT


# --- what goes wrong, to show that the tests above would see it ----------------------------------------------------

WRONG = 1e-2  # of logits of order 1. The smallest found here is ten times that


def saved(model, widths, out):
    """Return the logits of `model` at these widths."""
    Surgery(model.source, widen(model.anatomy, widths)).save(out)
    return logits64(out)


def widths_of(model, **changes):
    names = ("hidden", "ffn", "heads", "kv_heads", "head_dim")
    return plan_widths(model.anatomy, **{name: model.anatomy.sizes[name] for name in names} | changes)


@pytest.mark.parametrize("method", ["zero-pad", "uneven"])
@pytest.mark.parametrize(
    ("name", "hidden"), [("llama", 120), ("qwen3", 60), ("gemma", 60), ("gpt2", 100), ("opt", 100)]
)
def test_methods_that_change_what_norms_see_say_that_they_are_approximate(name, hidden, method, toy64, tmp_path):
    surgery = surgeon.grow(toy64(name), hidden_size=hidden, width_method=method)
    surgery.save(tmp_path / "wide")

    assert [note.partition(":")[0] for note in surgery.plan.all_notes] == ["approximate"]
    assert difference(logits64(tmp_path / "wide"), original64(toy64(name))) > WRONG


def test_rows_from_the_next_layer_say_that_they_are_approximate(toy64, tmp_path):
    surgery = surgeon.grow(toy64("llama"), hidden_size="2x", intermediate_size=71, width_method="advanced")
    surgery.save(tmp_path / "wide")

    assert [note.partition(":")[0] for note in surgery.plan.all_notes] == ["approximate"]
    assert difference(logits64(tmp_path / "wide"), original64(toy64("llama"))) > WRONG


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_uneven_copies_that_come_out_even_are_exact(name, toy64, tmp_path):
    surgery = surgeon.grow(toy64(name), hidden_size="2x", intermediate_size=71, width_method="uneven")
    surgery.save(tmp_path / "wide")

    assert surgery.plan.all_notes == ()
    assert difference(logits64(tmp_path / "wide"), original64(toy64(name))) <= EXACT


@pytest.mark.parametrize(("name", "ratio"), [("llama-tied", 2), ("gemma", 2**0.5), ("gpt2", 2), ("opt", 2)])
def test_a_tied_head_without_its_factor_is_seen(name, ratio, toy64, tmp_path):
    model = open_model(toy64(name))
    sizes = model.anatomy.sizes
    heads = {"heads": 16, "kv_heads": 16} if name in DERIVED else {}
    widths = widths_of(model, hidden=2 * sizes["hidden"], **heads)

    found = saved(model, replace(widths, tied_factor=1.0), tmp_path / "wide")

    torch.testing.assert_close(found, ratio * original64(toy64(name)), rtol=1e-9, atol=EXACT)
    assert difference(found, original64(toy64(name))) > WRONG


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_new_positions_that_do_not_follow_the_mean_are_seen(name, toy64, tmp_path):
    model = open_model(toy64(name))
    widths = widths_of(model, hidden=100, heads=10, kv_heads=10)

    assert difference(saved(model, replace(widths, mean_fill=0.0), tmp_path / "wide"), original64(toy64(name))) > WRONG


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3-partial-rotary", "cohere2"])
def test_rotary_dims_laid_end_to_end_are_seen(name, toy64, tmp_path):
    model = open_model(toy64(name))
    widths = widths_of(model, head_dim=20)
    order = sorted(range(20), key=lambda j: (widths.maps["q_dim"].index[j] < 0, widths.maps["q_dim"].index[j]))
    appended = {
        axis: replace(
            found, **{key: tuple(getattr(found, key)[j] for j in order) for key in ("index", "write", "read")}
        )
        for axis in ("q_dim", "k_dim")
        for found in [widths.maps[axis]]
    }

    wrong = replace(widths, maps={**widths.maps, **appended})

    assert appended["q_dim"].index[:10] == tuple(range(10))
    assert difference(saved(model, wrong, tmp_path / "wide"), original64(toy64(name))) > WRONG


def test_key_value_heads_laid_end_to_end_instead_of_side_by_side_are_seen(toy64, tmp_path):
    model = open_model(toy64("llama"))
    widths = widths_of(model, kv_heads=4)
    assert widths.maps["kv_heads"].index == (0, 0, 1, 1)

    tiled = AxisMap((0, 1, 0, 1), (1.0,) * 4, (1.0,) * 4, zeroed=True)
    found = saved(model, replace(widths, maps={"kv_heads": tiled}), tmp_path / "wide")

    assert difference(found, original64(toy64("llama"))) > WRONG


def test_stock_norms_in_float32_would_hide_what_float64_shows(toy64, tmp_path):
    """Why the tests compute norms in float64: without it, a model grown exactly differs by more than they allow."""
    wide = grown(toy64("llama"), tmp_path / "wide", hidden_size="3x")

    assert difference(logits(load64(wide)), logits(load64(toy64("llama")))) > EXACT


# --- noise ---------------------------------------------------------------------------------------------------------

CLONED = {
    "llama": {"hidden_size": "2x", "intermediate_size": "2x", "attention_heads": "2x"},
    "qwen3": {"hidden_size": "3x", "intermediate_size": "3x", "attention_heads": "3x"},
    "phi3": {"hidden_size": "2x", "intermediate_size": "2x", "attention_heads": "2x"},
    "gemma3_text": {"hidden_size": "2x", "intermediate_size": "2x", "attention_heads": "2x"},
    "mixtral": {"hidden_size": "2x", "intermediate_size": "2x", "attention_heads": "2x"},
    "gpt_oss": {"hidden_size": "2x", "intermediate_size": "2x", "attention_heads": "2x"},
    "gpt2": {"hidden_size": "2x", "intermediate_size": "2x"},
    "gpt_neox": {"hidden_size": "2x", "intermediate_size": "2x"},
    "opt": {"hidden_size": "2x", "intermediate_size": "2x"},
}


def consumers(directory):
    """Yield the name of each tensor that reads a wide axis, with the positions that it reads as rows."""
    anatomy = open_model(directory).anatomy
    for name, value in weights(directory).items():
        kind = anatomy.row(name)[0].kind
        if kind in ("linear", "head", "conv1d"):
            yield name, value.movedim(-2 if kind == "conv1d" else -1, 0).flatten(1)


@pytest.mark.parametrize("name", CLONED)
def test_with_noise_no_two_copies_are_read_alike_and_without_it_all_are(name, toy64, tmp_path):
    noisy = grown(toy64(name), tmp_path / "noisy", **CLONED[name])
    plain = grown(toy64(name), tmp_path / "plain", noise=0, **CLONED[name])

    narrow = dict(consumers(toy64(name)))
    for tensor, positions in consumers(noisy):
        assert len(torch.unique(positions, dim=0)) == len(positions) > len(narrow[tensor]), tensor
    for tensor, positions in consumers(plain):
        assert len(torch.unique(positions, dim=0)) == len(narrow[tensor]), tensor
    assert difference(logits64(plain), logits64(noisy)) <= EXACT


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_noise_gives_the_mlp_a_higher_rank(name, toy64, tmp_path):
    down = {
        "llama": "model.layers.0.mlp.down_proj.weight",
        "gpt2": "transformer.h.0.mlp.c_proj.weight",
        "opt": "model.decoder.layers.0.fc2.weight",
    }[name]

    def rank(directory):
        return torch.linalg.matrix_rank(weights(directory)[down]).item()

    noisy = grown(toy64(name), tmp_path / "noisy", **CLONED[name])
    plain = grown(toy64(name), tmp_path / "plain", noise=0, **CLONED[name])

    assert rank(toy64(name)) == rank(plain) == 52
    assert rank(noisy) == 104


@pytest.mark.parametrize("noise", [0.01, 1])
def test_the_least_and_the_most_noise_keep_the_function(noise, tmp_path):
    """On 24 layers: above 1 the rounding of copies would grow with every one (at 3 to 2e-4, in float64)."""
    source = build64("llama", tmp_path / "source", num_hidden_layers=24)

    wide = grown(source, tmp_path / "wide", noise=noise, **CLONED["llama"])

    assert difference(logits64(wide), logits64(source)) <= EXACT
    expected = logits32(source)
    assert difference(logits32(wide), expected) <= CLOSE * expected.abs().max()


def test_noise_is_as_large_as_was_asked(toy64, tmp_path):
    """On a new quiet position it is uniform, `noise` times as wide as the weights that it stands beside."""
    wide = grown(toy64("llama"), tmp_path / "wide", hidden_size=144, noise=0.25)

    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.5.self_attn.q_proj.weight", "lm_head.weight"):
        expected = 0.25 * weights(toy64("llama"))[name].std().item()
        found = weights(wide)[name][:, 96:].std().item()
        assert found == pytest.approx(expected, rel=0.06)  # six standard errors of 2,500 uniform draws, 0.9% each


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(toy64, tmp_path):
    options = {"layers": 8, "hidden_size": 144, "intermediate_size": "2x", "attention_heads": 12, "head_dim": "2x"}
    first, again, other = (
        grown(toy64("llama"), tmp_path / str(number), seed=seed, **options) / "model.safetensors"
        for number, seed in enumerate((7, 7, 8))
    )

    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


# --- trainability --------------------------------------------------------------------------------------------------

# Operations by the axes that they widen, on families of each kind of norm.
LEARNING = [
    *(("llama", op) for op in (*HIDDEN, *FFN, *HEADS)),
    *((name, op) for name in ("qwen3", "olmo2", "gemma3_text") for op in ("hidden 1.5x padded", "head_dim 2x")),
    *(("gpt_oss", op) for op in ("hidden 1.5x padded", "ffn appended", "heads appended")),
    *((name, op) for name in ("gpt2", "gpt_neox", "opt") for op in ("hidden 1.5x padded", "wider heads")),
    *((name, op) for name in ("gpt2", "gpt_neox") for op in FFN),  # of OPT's ReLUs some never fire on so little text
]
SAME = {"embed": "hidden", "k_dim": "q_dim"}  # the residual stream under its other name; dims of a head that meet


def gradients(directory):
    """Return the gradient of the mean loss on random text, by the name of the stored tensor."""
    model = load64(directory)
    tokens = toys.inputs(model, length=40)["input_ids"]
    with Exact64():
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def dead_positions(source, surgery, directory):
    """Return the (axis, layer) with new positions that no gradient reaches: neither what writes them nor what reads
    them would ever move. The residual stream is one for all layers.
    """
    anatomy, reached = open_model(source).anatomy, {}
    for name, gradient in gradients(directory).items():
        if name not in anatomy.spec.tensors:
            assert name == "lm_head.weight", name  # tied
            continue
        row, _ = anatomy.row(name)
        if row.kind not in ("linear", "conv1d", "embedding", "head"):
            continue
        place = anatomy.stacks[0].locate(name)
        for axis, index in surgery.plan.axes.items():
            layer = place[0] if place and SAME.get(axis, axis) != "hidden" else None
            for dim, axes in enumerate(row.axes):
                if axis in axes_of(axes):
                    found = reached.setdefault((SAME.get(axis, axis), layer), torch.tensor(is_old(index)))
                    moved = gradient.movedim(dim, 0).flatten(1).any(1)
                    found.index_put_((positions(axes, axis, surgery.anatomy.sizes),), moved, accumulate=True)
    return {key for key, found in reached.items() if not found.all()}


def is_old(index):
    """Return of each position of a widened axis whether it was there before: no copy of an earlier one, and not new."""
    return [i >= 0 and i not in index[:j] for j, i in enumerate(index)]


def positions(axes, axis, sizes):
    """Return, for each position of a dimension, its position on `axis`."""

    def numbers(name, block):
        return Places(tuple(range(sizes[name])), tuple(map(float, range(sizes[name])))) if name == axis else None

    return torch.tensor(places(axes, sizes, numbers).scale).long()


@pytest.mark.parametrize(("name", "operation"), LEARNING)
def test_every_new_position_can_learn(name, operation, toy64, tmp_path):
    surgery = surgeon.grow(toy64(name), **sizes_of(toy64(name), name, operation))
    surgery.save(tmp_path / "wide")

    assert dead_positions(toy64(name), surgery, tmp_path / "wide") == set()


def test_padding_without_noise_is_dead(toy64, tmp_path):
    """Why noise is the default: nothing is written to the new positions and nothing reads them, now and forever."""
    surgery = surgeon.grow(toy64("llama"), hidden_size=144, noise=0)
    surgery.save(tmp_path / "wide")

    assert dead_positions(toy64("llama"), surgery, tmp_path / "wide") == {("hidden", None)}
    found = gradients(tmp_path / "wide")
    assert not found["model.embed_tokens.weight"][:, 96:].any()
    assert not found["model.layers.0.mlp.down_proj.weight"][96:].any()
    assert not found["model.layers.0.mlp.up_proj.weight"][:, 96:].any()


# --- what is written beside the weights ----------------------------------------------------------------------------


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "operation", "expected"),
    [
        (
            "llama",
            "all padded",
            {
                "hidden_size": 144,
                "intermediate_size": 71,
                "num_attention_heads": 12,
                "num_key_value_heads": 3,
                "head_dim": 30,
                "num_hidden_layers": 8,
            },
        ),
        ("qwen2", "hidden 2x cloned", {"hidden_size": 160, "head_dim": 10, "num_attention_heads": 8}),
        ("phi3", "heads 2x", {"hidden_size": 80, "head_dim": 10, "num_attention_heads": 16, "num_key_value_heads": 4}),
        ("gpt2", "hidden 2x cloned", {"n_embd": 160, "n_head": 16, "n_inner": 52, "n_layer": 6}),
        ("gpt_neox", "hidden 1.25x padded", {"hidden_size": 100, "num_attention_heads": 10, "intermediate_size": 52}),
        (
            "opt",
            "hidden 2x cloned",
            {"hidden_size": 160, "word_embed_proj_dim": 160, "num_attention_heads": 16, "ffn_dim": 52},
        ),
        (
            "opt-post-norm",
            "hidden 2x cloned",
            {"hidden_size": 160, "word_embed_proj_dim": 44, "num_attention_heads": 16},
        ),
        ("gemma2", "head_dim 2x", {"head_dim": 20, "query_pre_attn_scalar": 13}),
    ],
)
def test_the_config_says_the_new_sizes_and_keeps_the_rest(name, operation, expected, toy64, tmp_path):
    source = toy64(name)

    config = config_of(grown(source, tmp_path / "wide", **sizes_of(source, name, operation)))

    assert {key: config[key] for key in expected} == expected
    layers = {"num_hidden_layers", "layer_types"} if "all" in operation else set()
    unchanged = config_of(source).keys() - expected.keys() - layers
    assert {key: config[key] for key in unchanged} == {key: config_of(source)[key] for key in unchanged}
    assert config.keys() - config_of(source).keys() <= {"head_dim"}


def test_a_size_that_the_code_derives_is_written_out(tmp_path):
    """GPT-2 without n_inner takes 4 times the hidden size, which is not what it was any more."""
    source = build64("gpt2", tmp_path / "source", n_inner=None)

    wide = grown(source, tmp_path / "wide", hidden_size="2x")

    assert config_of(wide)["n_inner"] == 320
    assert difference(logits64(wide), logits64(source)) <= EXACT


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "gpt2", "opt", "cohere2"])
def test_a_tied_head_stays_tied(name, toy64, tmp_path):
    wide = grown(toy64(name), tmp_path / "wide", hidden_size="2x")

    assert not [tensor for tensor in weights(wide) if re.search("lm_head|embed_out", tensor)]
    model = load64(wide)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_untied_head_stays_its_own(toy64, tmp_path):
    model = load64(grown(toy64("llama"), tmp_path / "wide", hidden_size="2x"))

    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("llama", {"hidden_size": "2x"}, {"hidden": [[0, 96], [0, 96]]}),
        ("llama", {"hidden_size": 120}, {"hidden": [[0, 96], [-1, 24]]}),
        ("llama", {"intermediate_size": 71}, {"ffn": [[0, 52], [-1, 19]]}),
        ("llama", {"attention_heads": 12}, {"kv_heads": [[0, 2], [-1, 1]]}),
        ("llama", {"attention_heads": 12, "key_value_heads": 2}, {"group": [[0, 4], [-1, 2]]}),
        ("llama", {"key_value_heads": 4}, {"kv_heads": [[0, 1], [0, 2], [1, 1]]}),
        ("opt", {"hidden_size": 100}, {"hidden": [[0, 80], [-1, 20]], "embed": [[0, 80], [-1, 20]]}),
    ],
)
def test_the_receipt_says_where_every_position_comes_from(name, options, expected, toy64, tmp_path):
    wide = grown(toy64(name), tmp_path / "wide", **options)

    maps = json.loads((wide / "surgeon.json").read_text())["axis_maps"]
    heads = {"kv_heads": [[0, 8], [-1, 2]]} if name == "opt" else {}
    assert maps == expected | heads


def test_the_receipt_says_where_the_dims_of_a_wider_head_come_from(toy64, tmp_path):
    wide = grown(toy64("phi3-partial-rotary"), tmp_path / "wide", head_dim="2x")

    maps = json.loads((wide / "surgeon.json").read_text())["axis_maps"]
    spread = [[0, 1], [-1, 1], [1, 1], [-1, 1], [2, 1], [-1, 1], [3, 1], [-1, 1], [4, 6], [-1, 6]]
    assert maps == {"q_dim": spread, "k_dim": spread, "v_dim": [[0, 10], [-1, 10]]}
