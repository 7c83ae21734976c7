"""Any list of layers: the result computes exactly what the original computes with the other layers bypassed."""

from dataclasses import replace

import pytest
import toys
from later import LATER

import surgeon
from surgeon.errors import PlanError
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.layers import keep_layers, resolve_depth

if LATER:
    import torch
    from safetensors.torch import load_file


def kept(directory, layers) -> Surgery:
    model = open_model(directory)
    return Surgery(model.source, keep_layers(model.anatomy, layers))


@pytest.mark.parametrize("name", toys.TOYS)
def test_dropping_layers_from_the_middle_is_bypassing_them(name, toy, tmp_path):
    kept(toy(name), [1, 2, 5]).save(tmp_path / "cut")

    model, report = toys.load(tmp_path / "cut")
    reference, _ = toys.load(toy(name))
    assert not any(report.values()), report
    with toys.bypass(reference, [0, 3, 4]):
        expected = toys.logits(reference)
    if name == "gpt2-inverse-layer-idx":  # the queries are rescaled, which rounds: relative 2^-24 each
        torch.testing.assert_close(toys.logits(model), expected, rtol=0, atol=2e-5)
    else:
        assert torch.equal(toys.logits(model), expected)


@pytest.mark.parametrize("name", toys.TOYS)
def test_all_layers_in_their_order_are_the_same_file_content(name, toy, tmp_path):
    kept(toy(name), range(6)).save(tmp_path / "same")

    before, after = load_file(toy(name) / "model.safetensors"), load_file(tmp_path / "same/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert toys.load(tmp_path / "same")[0].config.to_dict() == toys.load(toy(name))[0].config.to_dict() | {
        "_name_or_path": str(tmp_path / "same")
    }


def test_queries_make_good_what_gpt2_derives_from_a_layers_place(toy, tmp_path):
    """With scale_attn_by_inverse_layer_idx, layer 5 in place 2 needs its queries times 3/6; nothing else changes."""
    kept(toy("gpt2-inverse-layer-idx"), [0, 1, 5]).save(tmp_path / "cut")

    before = load_file(toy("gpt2-inverse-layer-idx") / "model.safetensors")
    after = load_file(tmp_path / "cut/model.safetensors")
    for suffix in ("weight", "bias"):
        old, new = before[f"transformer.h.5.attn.c_attn.{suffix}"], after[f"transformer.h.2.attn.c_attn.{suffix}"]
        assert torch.equal(new[..., :80], old[..., :80] * 0.5)
        assert torch.equal(new[..., 80:], old[..., 80:])
    assert torch.equal(after["transformer.h.1.attn.c_attn.weight"], before["transformer.h.1.attn.c_attn.weight"])


def test_a_repeated_layer_is_stored_twice(toy, tmp_path):
    kept(toy("llama"), [0, 1, 1, 2]).save(tmp_path / "grown")

    after = load_file(tmp_path / "grown/model.safetensors")
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], after["model.layers.2.mlp.up_proj.weight"])
    assert not any(toys.load(tmp_path / "grown")[1].values())


@pytest.mark.parametrize("layers", [[1, 2], [1, 0], [0, 1, 0]])
def test_a_layer_that_is_special_by_its_place_stays_there_unless_a_table_says_why(layers, toy):
    anatomy = open_model(toy("t5")).anatomy

    with pytest.raises(PlanError, match=r"layer 0 of t5 differs from the others in '.*relative_attention_bias"):
        keep_layers(replace(anatomy, family=None), layers)
    assert (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in keep_layers(anatomy, layers).tensors
    )


def test_layers_that_do_not_exist_are_named(toy):
    with pytest.raises(PlanError, match=r"layers \[6, 9\] do not exist") as caught:
        kept(toy("llama"), [0, 9, 6])
    assert caught.value.hint == "This model has layers 0 to 5."
    with pytest.raises(PlanError, match="at least one layer"):
        kept(toy("llama"), [])


@pytest.mark.parametrize(
    ("request_", "depth", "expected"),
    [("12", 30, 12), (12, 30, 12), ("50%", 7, 4), ("75%", 30, 23), ("75%", 36, 27), ("0.5%", 400, 2), ("100%", 6, 6)],
)
def test_a_depth_is_a_number_or_a_percentage_rounded_half_up(request_, depth, expected):
    assert resolve_depth(request_, depth) == expected


@pytest.mark.parametrize("request_", ["", "six", "-3", "1.5", "%", "1e3", "٣", "50 %%", "nan%"])
def test_what_is_no_depth_is_refused(request_):
    with pytest.raises(PlanError, match="cannot read"):
        resolve_depth(request_, 6)


def test_an_encoder_decoder_of_unequal_depths_is_refused(tmp_path):
    toys.build("bart", tmp_path / "bart", decoder_layers=4)

    with pytest.raises(PlanError, match="encoder and decoder differ in depth"):
        surgeon.truncate(tmp_path / "bart", layers=2)
