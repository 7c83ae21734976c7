"""A dense model of one with experts: exact where gates are constant, by formula elsewhere, refused without its code."""

import json

import pytest
import tabled
import talkers
import toys
from later import LATER

import surgeon
from surgeon.errors import PlanError
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.dense import Mixture, dense_forms, mixtures_of, neurons_there, to_dense, to_widths
from surgeon.verbs.dense import placeholder

if LATER:
    import torch
    from safetensors.torch import load_file, save_file
    from streamed import padded, plain, stream
    from torch.nn.functional import silu

    from surgeon.measure.mixture import mixtures

pytestmark = pytest.mark.usefixtures("one_thread")

ALIKE = {  # toys in which every token takes every expert, and what else their config needs for that
    "qwen3_moe": {"num_experts_per_tok": 7},
    "deepseek_v3": {"num_experts_per_tok": 9, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
}


def rows(count, length=20):
    return torch.randint(3, 100, (count, length), generator=torch.Generator().manual_seed(0))


def alike(name, directory):
    """Return a mixture whose router gives every token the same gates."""
    toys.build(name, directory, **ALIKE[name])
    tensors = load_file(directory / "model.safetensors")
    for key in tensors:
        if key.endswith("mlp.gate.weight"):
            tensors[key].zero_()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ALIKE)
def test_all_neurons_are_exact_where_gates_are_constant(name, tmp_path):
    source = alike(name, tmp_path / "model")
    begun = open_model(source)
    width = len(neurons_there(begun.anatomy, None))  # a token takes all of them

    found = mixtures(stream(source), rows(4), width)
    Surgery(begun.source, to_dense(begun.anatomy, found)).save(tmp_path / "dense")

    model, report = toys.load(tmp_path / "dense")
    assert not any(report.values()), report
    assert not any("experts" in key for key, _ in model.named_parameters())
    expected = toys.logits(toys.load(source)[0])
    # float32: columns times a gate here, outputs times it there
    torch.testing.assert_close(toys.logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_gates_and_neurons_are_those_of_the_formula(toy):
    """By the stored matrices and what reaches the experts: the mean gate, and |g a| times the norm of a column."""
    source, ids = toy("qwen3_moe"), rows(4)
    seen = []
    model = plain(source)
    for layer in toys.stacks(model)[0]:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(ids, use_cache=False)
    weights = load_file(source / "model.safetensors")

    found = mixtures(stream(source), ids, 40)

    for layer, (hidden, chosen, gates) in enumerate(seen):
        scores, means = [], []
        for expert in range(7):
            gate, up, down = (
                weights[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]
                for part in ("gate", "up", "down")
            )
            share = torch.where(chosen == expert, gates, 0).sum(-1)
            neurons = share[:, None] * silu(hidden @ gate.T) * (hidden @ up.T)
            scores.append(neurons.square().mean(0).sqrt() * down.norm(dim=0))
            means.append(float(share.mean()))
        best = torch.cat(scores).argsort(descending=True)[:40].sort().values.tolist()
        assert found[layer].neurons == tuple((number // 28, number % 28) for number in best)
        assert found[layer].gates == pytest.approx(means, rel=1e-5)


def test_a_dense_layer_has_its_neurons_bit_for_bit_and_its_columns_times_the_gate(toy):
    begun = open_model(toy("qwen3_moe"))
    mixture = Mixture(((0, 3), (5, 0), (5, 27)), (0.5, 0, 0, 0, 0, 0.25, 0))

    plan = to_dense(begun.anatomy, dict.fromkeys(range(6), mixture))

    assert plan.config["mlp_only_layers"] == list(range(6))
    assert plan.config["intermediate_size"] == 3
    before = load_file(toy("qwen3_moe") / "model.safetensors")
    from surgeon.plan.arithmetic import Arithmetic

    source = begun.source
    made = Arithmetic(source.tensors, source.parts({"model.safetensors": ()}))
    name = "model.layers.2.mlp.{}.weight"
    experts = "model.layers.2.mlp.experts.{}.{}.weight"
    for part in ("gate_proj", "up_proj"):
        picked = [
            before[experts.format(0, part)][3],
            before[experts.format(5, part)][0],
            before[experts.format(5, part)][27],
        ]
        assert torch.equal(made.tensor(plan.tensors[name.format(part)]), torch.stack(picked))
    zero, five = (before[experts.format(expert, "down_proj")] for expert in (0, 5))
    columns = torch.stack([zero[:, 3] * 0.5, five[:, 0] * 0.25, five[:, 27] * 0.25], dim=1)
    assert torch.equal(made.tensor(plan.tensors[name.format("down_proj")]), columns)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side, toy):
    ids, lengths = rows(3, 14), [14, 9, 5]
    padding, real = padded(ids, lengths, left=side == "left")
    right, real_right = padded(ids, lengths, left=False)

    found = mixtures(stream(toy("qwen3_moe")), padding, 40, real=real)[0]

    assert found.gates == pytest.approx(
        mixtures(stream(toy("qwen3_moe")), right, 40, real=real_right)[0].gates, rel=1e-4
    )
    assert found.gates != pytest.approx(mixtures(stream(toy("qwen3_moe")), right, 40)[0].gates, rel=1e-2)


def test_mixtures_are_written_down_and_read_again(tmp_path):
    anatomy = open_model(toys.build("deepseek_v3", tmp_path / "model")).anatomy
    kept = (*neurons_there(anatomy, 50), (9, 0), (9, 83))
    mixture = Mixture(kept, tuple(number / 10 for number in range(9)))

    widths = json.loads(json.dumps(to_widths(anatomy, dict.fromkeys(range(2, 6), mixture))))

    assert mixtures_of(anatomy, widths) == dict.fromkeys(range(2, 6), mixture)
    assert [len(row) for row in widths["neurons"]] == [52] * 6


@pytest.mark.parametrize("name", ["dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v2"])
def test_layers_with_experts_become_as_wide_as_the_dense_ones_beside_them(name, tmp_path):
    source = toys.save(name, tabled.TYPES[name], tmp_path / "model")
    begun = open_model(source)

    Surgery(begun.source, placeholder(begun.anatomy, 52)).save(tmp_path / "dense")

    model, report = toys.load(tmp_path / "dense")
    assert not any(report.values()), report
    assert torch.isfinite(toys.logits(model)).all()
    with pytest.raises(PlanError, match="layers 0 are dense with 52 neurons"):
        placeholder(begun.anatomy, 50)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", "the code of mixtral has no dense layer"),
        ("gpt_oss", "the code of gpt_oss has no dense layer"),
        ("granitemoe", "the code of granitemoe has no dense layer"),
        ("qwen2_moe", "no place for 'mlp.shared_expert"),
        ("llama", "has no experts"),
    ],
)
def test_a_family_without_a_dense_layer_in_that_place_is_refused(name, message, toy):
    with pytest.raises(PlanError, match=message):
        dense_forms(open_model(toy(name)).anatomy)


def test_a_config_that_cannot_say_so_is_refused(tmp_path):
    source = toys.save("solar_open", tabled.TYPES["solar_open"], tmp_path / "model")

    with pytest.raises(PlanError, match="no key of the config says that all layers of a solar_open are dense"):
        placeholder(open_model(source).anatomy, 40)


def test_more_neurons_than_there_are_are_refused(toy):
    with pytest.raises(PlanError, match="cannot keep 197 of the 196 neurons"):
        placeholder(open_model(toy("qwen3_moe")).anatomy, 197)


# --- the command ----------------------------------------------------------------------------------------------------

ROWS = {"samples": 16, "sequence_length": 16}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Return a mixture of experts with a tokenizer. Read-only."""
    return talkers.talker(tmp_path_factory.mktemp("talkers") / "mixture", "qwen3_moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return talkers.written(tmp_path_factory.mktemp("texts") / "text.txt", talkers.TEXT * 4)


def test_a_dense_model_is_solved_on_a_text_and_made_again_from_its_receipt(mixture, text, tmp_path, run):
    surgery = surgeon.prune(mixture, dense=True, intermediate_size=60, data=[text], **ROWS)
    surgery.save(tmp_path / "dense")

    model, report = toys.load(tmp_path / "dense")
    assert not any(report.values()), report
    assert {layer.mlp.down_proj.weight.shape[1] for layer in toys.stacks(model)[0]} == {60}
    maps = surgery.merging.record["maps"]
    assert [each["reason"] for each in maps] == [f"layer {number}" for number in range(6)]
    assert any(each["taken"] for each in maps)
    assert all(each["held_out"][1] < each["held_out"][0] for each in maps if each["taken"])
    assert {name.split(".mlp.")[1] for name in load_file(tmp_path / "dense/repairs.safetensors")} == {
        "down_proj.weight"
    }
    card = (tmp_path / "dense/README.md").read_text()
    assert "7 experts of each of 6 layers into one MLP of 60 neurons" in card
    assert "approximate: every neuron of a dense layer counts for every token" in card
    again = json.loads(run("run", tmp_path / "dense/surgeon.json", "--json").out)
    assert again["steps"][0]["result"]["same"] is True


def test_a_dry_run_has_the_sizes_and_measures_nothing(mixture, text, tmp_path, run):
    told = json.loads(
        run("prune", mixture, "--dense", "--data", text, "-o", tmp_path / "dense", "--dry-run", "--json").out
    )

    assert told["config"]["intermediate_size"] == {"before": 52, "after": 84}  # 3 experts of 28 a token
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--layers", 4), ("--experts", 4), ("--attention-heads", 4), ("--compensate",)])
def test_a_dense_model_is_made_in_a_step_of_its_own(words, mixture, tmp_path, run):
    done = run("prune", mixture, "--dense", *words, "-o", tmp_path / "dense")

    assert done.code == 2
    assert "--dense makes experts dense, and cuts nothing else" in done.err
