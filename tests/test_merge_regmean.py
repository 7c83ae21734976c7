"""RegMean: linear maps of several models, solved for what each does on its own text, by kept Gram matrices."""

import json

import pytest
import talkers
import toys
from later import LATER
from test_merge import finetuned, same, weights

import surgeon
from surgeon.errors import SurgeonError
from surgeon.options import OptionError
from surgeon.plan.expressions import Regress

if LATER:
    import torch
    from safetensors.torch import load_file

    from surgeon.plan.regressing import solve

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"samples": 3, "sequence_length": 24}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return two finetunes of a model with a tokenizer, and a text for each."""
    place = tmp_path_factory.mktemp("pair")
    base = talkers.talker(place / "base")
    texts = [talkers.written(place / "one.txt"), talkers.written(place / "two.txt", "A rat! A cat, a mat? " * 60)]
    return [finetuned(base, place / name, seed) for seed, name in enumerate("ab")], texts


def solved(out, models, data, **options):
    first, *others = models
    surgery = surgeon.merge(first, models=[str(each) for each in others], method="regmean", data=data, **FEW | options)
    surgery.save(out, overwrite=True)
    return weights(out)


def explicit(model, text, name):
    """Return E[x x^T] of the inputs of a map, by transformers' own forward pass on the same rows."""
    from surgeon.measure.calibration import read_calibration
    from surgeon.surgery import open_source

    tokens = read_calibration(open_source(model), [text], **FEW).tokens
    loaded, seen = toys.load(model)[0], []
    part = dict(loaded.named_modules())[name.removesuffix(".weight")]
    part.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        loaded(input_ids=tokens)
    x = torch.cat(seen)
    return x.T @ x / len(x)


def test_gram_matrices_and_maps_are_those_of_the_formula(pair, tmp_path):
    models, texts = pair
    result = solved(tmp_path / "out", models, texts, weights=["1,3"], alpha=0.7)
    grams, parts = load_file(tmp_path / "out" / "grams.safetensors"), [weights(each) for each in models]

    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.4.mlp.down_proj.weight"):
        whole, right = 0.0, 0.0
        for number, (model, text, share) in enumerate(zip(models, texts, (0.25, 0.75), strict=True), 1):
            gram = explicit(model, text, name)
            kept = grams[f"{number}/{name}.gram"].double()
            torch.testing.assert_close(kept, gram, rtol=0, atol=1e-5 * float(gram.abs().max()))
            shrunk = 0.7 * kept + 0.3 * torch.diag(kept.diagonal())
            whole, right = whole + share * shrunk, right + share * shrunk @ parts[number - 1][name].double().T
        mean = 0.25 * parts[0][name].double() + 0.75 * parts[1][name].double()
        ridge = 1e-6 * whole.diagonal().mean()
        expected = torch.linalg.solve(whole + ridge * torch.eye(len(whole)), right + ridge * mean.T).T
        torch.testing.assert_close(result[name].double(), expected, rtol=0, atol=1e-6)
    norm = "model.layers.3.input_layernorm.weight"
    torch.testing.assert_close(result[norm], 0.25 * parts[0][norm] + 0.75 * parts[1][norm])


@pytest.mark.parametrize("sequential", [False, True])
def test_equal_models_give_the_same_model(sequential, pair, tmp_path):
    (a, _), texts = pair

    assert same(solved(tmp_path / "out", [a, a], texts, sequential=sequential), weights(a))


def test_a_model_without_a_text_is_taken_to_see_what_the_other_sees(pair, tmp_path):
    (a, b), (text, _) = pair
    result, one, two = solved(tmp_path / "out", [a, b], [text, "none"]), weights(a), weights(b)

    for name, value in result.items():
        torch.testing.assert_close(value.double(), (one[name].double() + two[name].double()) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_equal_gram_matrices_and_none_at_all_give_the_mean(alpha):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    seen = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    rule = Regress(maps=(), biases=(), grams=(), weights=(1.0, 2.0, 3.0), alpha=alpha, dtype="F32")
    mean = sum(share * each for share, each in zip((1 / 6, 2 / 6, 3 / 6), maps, strict=True))

    for gram in (seen.T @ seen / 40, torch.zeros(7, 7, dtype=torch.float64), None):
        torch.testing.assert_close(solve(maps, [gram] * 3, rule), mean, rtol=0, atol=1e-12)


def test_what_regmean_minimises_is_less_than_the_means(pair, tmp_path):
    models, texts = pair
    result = solved(tmp_path / "out", models, texts, alpha=1.0)
    grams, parts = load_file(tmp_path / "out" / "grams.safetensors"), [weights(each) for each in models]

    def error(name, value):
        total = 0.0
        for number, part in enumerate(parts, 1):
            change = value.double() - part[name].double()
            total += float((change @ grams[f"{number}/{name}.gram"].double() * change).sum())
        return total

    names = [name for name in result if f"1/{name}.gram" in grams]
    assert len(names) == 7 * 6
    for name in names:
        assert error(name, result[name]) < error(name, (parts[0][name] + parts[1][name]) / 2)


def test_the_second_layer_of_a_sequential_merge_reads_what_is_merged(pair, tmp_path):
    models, texts = pair
    solved(tmp_path / "plain", models, texts)
    solved(tmp_path / "turn", models, texts, sequential=True)
    plain, turn = (load_file(tmp_path / name / "grams.safetensors") for name in ("plain", "turn"))

    name = "1/model.layers.3.mlp.down_proj.weight.gram"
    assert plain.keys() == turn.keys()
    assert not torch.allclose(plain[name], turn[name])
    merged, text = tmp_path / "turn", texts[0]
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.5.self_attn.q_proj.weight"):
        gram = explicit_behind(merged, models[0], text, name)
        torch.testing.assert_close(turn[f"1/{name}.gram"].double(), gram, rtol=0, atol=1e-5 * float(gram.abs().max()))


def explicit_behind(merged, model, text, name):
    """Return the Gram matrix of a query map whose layer is the model's, behind layers that are merged."""
    from surgeon.measure.calibration import read_calibration
    from surgeon.surgery import open_source

    tokens = read_calibration(open_source(model), [text], **FEW).tokens
    loaded, own = toys.load(merged)[0], toys.load(model)[0]
    layer = int(name.split(".")[2])
    toys.stacks(loaded)[0][layer].load_state_dict(toys.stacks(own)[0][layer].state_dict())
    seen = []
    part = dict(loaded.named_modules())[name.removesuffix(".weight")]
    part.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        loaded(input_ids=tokens)
    x = torch.cat(seen)
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "mixtral"])
def test_biases_conv1d_and_experts(name, tmp_path):
    base = talkers.talker(tmp_path / "base", name)
    text = talkers.written(tmp_path / "one.txt")
    models = [finetuned(base, tmp_path / each, seed) for seed, each in enumerate("ab")]
    solved(tmp_path / "out", models, [text, text])

    _, report = toys.load(tmp_path / "out")
    assert not any(report.values()), report
    result, parts = weights(tmp_path / "out"), [weights(each) for each in models]
    changed = {key for key in result if not torch.allclose(result[key], (parts[0][key] + parts[1][key]) / 2, atol=1e-7)}
    solved_maps = {
        "gpt2": {"c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias", "c_fc.weight", "c_fc.bias"},
        "qwen2": {f"{p}_proj.weight" for p in ("q", "k", "v", "o", "gate", "up", "down")}
        | {f"{p}_proj.bias" for p in "qkv"},
        "mixtral": {f"{p}_proj.weight" for p in "qkvo"},
    }
    assert {".".join(key.split(".")[-2:]) for key in changed} == solved_maps[name]


def test_kept_gram_matrices_stand_for_the_texts_and_a_receipt_replays(run, pair, tmp_path):
    (a, b), texts = pair
    words = ["--method", "regmean", "--samples", 3, "--sequence-length", 24]
    done = run("merge", a, b, *words, "--data", texts[0], "--data", texts[1], "-o", tmp_path / "out", "--json")

    assert done.code == 0, done.err
    assert json.loads(done.out)["method"] == "regmean"
    again = run("run", tmp_path / "out" / "surgeon.json", "-o", tmp_path / "again", "--json", "--quiet")
    assert json.loads(again.out)["steps"][0]["result"]["same"], again.err
    for model, text in ((a, texts[0]), (b, texts[1])):  # each owner measures alone; nobody needs the other's text
        solved(tmp_path / f"of-{model.name}", [model], [text])
    shared = [str(tmp_path / f"of-{name}") for name in "ab"]
    assert same(solved(tmp_path / "shared", [a, b], shared), weights(tmp_path / "out"))
    with pytest.raises(SurgeonError, match="holds no Gram matrices of"):
        solved(tmp_path / "wrong", [a, b], shared[::-1])


def test_a_dry_run_reads_no_text(run, pair, tmp_path):
    (a, b), _ = pair
    done = run("merge", a, b, "--method", "regmean", "--data", "nowhere.txt", "--data", "none", "--dry-run", "--json")

    assert done.code == 0, done.err
    assert "are solved when the texts are read" in " ".join(json.loads(done.out)["notes"])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "linear", "data": ["x"]}, "belong together"),
        ({"method": "regmean", "data": ["x"]}, "1 are given for 2 models"),
        ({"method": "regmean", "data": ["none", "none"]}, "no model has a text"),
        ({"method": "regmean", "data": ["x", "x"], "alpha": 2.0}, "--alpha is 2.0"),
    ],
)
def test_what_regmean_needs_is_said(options, fault, pair):
    (a, b), _ = pair

    with pytest.raises(OptionError, match=fault):
        surgeon.merge(a, models=[str(b)], **options)
