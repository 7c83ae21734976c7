"""Measures of attention maps: those of known patterns, those of transformers' own maps, and what is refused."""

from __future__ import annotations

import json
import weakref
from typing import Any

import every_type
import pytest
import toys
from later import LATER

from surgeon.errors import MeasureError
from surgeon.surgery import open_source

if LATER:
    import torch
    from safetensors.torch import load_file, save_file
    from streamed import mean_loss, plain, stream, tokens
    from torch import Tensor
    from transformers.models.llama import modeling_llama

    from surgeon.measure.attention import MEASURES, AttentionMaps, calibration, measures_of
    from surgeon.measure.diagnosis import check_maps, measure
    from surgeon.models.maps import MAPS, has_attention
    from surgeon.models.varlen import attending_by

pytestmark = pytest.mark.usefixtures("one_thread")

# arXiv 2404.08634's measures of maps of 100 x 100, computed by a script of its own in float64.
PATTERNS = {
    "all on token 0": (1, 1.00, 1, 1.00),
    "90 % token 0, 10 % self": (1, 1.01, 1, 0.99),
    "80 % token 0, 20 % self": (1, 1.06, 1, 0.94),
    "50 % token 0, 50 % self": (79, 1.94, 80, 0.51),
    "uniform causal": (5, 1.95, 30, 0.32),
    "uniform, not causal": (1, 1.00, 90, 0.01),
    "local window of 8": (20, 7.34, 86, 0.11),
    "previous token": (89, 50.0, 89, 0.02),
    "self": (90, 100.0, 90, 0.01),
}
# Soft caps, sinks in the softmax, groups of heads, windows, rotary parts, latent attention, scales of a layer.
SEEN = (
    *("llama", "gpt2", "gpt2-inverse-layer-idx", "gpt_neox", "opt-post-norm", "qwen2", "gemma2", "gemma3_text"),
    *("gpt_oss", "phi3-partial-rotary", "olmo2", "cohere2", "granite", "stablelm-parallel", "deepseek_v3", "mixtral"),
)
OWN_CODE = ("bloom", "falcon", "falcon-new-decoder", "gpt_neo", "gptj", "codegen", "mpt")
# Of the largest logit, for both attentions are float32 and add in another order: 2e-6 was the most on any toy.
CLOSE = 1e-5


def look(directory: Any, ids: Tensor, energy: float = 0.9, skip_rows: int = 0) -> Any:
    return measure(open_source(str(directory)), ids, energy=energy, skip_rows=skip_rows, device="cpu")


def eager_maps(directory: Any, ids: Tensor) -> list[Tensor]:
    """Return the maps of each layer that transformers itself returns, shape (B, H, T, T)."""
    model = plain(directory, attn_implementation="eager")
    with torch.no_grad():
        return list(model(ids, use_cache=False, output_attentions=True).attentions)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_patterns_have_the_published_measures(pattern):
    figures = calibration(100, 0.9)[pattern]

    rank, stable, mass, top = PATTERNS[pattern]
    assert (figures["rank"], figures["column_mass"]) == (rank, mass)
    assert figures["stable_rank"] == pytest.approx(stable, abs=0.005)  # printed with two digits
    assert figures["top_column"] == pytest.approx(top, abs=0.005)


def test_equal_weights_have_another_rank_at_each_length():
    found = [calibration(length, 0.9)["uniform causal"] for length in (32, 100, 256, 1024)]

    assert [one["rank"] for one in found] == [4, 5, 6, 7]
    assert [one["column_mass"] for one in found] == [12, 30, 67, 221]


@pytest.mark.parametrize("length", [2, 3, 9])
def test_patterns_have_finite_measures_at_small_lengths(length):
    found = calibration(length, 0.9)

    assert all(torch.tensor(list(figures.values())).isfinite().all() for figures in found.values())
    assert found["self"]["rank"] == -(-9 * length // 10)  # 90 % of equal directions, rounded up


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9, 0.95])
def test_ranks_are_those_of_singular_values_in_float64(energy):
    logits = 3 * torch.randn(40, 30, 30, generator=torch.Generator().manual_seed(0))
    maps = logits.masked_fill(torch.ones(30, 30).triu(1) > 0, -torch.inf).softmax(-1)

    found = measures_of(maps, energy)

    for map_, figures in zip(maps.double(), found, strict=True):
        squares = torch.linalg.svdvals(map_).square()
        rest = torch.linalg.svdvals(map_[:, 1:]).square()
        columns = map_.square().sum(0).sort(descending=True).values
        one = dict(zip(MEASURES, figures.tolist(), strict=True))
        least = [int((part.cumsum(0) < energy * part.sum()).sum()) + 1 for part in (squares, columns, rest)]
        assert [one["rank"], one["column_mass"], one["rank_without_sink"]] == least
        assert one["stable_rank"] == pytest.approx(float(squares.sum() / squares[0]), rel=1e-5)  # float32 eigenvalues
        assert one["sink"] == pytest.approx(float(map_[:, 0].mean()), rel=1e-6)


def test_a_matrix_on_which_float32_gives_up_has_a_rank():
    map_ = torch.zeros(100, 100)
    map_[:, 0] = 1
    map_[range(1, 100), range(1, 100)] = torch.logspace(-45, -1, 99)  # far below what float32 tells from 0

    figures = dict(zip(MEASURES, measures_of(map_, 0.9).tolist(), strict=True))

    assert figures["rank"] == 1
    assert figures["rank_without_sink"] >= 1


@pytest.mark.parametrize("name", SEEN + OWN_CODE)
def test_the_measures_are_those_of_the_maps_that_transformers_returns(name, toy):
    ids = tokens(3, 20)

    found = look(toy(name), ids).maps

    expected = eager_maps(toy(name), ids)
    assert len(found) == len(expected) == 6
    for maps, own in zip(found, expected, strict=True):
        assert maps.shape == (3, own.shape[1], len(MEASURES))
        torch.testing.assert_close(maps, measures_of(own, 0.9), rtol=1e-4, atol=1e-5)  # states of float32 before it


@pytest.mark.parametrize("name", SEEN + OWN_CODE)
def test_logits_stay_those_of_the_model_while_its_maps_are_seen(name, toy):
    ids, model = tokens(2, 20), stream(toy(name))

    check_maps(model, ids, 0.9)

    with torch.no_grad():
        batches = model.start(ids)
        with attending_by(model.whole, MAPS):
            probed = model.start(ids)
            model.run(probed)
        model.run(batches)
        with model.finish([*batches, *probed]) as head:
            one, other = head(batches[0].hidden), head(probed[0].hidden)
        own = plain(toy(name))(ids, use_cache=False).logits
    for logits in (one, other):
        assert float((logits - own).abs().max()) <= CLOSE * float(own.abs().max())


def test_a_layer_divides_its_scores_by_its_number_where_the_model_does(toy):
    with_scale, without = (look(toy(name), tokens(2, 20)).maps for name in ("gpt2-inverse-layer-idx", "gpt2"))

    entropy = list(MEASURES).index("entropy")
    assert torch.equal(with_scale[0], without[0])  # layer 0 divides by 1
    assert float(with_scale[5][..., entropy].mean()) > float(without[5][..., entropy].mean())  # by 6: nearly uniform


@pytest.mark.parametrize("model_type", ["openai-gpt", "rwkv"])
def test_attention_that_shows_no_maps_is_refused(model_type, tmp_path):
    every_type.build(model_type, tmp_path / "toy")

    with pytest.raises(MeasureError, match="layer 0 of .* computes attention by code of its own"):
        look(tmp_path / "toy", tokens(2, 20))


def test_a_family_that_computes_something_else_where_it_returns_maps_is_refused(toy):
    with pytest.raises(MeasureError, match="logits of .* differ by"):  # ALiBi is not scaled as in its usual attention
        look(toy("falcon-alibi"), tokens(2, 20))


@pytest.mark.parametrize("name", ["bloom", "gpt_neo"])
def test_attention_that_is_no_part_of_its_own_has_no_loss_without_it(name, toy):
    losses = look(toy(name), tokens(2, 20), skip_rows=2).losses

    assert losses.attention == [None] * 6
    assert all(sum(rows) != pytest.approx(sum(losses.whole), abs=1e-3) for rows in losses.layer)


def test_a_model_without_attention_is_refused(tmp_path):
    sizes = toys.TOKENS | {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96, "state_size": 8}
    toys.save("mamba", sizes, tmp_path)

    with pytest.raises(MeasureError, match="has no attention"):
        look(tmp_path, tokens(2, 20))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_do_not_write_from_left_to_right_are_refused(name, toy):
    with pytest.raises(MeasureError, match="a token sees those after it|an encoder and a decoder"):
        look(toy(name), tokens(2, 20))


def test_layers_without_attention_have_no_maps(toy):
    found = look(toy("lfm2"), tokens(2, 20), skip_rows=2)

    assert [maps is None for maps in found.maps] == [True, True, False, True, True, False]
    assert [losses is None for losses in found.losses.attention] == [True, True, False, True, True, False]
    assert all(len(losses) == 2 for losses in found.losses.layer)
    model = plain(toy("lfm2"))
    assert [has_attention(layer) for layer in toys.stacks(model)[0]] == [False, False, True, False, False, True]


def test_linear_attention_has_no_maps_and_does_not_hide_those_beside_it(tmp_path):
    every_type.build("qwen3_next", tmp_path / "toy")

    found = look(tmp_path / "toy", tokens(2, 20), skip_rows=2)

    kinds = json.loads((tmp_path / "toy/config.json").read_text())["layer_types"]
    assert [maps is None for maps in found.maps] == [kind == "linear_attention" for kind in kinds]
    assert {"linear_attention", "full_attention"} == set(kinds)


def test_a_family_whose_eager_maps_leave_out_its_sinks_is_refused(tmp_path):
    every_type.build("granite_swa", tmp_path / "toy")

    with pytest.raises(MeasureError, match="not those that its output was computed with"):
        look(tmp_path / "toy", tokens(2, 20))


def test_layers_that_hand_more_on_than_states_are_diagnosed_without_losses(tmp_path):
    every_type.build("zaya", tmp_path / "toy")

    with pytest.raises(MeasureError, match="takes 'prev_router_hidden_states'") as refused:
        look(tmp_path / "toy", tokens(2, 20), skip_rows=1)
    assert "--skip-samples 0" in str(refused.value.hint)
    assert any(maps is not None for maps in look(tmp_path / "toy", tokens(2, 20)).maps)


def test_maps_that_are_not_those_used_are_refused(toy, monkeypatch):
    own = modeling_llama.eager_attention_forward

    def another(*args: Any, **more: Any) -> Any:
        output, maps = own(*args, **more)
        return output, maps.flip(1)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", another)
    with pytest.raises(MeasureError, match="not those that its output was computed with"):
        look(toy("llama"), tokens(2, 20))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    toys.build("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(MeasureError, match="LlamaAttention computes numbers that are not finite"):
        look(tmp_path, tokens(2, 20))


def test_logits_that_differ_are_refused(toy, monkeypatch):
    own = modeling_llama.eager_attention_forward

    def warmer(module: Any, query: Tensor, *args: Any, **more: Any) -> Any:
        return own(module, 0.9 * query, *args, **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", warmer)
    with pytest.raises(MeasureError, match="logits of .* differ by"):
        look(toy("llama"), tokens(2, 20))


def test_many_rows_in_several_batches_have_the_figures_of_each_row_alone(toy):
    ids = tokens(250, 10)

    together = look(toy("llama"), ids).maps

    for row in (0, 120, 249):
        alone = look(toy("llama"), ids[row : row + 1]).maps
        for maps, one in zip(together, alone, strict=True):
            torch.testing.assert_close(maps[row : row + 1], one, rtol=1e-4, atol=1e-5)  # products of other sizes


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 1}, {"num_attention_heads": 1, "num_key_value_heads": 1}])
def test_one_layer_and_one_head_are_enough(sizes, tmp_path):
    toys.build("llama", tmp_path, **sizes)

    found = look(tmp_path, tokens(2, 20), skip_rows=1)

    layers, heads = sizes.get("num_hidden_layers", 6), sizes.get("num_attention_heads", 8)
    assert [tuple(maps.shape) for maps in found.maps] == [(2, heads, len(MEASURES))] * layers
    assert len(found.losses.layer) == len(found.losses.attention) == layers


def test_the_maps_of_a_layer_are_freed_before_the_next_one_is_made(toy, monkeypatch):
    alive: list[int] = []
    own = AttentionMaps._look
    seen: list[Any] = []

    def watched(self: Any, layer: int, module: Any, attention: Any, maps: Tensor) -> None:
        own(self, layer, module, attention, maps)
        seen.append(weakref.ref(maps))
        alive.append(sum(one() is not None for one in seen))

    monkeypatch.setattr(AttentionMaps, "_look", watched)
    look(toy("llama"), tokens(2, 20))

    assert len(alive) == 12  # six layers while it is checked, and six to measure
    assert max(alive) == 1


OUTPUTS = {
    "llama": "self_attn.o_proj",
    "llama-biases": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "gpt_neox-serial": "attention.dense",
    "opt": "self_attn.out_proj",
    "opt-post-norm": "self_attn.out_proj",
    "gemma2": "self_attn.o_proj",
    "olmo2": "self_attn.o_proj",
    "phi": "self_attn.dense",
    "granite": "self_attn.o_proj",
    "cohere2": "self_attn.o_proj",
    "deepseek_v3": "self_attn.o_proj",
    "gptj": "attn.out_proj",
    "codegen": "attn.out_proj",
    "falcon": "self_attention.dense",
    "mpt": "attn.out_proj",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_loss_without_attention_is_that_of_a_model_whose_attention_writes_zeros(name, toy):
    ids, model = tokens(3, 20), plain(toy(name))

    losses = look(toy(name), ids, skip_rows=3).losses

    size = sum(losses.sizes)
    found = [sum(losses.whole) / size, *(sum(rows) / size for rows in losses.attention)]
    with torch.no_grad():
        expected = [float(mean_loss(model(ids, use_cache=False).logits, ids))]
        for layer in toys.stacks(model)[0]:
            projection = layer.get_submodule(OUTPUTS[name])
            kept = [parameter.clone() for parameter in projection.parameters()]
            for parameter in projection.parameters():
                parameter.zero_()
            expected.append(float(mean_loss(model(ids, use_cache=False).logits, ids)))
            for parameter, numbers in zip(projection.parameters(), kept, strict=True):
                parameter.copy_(numbers)
    assert found == pytest.approx(expected, abs=1e-5)  # float32 losses of order 5
    assert len({round(loss, 4) for loss in found}) == 7  # no layer's attention is without effect
