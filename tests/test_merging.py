"""Experts that go are merged into those that stay: solved for what the layer put out, one layer in memory."""

import json

import pytest
import talkers
import toys
from later import LATER

from surgeon.errors import PlanError
from surgeon.surgery import open_model
from surgeon.transforms.merging import check_merges, expert_outputs
from surgeon.transforms.prune import prune, pruned_sizes

if LATER:
    import torch
    from safetensors.torch import load_file, save_file
    from streamed import padded

    from surgeon.measure.compensation import Rows
    from surgeon.measure.merging import merge_experts
    from surgeon.measure.repair import held_out
    from surgeon.models.streaming import StreamedModel
    from surgeon.plan.planned import PlannedSource

pytestmark = pytest.mark.usefixtures("one_thread")

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "qwen2_moe", "deepseek_v3")


def rows(count, length=24, seed=0):
    return torch.randint(3, 100, (count, length), generator=torch.Generator().manual_seed(seed))


def pair(directory, experts, *, criterion="uniform"):
    """Return a model, streamed, its cut to so many experts, streamed, and the plan of the cut."""
    begun = open_model(directory)
    plan = prune(begun.anatomy, sizes=pruned_sizes(begun.anatomy, {"experts": experts}), criterion=criterion)
    streams = (StreamedModel(each, dtype=torch.float32) for each in (begun.source, PlannedSource(begun.source, plan)))
    return *streams, plan


def merged(directory, experts, tokens, real=None):
    source, result, plan = pair(directory, experts)
    return list(merge_experts(source, result, Rows(tokens, held_out(len(tokens)), real), plan.mlp_layers))


@pytest.mark.parametrize("name", MIXTURES)
def test_merged_experts_bring_the_states_behind_each_layer_nearer_to_the_sources(name, toy):
    experts = 6 if name == "deepseek_v3" else 4
    found = merged(toy(name), experts, rows(48))

    assert [layer.layer for layer in found] == list(range(2 if name == "deepseek_v3" else 0, 6))
    anatomy = open_model(toy(name)).anatomy
    first = found[0]
    assert first.ridges
    assert first.fit[1] < first.fit[0]
    assert all(layer.held[1] <= layer.held[0] for layer in found)
    assert first.held[1] < 0.97 * first.held[0]
    is_stacked = expert_outputs(anatomy)[first.layer].is_stacked
    for key, tensor in first.tensors.items():
        own = anatomy.spec.tensors[key].shape
        assert tuple(tensor.shape) == ((experts, *own[1:]) if is_stacked else own)


@pytest.fixture
def alike(tmp_path):
    """Return a mixture whose experts share gate and up projections, and whose router gives all the same gate."""
    directory = toys.build("qwen3_moe", tmp_path / "alike", num_experts=4, num_experts_per_tok=2)
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name].zero_()
        for part in ("gate_proj", "up_proj"):
            if ".experts." in name and name.endswith(f"{part}.weight"):
                tensors[name] = tensors[name[: name.index("experts.")] + f"experts.0.{part}.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_what_is_linear_in_the_neurons_of_the_kept_experts_is_recovered(alike):
    """With equal gates a layer puts out W a for one W, whichever experts are taken: the kept ones can be that W."""
    found = merged(alike, 2, rows(64))

    assert max(layer.held[0] for layer in found) > 0.05
    assert max(layer.held[1] for layer in found) < 1e-5


def test_a_cut_that_changed_nothing_is_left_alone(toy):
    source, result, plan = pair(toy("mixtral"), 7)

    found = list(merge_experts(source, result, Rows(rows(16), held_out(16)), plan.mlp_layers))

    assert [(layer.ridges, layer.tensors, layer.held) for layer in found] == [({}, {}, (0.0, 0.0))] * 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_enters_the_sums(side, toy):
    tokens, lengths = rows(24, 14), [14 - i % 9 for i in range(24)]
    lengths[7] = lengths[15] = lengths[23] = 14
    padding, real = padded(tokens, lengths, left=side == "left")
    right, real_right = padded(tokens, lengths, left=False)

    found, expected = (
        merged(toy("qwen3_moe"), 4, padding, real=real),
        merged(toy("qwen3_moe"), 4, right, real=real_right),
    )

    for one, other in zip(found, expected, strict=True):
        assert one.ridges.keys() == other.ridges.keys()
        assert one.held == pytest.approx(other.held, rel=1e-3)  # rotary positions round otherwise
    ignored = merged(toy("qwen3_moe"), 4, right)
    assert ignored[0].held != pytest.approx(expected[0].held, rel=1e-2)


def test_one_layer_of_each_model_is_in_memory(toy):
    source, result, plan = pair(toy("mixtral"), 4)
    there = []

    def in_memory(model):
        return sum(not next(model.module(layer).parameters()).is_meta for layer in range(6))

    def note(_):
        there.append((in_memory(source), in_memory(result)))

    for layer in merge_experts(source, result, Rows(rows(16), held_out(16)), plan.mlp_layers, progress=note):
        note(layer)
    assert len(there) > 12
    assert set(there) == {(1, 0), (0, 1)}


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("mixtral", {"experts": 7}, "no expert goes"),
        ("mixtral", {"experts": 4, "hidden": 40}, "those of the result are narrower"),
    ],
)
def test_a_cut_without_experts_to_merge_is_refused(name, sizes, message, toy):
    anatomy = open_model(toy(name)).anatomy

    with pytest.raises(PlanError, match=message):
        check_merges(anatomy, pruned_sizes(anatomy, sizes))


def test_a_norm_between_the_experts_and_the_state_is_refused(tmp_path):
    import tabled

    anatomy = open_model(toys.save("flex_olmo", tabled.TYPES["flex_olmo"], tmp_path / "flex")).anatomy

    with pytest.raises(PlanError, match="a norm stands between the experts of flex_olmo"):
        check_merges(anatomy, pruned_sizes(anatomy, {"experts": 4}))


# --- the command ----------------------------------------------------------------------------------------------------

ROWS = ("--samples", 12, "--sequence-length", 16, "--experts", 4, "--merge-experts")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Return a mixture of experts with a tokenizer. Read-only."""
    return talkers.talker(tmp_path_factory.mktemp("talkers") / "mixture", "qwen3_moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return talkers.written(tmp_path_factory.mktemp("texts") / "text.txt", talkers.TEXT * 4)


def test_experts_are_merged_by_a_command_and_the_result_is_made_again_from_its_receipt(mixture, text, tmp_path, run):
    told = json.loads(run("prune", mixture, "--data", text, *ROWS, "-o", tmp_path / "merged", "--json").out)
    run("prune", mixture, "--scores-from", tmp_path / "merged", "--experts", 4, "-o", tmp_path / "dropped")

    model, report = toys.load(tmp_path / "merged")
    assert not any(report.values()), report
    assert model.config.num_experts == 4
    merged, dropped = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "dropped"))
    changed = {name for name in dropped if not torch.equal(merged[name], dropped[name])}
    assert changed
    assert all(".experts." in name and name.endswith("down_proj.weight") for name in changed)
    assert changed == set(load_file(tmp_path / "merged/repairs.safetensors"))
    maps = told["merging"]["maps"]
    assert sum(len(each["experts"]) for each in maps) == len(changed)
    assert all(each["held_out"][1] <= each["held_out"][0] for each in maps)
    receipt = json.loads((tmp_path / "merged/surgeon.json").read_text())
    assert receipt["steps"][0]["prune"]["merging"]["maps"] == maps
    card = (tmp_path / "merged/README.md").read_text()
    assert "never by multiple choice alone (arXiv:2510.13999)" in card
    assert "merged: 7 experts of each of 6 layers into 4" in card
    again = json.loads(run("run", tmp_path / "merged/surgeon.json", "--json").out)
    assert again["steps"][0]["result"]["same"] is True


def test_a_dry_run_solves_nothing_and_says_what_would_be(mixture, text, tmp_path, run):
    told = run("prune", mixture, "--data", text, *ROWS, "-o", tmp_path / "merged", "--dry-run")

    assert "the output maps of 4 experts in 6 layers would be solved" in told.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", 4, "--merge-experts"), "merges experts that go, and none do"),
        (("--experts", 4, "--merge-experts", "--compensate"), "merged or compensated, not both"),
        (("--experts", 7, "--merge-experts"), "no expert goes"),
    ],
)
def test_merging_without_experts_that_go_is_refused_before_anything_is_read(words, message, mixture, tmp_path, run):
    done = run("prune", mixture, *words, "-o", tmp_path / "merged")

    assert done.code in (1, 2)
    assert message in done.err
    assert list(tmp_path.iterdir()) == []
