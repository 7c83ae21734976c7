"""RegMean: linear maps of several models, solved for what each does on its own text, by kept Gram matrices."""

import json
import re
from dataclasses import replace

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

    from surgeon.plan.regressing import Solving, regressed

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


def tokens_of(model, text):
    """Return the rows that a merge reads."""
    from surgeon.measure.calibration import read_calibration
    from surgeon.surgery import open_source

    return read_calibration(open_source(model), [text], **FEW).tokens


def explicit(model, text, name):
    """Return E[x x^T] of the inputs of a map, by transformers' own forward pass on the same rows."""
    loaded, seen = toys.load(model)[0], []
    part = dict(loaded.named_modules())[name.removesuffix(".weight")]
    part.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        loaded(input_ids=tokens_of(model, text))
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
        torch.testing.assert_close(Solving([gram] * 3, rule)(maps), mean, rtol=0, atol=1e-12)


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
    assert len(names) == 7 * 6 + 1  # six layers, and the head
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
    loaded, own = toys.load(merged)[0], toys.load(model)[0]
    layer = int(name.split(".")[2])
    toys.stacks(loaded)[0][layer].load_state_dict(toys.stacks(own)[0][layer].state_dict())
    seen = []
    part = dict(loaded.named_modules())[name.removesuffix(".weight")]
    part.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        loaded(input_ids=tokens_of(model, text))
    x = torch.cat(seen)
    return x.T @ x / len(x)


EACH = {f"{p}_proj.weight" for p in ("q", "k", "v", "o", "gate", "up", "down")}
SOLVED = {
    "gpt2": {"c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias", "c_fc.weight", "c_fc.bias"},
    "qwen2": EACH | {f"{p}_proj.bias" for p in "qkv"} | {"lm_head.weight"},
    "mixtral": {f"{p}_proj.weight" for p in "qkvo"} | {"w1.weight", "w2.weight", "w3.weight", "lm_head.weight"},
    "granitemoe": {f"{p}_proj.weight" for p in "qkvo"}
    | {"input_linear.weight", "output_linear.weight", "lm_head.weight"},
    "gpt_oss": {f"{p}_proj.{each}" for p in "qkvo" for each in ("weight", "bias")}
    | {f"experts.{p}_proj{bias}" for p in ("gate_up", "down") for bias in ("", "_bias")}
    | {"router.weight", "router.bias", "lm_head.weight"},
}


@pytest.fixture(scope="module", params=list(SOLVED))
def kind(request, tmp_path_factory):
    """Return a type's name, two finetunes of a toy of it, a text, and their merge."""
    place = tmp_path_factory.mktemp(request.param)
    base = talkers.talker(place / "base", request.param)
    text = talkers.written(place / "one.txt")
    models = [finetuned(base, place / each, seed) for seed, each in enumerate("ab")]
    return request.param, models, text, solved(place / "out", models, [text, text]), place / "out"


def test_biases_conv1d_experts_and_heads(kind):
    name, models, _, result, out = kind

    _, report = toys.load(out)
    assert not any(report.values()), report
    parts = [weights(each) for each in models]
    changed = {key for key in result if not torch.allclose(result[key], (parts[0][key] + parts[1][key]) / 2, atol=1e-7)}
    assert {".".join(key.split(".")[-2:]) for key in changed} == SOLVED[name]


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "gpt_oss"], indirect=True)
def test_gram_matrices_of_experts_are_of_the_tokens_routed_to_them(kind):
    name, (model, _), text, _, out = kind
    grams, loaded = load_file(out / "grams.safetensors"), toys.load(model)[0]
    seen, heads = [], []
    experts = next(part for path, part in loaded.named_modules() if re.fullmatch(r"model\.layers\.1\..*experts", path))
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    loaded.lm_head.register_forward_pre_hook(lambda _, args: heads.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        loaded(input_ids=tokens_of(model, text))
        hidden, chosen = (torch.cat([call[at] for call in seen]) for at in (0, 1))
        reached = [hidden[(chosen == expert).any(-1)] for expert in range(len(experts.down_proj))]
    assert len({len(each) for each in reached}) > 1, "the experts see as many tokens, which shows nothing"

    def near(key, x, expert=None):
        gram = grams[f"1/{key}.gram"].double()
        x = x.double()
        wanted = x.T @ x / len(hidden)
        whole = gram if expert is None else gram[expert]
        torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-5 * max(float(wanted.abs().max()), 1e-3))

    near("lm_head.weight", torch.cat(heads))
    for expert, x in enumerate(reached):
        with torch.no_grad():
            if name != "gpt_oss":
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner, prefix = torch.nn.functional.silu(gate) * up, "model.layers.1.block_sparse_moe"
            if name == "mixtral":
                near(f"{prefix}.experts.{expert}.w1.weight", x)
                near(f"{prefix}.experts.{expert}.w3.weight", x)
                near(f"{prefix}.experts.{expert}.w2.weight", inner)
            elif name == "granitemoe":
                near(f"{prefix}.input_linear.weight", x, expert)
                near(f"{prefix}.output_linear.weight", inner, expert)
            else:
                both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
                one = torch.ones(len(x), 1)
                near("model.layers.1.mlp.experts.gate_up_proj", torch.cat([x, one], 1), expert)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                near("model.layers.1.mlp.experts.down_proj", torch.cat([inner, one], 1), expert)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_are_solved_each_alone(is_transposed):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, 6, 5, generator=generator) for _ in range(2)]
    inputs, outputs = (6, 5) if is_transposed else (5, 6)
    biases = [torch.randn(3, outputs, generator=generator) for _ in range(2)]
    seen = [torch.randn(3, 40, inputs + 1, generator=generator) for _ in range(2)]
    seen[0][1] = 0  # an expert that one model has never used
    grams = [each.mT @ each for each in seen]
    grams[0][2] = grams[1][2] = 0  # and one that no model has
    rule = Regress(
        maps=(), biases=(), grams=(), weights=(1.0, 2.0), alpha=0.9, dtype="F32", is_transposed=is_transposed
    )

    def rows(value):
        return lambda start, stop: value[start:stop]

    def made(rule, shape, *experts):
        pick = (lambda value: rows(value[experts[0]])) if experts else rows
        pairs = [(pick(one), pick(bias)) for one, bias in zip(maps, biases, strict=True)]
        return regressed(rule, pairs, [pick(gram) for gram in grams], shape)

    for each in (rule, replace(rule, is_bias=True)):
        whole = made(each, (3, 6, 5))(0, 3)
        for expert in range(3):
            alone = made(each, (6, 5), expert)(0, outputs if each.is_bias else 6)
            torch.testing.assert_close(whole[expert], alone, rtol=0, atol=0)
        kept = biases if each.is_bias else maps
        torch.testing.assert_close(whole[1], kept[1][1].double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(whole[2], (kept[0][2] / 3 + kept[1][2] * 2 / 3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("sequential", [False, True])
def test_equal_models_with_experts_and_a_head_give_the_same_model(sequential, kind, tmp_path):
    _, (model, _), text, _, _ = kind

    assert same(solved(tmp_path / "out", [model, model], [text, text], sequential=sequential), weights(model))


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
