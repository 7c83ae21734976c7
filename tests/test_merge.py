"""Several models made one: each number by one rule, whatever the order of the models and the size of the files."""

import json
import math

import pytest
import toys
from later import LATER

import surgeon
from surgeon.errors import PlanError, SurgeonError
from surgeon.options import OptionError
from surgeon.plan.rules import KINDS
from surgeon.transforms.portions import along, read_portions

if LATER:
    import torch
    from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = tuple(KINDS)
NEEDS_BASE = tuple(name for name, kind in KINDS.items() if kind.of_differences)
OF_TWO = tuple(name for name, kind in KINDS.items() if kind.models == (2, 2))


def finetuned(model, directory, seed, *, step=0.02):
    """Return `directory`, now holding the model with noise on its weights, as if it had been trained a little."""
    directory.mkdir(parents=True)
    for path in model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: (value + step * torch.randn(value.shape, generator=generator)).to(value.dtype)
        for name, value in tensors.items()
    }
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def family(toy, tmp_path_factory):
    """Return a base and three finetunes of it."""
    place, base = tmp_path_factory.mktemp("family"), toy("llama")
    return base, *(finetuned(base, place / name, seed) for seed, name in enumerate("abc"))


def settings(method, base, **more):
    return {"method": method, **({"base": base} if method in NEEDS_BASE else {}), **more}


def weights(directory):
    return load_file(directory / "model.safetensors")


def merged(out, first, *others, **options):
    surgeon.merge(first, models=[str(other) for other in others], **options).save(out, overwrite=True)
    return weights(out)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_is_itself(method, dtype, tmp_path):
    model = toys.build("llama", tmp_path / "model", dtype=dtype)
    count = 2 if method in OF_TWO else 3
    unequal = KINDS[method].has_weights and method not in ("task-arithmetic", "dare", "dare-ties")
    options = {"weights": [",".join(["0.3", "0.7", "0.9"][:count])]} if unequal else {}

    result = merged(tmp_path / "out", model, *[model] * (count - 1), **settings(method, model, **options))

    assert same(result, weights(model))


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "model-stock", "nuslerp"])
def test_equal_finetunes_of_another_base_are_themselves(method, family, tmp_path):
    base, a, *_ = family
    options = {"density": ["1"]} if method == "ties" else {}

    assert same(merged(tmp_path / "out", a, a, method=method, base=base, **options), weights(a))


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "slerp", "nuslerp", "karcher"])
def test_all_weight_on_one_model_gives_its_bytes(method, family, tmp_path):
    base, a, b, _ = family

    for ratio, model in (("1,0", a), ("0,1", b)):
        assert same(merged(tmp_path / "out", a, b, **settings(method, base, weights=[ratio])), weights(model))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_models_does_not_matter(method, family, tmp_path):
    base, a, b, c = family
    models = [a, b] if method in OF_TWO else [a, b, c]
    numbers = [0.2, 0.5, 0.9][: len(models)]
    orders = [[0, 1], [1, 0]] if len(models) == 2 else [[0, 1, 2], [2, 0, 1], [1, 0, 2]]
    results = []
    for order in orders:
        options = {"weights": [",".join(str(numbers[i]) for i in order)]} if KINDS[method].has_weights else {}
        results.append(merged(tmp_path / "out", *(models[i] for i in order), **settings(method, base, **options)))

    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("method", ["dare", "ties", "karcher"])
def test_a_result_is_the_same_in_one_file_and_in_many(method, family, tmp_path):
    base, a, b, _ = family
    surgery = surgeon.merge(a, models=[b], **settings(method, base))
    surgery.save(tmp_path / "one")
    surgery.save(tmp_path / "many", max_shard_size=20_000)

    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert same(weights(tmp_path / "one"), {k: v for file in files for k, v in load_file(file).items()})


def test_linear_is_the_mean_rounded_once(family, tmp_path):
    _, a, b, c = family
    result, parts = merged(tmp_path / "out", a, b, c, weights=["1,2,3"]), [weights(each) for each in (a, b, c)]

    for name, value in result.items():
        mean = sum(part[name].double() * w / 6 for part, w in zip(parts, (1, 2, 3), strict=True))
        torch.testing.assert_close(value, mean.float(), rtol=2e-7, atol=0)  # half a unit of float32


def test_slerp_keeps_the_length_of_what_lies_between(family, tmp_path):
    _, a, b, _ = family
    theirs = {name: -value.flip(0) if value.dim() > 1 else value for name, value in weights(b).items()}
    b2 = finetuned(b, tmp_path / "b2", 0)
    save_file({name: value.contiguous() for name, value in theirs.items()}, b2 / "model.safetensors")
    result, one = merged(tmp_path / "out", a, b2, method="slerp", t="0.3"), weights(a)

    name = "model.layers.0.mlp.up_proj.weight"
    x, y, z = (each[name].double().flatten() for each in (one, theirs, result))
    theta = torch.acos(x @ y / x.norm() / y.norm())
    expected = (torch.sin(0.7 * theta) * x + torch.sin(0.3 * theta) * y) / torch.sin(theta)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-7)


def test_ties_keeps_the_largest_and_lets_signs_vote(family, tmp_path):
    base, a, b, c = family
    result = merged(tmp_path / "out", a, b, c, method="ties", base=base, density=["0.3"], weights=["1,2,3"], scale=0.5)
    origin, parts = weights(base), [weights(each) for each in (a, b, c)]

    for name, value in result.items():
        deltas = torch.stack([part[name].double() - origin[name].double() for part in parts])
        kept = []
        for delta in deltas:
            least = delta.abs().flatten().sort(descending=True).values[max(1, int(0.3 * delta.numel())) - 1]
            kept.append(torch.where(delta.abs() >= least, delta, 0))
        share = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(-1, *[1] * value.dim())
        kept = torch.stack(kept)
        sign = torch.where((kept * share).sum(0) >= 0, 1, -1)
        agree = kept.sign() == sign
        count = (agree * share).sum(0)
        expected = origin[name].double() + 0.5 * (kept * share * agree).sum(0) / torch.where(count == 0, 1, count)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-7)


def test_dare_drops_by_the_name_of_the_tensor_and_the_seed(family, tmp_path):
    base, a, b, _ = family
    one, again, other = (
        merged(tmp_path / "out", a, b, method="dare", base=base, density=["0.25"], weights=["1,0"], seed=seed)
        for seed in (1, 1, 2)
    )
    origin, model = weights(base), weights(a)

    assert same(one, again)
    assert not same(one, other)
    kept = total = 0
    for name, value in one.items():
        delta, added = model[name].double() - origin[name].double(), value.double() - origin[name].double()
        stays = added != 0
        torch.testing.assert_close(added[stays], (4 * delta)[stays], rtol=0, atol=1e-6)
        kept, total = kept + int(stays.sum()), total + stays.numel()
    assert abs(kept / total - 0.25) < 5 * math.sqrt(0.25 * 0.75 / total)  # five standard deviations


def test_model_stock_stays_between_the_base_and_the_mean(family, tmp_path):
    base, a, b, _ = family
    result = merged(tmp_path / "out", a, b, method="model-stock", base=base)
    origin, one, two = map(weights, (base, a, b))

    for name, value in result.items():
        x, y = ((each[name] - origin[name]).double().flatten() for each in (one, two))
        c = max(0.0, float(x @ y / x.norm() / y.norm()))
        expected = origin[name].double().flatten() + 2 * c / (1 + c) * (x + y) / 2
        torch.testing.assert_close(value.double().flatten(), expected, rtol=0, atol=2e-7)


def test_karcher_of_two_is_the_middle_of_their_arc(family, tmp_path):
    _, a, b, _ = family
    result, one, two = merged(tmp_path / "out", a, b, method="karcher"), weights(a), weights(b)

    for name, value in result.items():
        x, y = (each[name].double().flatten() for each in (one, two))
        middle = x / x.norm() + y / y.norm()
        expected = middle / middle.norm() * (x.norm() + y.norm()) / 2
        torch.testing.assert_close(value.double().flatten(), expected, rtol=1e-6, atol=1e-7)


def test_weights_may_differ_by_layer_and_part(family, tmp_path):
    _, a, b, _ = family
    result = merged(tmp_path / "out", a, b, weights=["0:1,1:0", "mlp=1,0", "*k_proj*=0,1", "outside=1,1"])
    one, two = weights(a), weights(b)

    for name, value in result.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        share = 0.5 if layer is None else 1.0 if ".mlp." in name else 0.0 if "k_proj" in name else layer / 5
        expected = share * one[name].double() + (1 - share) * two[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-7)


def test_a_line_of_numbers_has_bends_at_equal_distances():
    assert read_portions([0.25, 1], "weights") == read_portions(["0.25,1"], "weights")
    (portion,) = read_portions(["0:1:0.5, 2"], "weights")

    assert portion.lines == ((0.0, 1.0, 0.5), (2.0,))
    assert [along(portion.lines[0], place) for place in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma2", "mixtral", "phi3", "falcon"])
def test_layers_of_several_models_in_an_order_are_copied(name, toy, tmp_path):
    a = toy(name)
    b = finetuned(a, tmp_path / "b", 0)
    surgery = surgeon.merge(a, models=[str(b)], method="passthrough", slices="A:0-2,B:1-4,A:5")
    surgery.save(tmp_path / "out")

    assert surgery.plan.moves_only
    assert surgery.plan.layer_map == (0, 1, 2, None, None, None, None, 5)
    model, report = toys.load(tmp_path / "out")
    assert not any(report.values()), report
    one, two = (toys.stacks(toys.load(each)[0])[0] for each in (a, b))
    layers = toys.stacks(model)[0]
    for place, (source, layer) in enumerate(
        [(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (two, 3), (two, 4), (one, 5)]
    ):
        expected = source[layer].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in layers[place].state_dict().items())


@pytest.mark.parametrize("name", toys.TABLED)
def test_every_family_merges_and_loads(name, toy, tmp_path):
    other = finetuned(toy(name), tmp_path / "other", 3, step=0.001)
    merged(tmp_path / "out", toy(name), other)

    _, report = toys.load(tmp_path / "out")
    assert not any(report.values()), report


def test_a_merge_goes_on_into_the_next_surgery(family, tmp_path):
    _, a, b, _ = family
    surgeon.merge(a, models=[str(b)]).save(tmp_path / "merged")
    surgeon.truncate(tmp_path / "merged", layers=3).save(tmp_path / "steps")
    surgeon.truncate(surgeon.merge(a, models=[str(b)]), layers=3).save(tmp_path / "fused")

    assert same(weights(tmp_path / "steps"), weights(tmp_path / "fused"))


# What is refused


def edited(model, directory, file="config.json", **changes):
    finetuned(model, directory, 9)
    content = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(content | changes))
    return directory


def test_models_that_are_not_alike_are_refused(family, toy, tmp_path):
    _, a, *_ = family
    wrong = {
        "has no tensor|says|is \\[": toys.build("llama", tmp_path / "wide", hidden_size=96),
        "says rms_norm_eps": edited(a, tmp_path / "eps", rms_norm_eps=0.5),
        "uses its embedding as its head": toys.build("llama", tmp_path / "tied", tie_word_embeddings=True),
        "is quantized": edited(a, tmp_path / "codes", quantization_config={"quant_method": "bitsandbytes"}),
    }
    for reason, other in wrong.items():
        with pytest.raises(SurgeonError, match=reason):
            surgeon.merge(a, models=[str(other)])


def vocabulary(tokens):
    return {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": tokens, "merges": []}}


def test_another_order_of_ids_is_refused(family, tmp_path):
    _, a, *_ = family
    one, two, three = (finetuned(a, tmp_path / name, 1) for name in ("one", "two", "three"))
    for place, tokens in ((one, {"x": 0, "y": 1}), (two, {"y": 0, "x": 1}), (three, {"y": 1, "x": 0})):
        (place / "tokenizer.json").write_text(json.dumps(vocabulary(tokens)))

    with pytest.raises(PlanError, match="the token 'x' has id 0 in .*one, id 1 in .*two"):
        surgeon.merge(one, models=[str(two)])
    assert not surgeon.merge(one, models=[str(three)]).plan.notes
    assert "not compared" in surgeon.merge(one, models=[str(a)]).plan.notes[0]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "ties"}, "needs --base"),
        ({"method": "slerp", "base": "x"}, "--base has no effect"),
        ({"method": "passthrough"}, "belong together"),
        ({"weights": ["1"], "method": "model-stock", "base": "x"}, "--weights has no effect"),
        ({"density": ["0"], "method": "ties", "base": "x"}, "a density lies above 0"),
        ({"weights": ["0.5,x"]}, "cannot read 'x'"),
        ({"weights": ["mpl=0.5,1"]}, "unknown part 'mpl'.*did you mean"),
        ({"weights": ["1,2,3"]}, "3 numbers are given for 2 models"),
        ({"weights": ["*nothing*=1,2"]}, "no tensor of the model"),
        ({"weights": ["1,-1"]}, "sum to 0"),
        ({"t": "0.5", "weights": ["1,2"]}, "--t is one number"),
        ({"method": "passthrough", "slices": "C:0-1"}, "cannot read 'C:0-1'"),
        ({"method": "linaer"}, "did you mean linear"),
        ({"models": []}, "merges 2 or more models, not 1"),
    ],
)
def test_what_an_option_cannot_be_is_said(options, fault, family):
    _, a, b, _ = family

    with pytest.raises(OptionError, match=fault):
        surgeon.merge(a, **({"models": [str(b)]} | options))


def test_a_base_that_is_none_of_theirs_is_refused_and_a_far_one_is_told(family, toy, tmp_path):
    base, a, b, _ = family
    other, far = toys.build("llama", tmp_path / "other", seed=5), finetuned(base, tmp_path / "far", 5, step=0.1)

    with pytest.raises(SurgeonError, match="other is not the base of .*a: their weights have a cosine of"):
        surgeon.merge(a, models=[str(b)], method="ties", base=other)
    near = finetuned(base, tmp_path / "near", 5, step=0.002)
    notes = surgeon.merge(near, models=[str(far)], method="ties", base=base).plan.notes
    assert "as parts of its length" in notes[-2]
    assert "far is far from" in notes[-1]


# Recipes of mergekit

SLERP = """
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 6]}}
      - {{model: {b}, layer_range: [0, 6]}}
merge_method: slerp
base_model: {b}
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 1]}}
    - {{filter: mlp, value: 0.3}}
    - value: 0.5
dtype: bfloat16
"""
TIES = """
models:
  - model: {base}
  - {{model: {a}, parameters: {{weight: 0.5, density: 0.4}}}}
  - {{model: {b}, parameters: {{weight: [0.2, 0.8]}}}}
merge_method: ties
base_model: {base}
parameters: {{normalize: false, lambda: 0.7, density: 0.9, int8_mask: true}}
"""
PASSTHROUGH = """
slices:
  - sources: [{{model: {b}, layer_range: [0, 2]}}]
  - sources: [{{model: {a}, layer_range: [1, 6]}}]
merge_method: passthrough
"""


def recipe(text, family, place):
    place.mkdir(exist_ok=True)
    base, a, b, _ = family
    (place / "merge.yaml").write_text(text.format(base=base, a=a, b=b))
    return place / "merge.yaml"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (SLERP, {"method": "slerp", "weights": ["*self_attn*=1:0.5:0,0:0.5:1", "*mlp*=0.7,0.3", "0.5,0.5"]}),
        (
            TIES,
            {"method": "ties", "weights": ["outside=0.5,0.2", "0.5,0.2:0.8"], "density": ["0.4,0.9"]}
            | {"normalize": False, "scale": 0.7},
        ),
        (PASSTHROUGH, {"method": "passthrough", "slices": "A:0-1,B:1-5"}),
    ],
)
def test_a_recipe_of_mergekit_is_what_its_options_are(text, options, family, tmp_path):
    base, a, b, _ = family
    surgeon.merge(None, from_file=recipe(text, family, tmp_path)).save(tmp_path / "one")
    first, second = (a, b) if text == TIES else (b, a)
    options |= {"base": base} if text == TIES else {}
    surgery = surgeon.merge(first, models=[str(second)], **options)
    surgery.save(tmp_path / "two", dtype="bfloat16" if text == SLERP else "keep")

    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("merge_method: ties", "merge_method: della", "merge_method 'della'"),
        ("int8_mask: true", "gamma: 0.1", "gamma: 0.1 in parameters"),
        ("weight: 0.5, ", "", "ties without a weight of"),
        ("merge_method: ties", "merge_method: ties\ntokenizer_source: union", "tokenizer_source: union"),
        ("merge_method: ties", "merge_method: ties\nchat_template: x", "does not do chat_template"),
        ("base_model", "modules", "does not do modules|without a base_model"),
        ("models:", "models: [", "is no YAML"),
    ],
)
def test_what_a_recipe_asks_beyond_this_is_named(old, new, fault, family, tmp_path):
    with pytest.raises(PlanError, match=fault):
        surgeon.merge(None, from_file=recipe(TIES.replace(old, new), family, tmp_path))


# The command


def test_a_card_names_all_parents_and_a_receipt_replays(run, family, tmp_path):
    base, a, b, _ = family
    options = ["--method", "dare", "--base", base, "--seed", 3, "--density", "0.4"]
    done = run("merge", a, b, *options, "-o", tmp_path / "out", "--json", "--quiet")

    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed["method"] == "dare"
    assert [name.rpartition("/")[2] for name in printed["models"]] == ["a", "b"]
    assert all(0 < length < 1 for length in printed["differences"]["lengths"].values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- a\n- b\n- llama\nbase_model_relation: merge\n" in card
    record = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    assert record["source"]["model-2"]["fingerprint"] != record["source"]["base"]["fingerprint"]
    again = run("run", tmp_path / "out" / "surgeon.json", "-o", tmp_path / "again", "--json", "--quiet")
    assert json.loads(again.out)["steps"][0]["result"]["same"], again.err


def test_a_recipe_of_mergekit_runs_and_its_receipt_replays(run, family, tmp_path):
    done = run("merge", "--from", recipe(SLERP, family, tmp_path), "-o", tmp_path / "out", "--json")

    assert done.code == 0, done.err
    again = run("run", tmp_path / "out" / "surgeon.json", "-o", tmp_path / "again", "--json", "--quiet")
    assert json.loads(again.out)["steps"][0]["result"]["same"], again.err
    twice = run("merge", family[1], "--from", tmp_path / "merge.yaml")
    assert twice.code == 2
    assert "--from says all of it, and MODEL too" in twice.err


def test_a_receipt_is_not_replayed_with_another_parent(run, family, tmp_path):
    _, a, b, c = family
    b2 = finetuned(b, tmp_path / "b2", 4)
    surgeon.merge(a, models=[str(b2)]).save(tmp_path / "out")
    (b2 / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes())

    again = run("run", tmp_path / "out" / "surgeon.json", "-o", tmp_path / "again")
    assert again.code == 1
    assert "b2 has changed since" in again.err


def test_a_dry_run_says_the_plan_and_writes_nothing(run, family, tmp_path):
    _, a, b, _ = family
    done = run("merge", a, b, "-o", tmp_path / "out", "--dry-run", "--json")

    printed = json.loads(done.out)
    assert printed["bytes_read"] == 2 * printed["bytes_written"]
    assert printed["layer_map"] == list(range(6))
    assert not (tmp_path / "out").exists()


def test_a_recipe_merges_its_steps(run, family, tmp_path):
    _, a, b, _ = family
    (tmp_path / "recipe.yaml").write_text(
        f"steps:\n  - name: one\n    truncate: {{model: {a}, layers: 3}}\n"
        f"  - name: two\n    truncate: {{model: {b}, layers: 3}}\n"
        "  - name: both\n    merge: {weights: '0.2,0.8', models: [two], model: one}\n"
    )
    done = run("run", tmp_path / "recipe.yaml", "-o", tmp_path / "made")

    assert done.code == 0, done.err
    expected = merged(tmp_path / "out", tmp_path / "made" / "one", tmp_path / "made" / "two", weights=["0.2,0.8"])
    assert same(weights(tmp_path / "made" / "both"), expected)
