"""Pruning end to end, on every family: measure, choose, cut, load, compute, generate."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import toys
from handmade import checkpoint
from later import LATER
from tokenizers import Tokenizer, models, pre_tokenizers

import surgeon
from surgeon.checkpoint.header import TensorSpec, format_header
from surgeon.errors import DataError, MeasureError, PlanError
from surgeon.measure.record import Scores, read_scores
from surgeon.surgery import open_model, open_source
from surgeon.transforms.choose import choose_layers
from surgeon.transforms.scores import METHODS, WIDTHS
from surgeon.transforms.uniform import uniform

if LATER:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODERS = ("bert", "roberta")
DECODERS = tuple(name for name in toys.TOYS if name.partition("-")[0] not in (*ENCODERS, "t5", "bart"))
MIXTURES = ("mixtral", "qwen3_moe", "qwen3_moe-sparse-step", "gpt_oss")
DERIVED = ("gpt2", "gpt2-inverse-layer-idx", "gpt_neox", "gpt_neox-serial", "opt", "opt-post-norm")
TEXT = {"samples": 3, "sequence_length": 14, "compensate": False}  # cuts as scores choose them

# Without layers 1 and 2 by angle, for that block is the closest; without 1 and 4 by influence.
ANGULAR = [[None if e <= s else 0.5 - 0.4 * ((s, e) == (1, 3)) for e in range(7)] for s in range(6)]
INFLUENCE = [0.9, 0.1, 0.5, 0.6, 0.2, 0.8]
BY_HAND = {"angular": ANGULAR, "block-influence": INFLUENCE}
GONE = {"angular": (1, 2), "block-influence": (1, 4)}


def record(directory, path, *, layers=BY_HAND, widths=None, **options):
    """Return a scores.json with these scores, of the model in `directory`."""
    source = open_source(directory)
    depth = len(next(iter(layers.values())))
    path.write_bytes(
        Scores(
            model=source.provenance(),
            depth=depth,
            data=None,
            tokens=0,
            seed=0,
            layers=dict(layers),
            widths=widths or {},
            **options,
        ).to_bytes()
    )
    return path


@cache
def original(directory):
    return toys.load(directory)[0]


def bypassed(directory, dropped):
    """Return the logits of a model with layers bypassed."""
    with toys.bypass(original(directory), dropped):
        return toys.logits(original(directory))


def loaded(directory):
    """Return the model in a folder, of which transformers has neither missed nor drawn anything."""
    model, report = toys.load(directory)
    assert not any(report.values()), report
    return model


def weights(directory):
    return load_file(directory / "model.safetensors")


def give_tokenizer(directory):
    """Put a tokenizer beside a toy's weights: the words w3 to w99, one token each."""
    vocabulary = {"<s>": 0, "<e>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 100)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "<e>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


def words(count, seed=0):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(3, 100)}" for _ in range(count))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(100))
    return str(path)


@pytest.fixture(scope="module")
def speaking(toy, tmp_path_factory):
    """Return a function from a toy's name to a copy of it that has a tokenizer. Read-only."""
    directory = tmp_path_factory.mktemp("speaking")

    def copy(name):
        if not (directory / name).exists():
            shutil.copytree(toy(name), directory / name)
            give_tokenizer(directory / name)
        return directory / name

    return copy


# --- layers: every family -------------------------------------------------------------------------------------------


def assert_bypasses(name, directory, pruned, dropped):
    """The model in `pruned` computes what the one in `directory` does without the layers `dropped`."""
    model, expected = loaded(pruned), bypassed(directory, dropped)
    if name == "gpt2-inverse-layer-idx":  # the queries are rescaled, which rounds: relative 2^-24 each
        torch.testing.assert_close(toys.logits(model), expected, rtol=0, atol=2e-5)
    else:
        assert torch.equal(toys.logits(model), expected)
    return model


@pytest.mark.parametrize("name", toys.TOYS)
def test_layers_drawn_at_random_are_bypassed_and_the_cache_agrees(name, toy, tmp_path):
    surgery = surgeon.prune(toy(name), score="random", layers=3, seed=6)

    summary = surgery.save(tmp_path / "cut")

    dropped = surgery.choice.dropped
    assert dropped == choose_layers("random", 3, 6, seed=6).dropped
    assert dropped != tuple(range(dropped[0], dropped[0] + 3))  # no one block, else it would show less
    assert summary.layers == (6, 3)
    assert summary.layer_map == tuple(i for i in range(6) if i not in dropped)
    assert summary.parameters[1] == sum(tensor.numel() for tensor in weights(tmp_path / "cut").values())
    model = assert_bypasses(name, toy(name), tmp_path / "cut", dropped)
    if name not in ENCODERS:
        arguments = toys.inputs(model) | {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        cached, uncached = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
        assert cached.shape[1] >= 6
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", toys.TOYS)
def test_the_last_layers_but_the_very_last_are_bypassed(name, toy, tmp_path):
    surgery = surgeon.prune(toy(name), score="last", layers=4)

    surgery.save(tmp_path / "cut")

    assert surgery.choice.dropped == (3, 4)
    assert_bypasses(name, toy(name), tmp_path / "cut", (3, 4))


@pytest.mark.parametrize("score", BY_HAND)
@pytest.mark.parametrize("name", DECODERS)
def test_layers_that_recorded_scores_choose_are_bypassed(name, score, toy, tmp_path):
    scores = record(toy(name), tmp_path / "scores.json")

    surgery = surgeon.prune(toy(name), score=score, layers=4, scores_from=scores)
    surgery.save(tmp_path / "cut")

    assert surgery.choice.dropped == GONE[score]
    assert_bypasses(name, toy(name), tmp_path / "cut", GONE[score])


def test_an_encoder_decoder_has_scores_that_read_no_text_only(toy):
    assert surgeon.prune(toy("bart"), score="magnitude", layers=4, protect=(1, 1)).choice is not None

    with pytest.raises(MeasureError, match="has an encoder and a decoder") as caught:
        surgeon.prune(toy("bart"), layers=4, **TEXT)
    assert "random" in caught.value.hint


def test_queries_make_good_what_gpt2_derives_from_a_layers_place(toy, tmp_path):
    """With scale_attn_by_inverse_layer_idx, layer 3 in place 1 needs its queries times 2/4; keys and values do not."""
    scores = record(toy("gpt2-inverse-layer-idx"), tmp_path / "scores.json")

    surgeon.prune(toy("gpt2-inverse-layer-idx"), layers=4, scores_from=scores).save(tmp_path / "cut")

    before, after = weights(toy("gpt2-inverse-layer-idx")), weights(tmp_path / "cut")
    for suffix in ("weight", "bias"):
        old, new = before[f"transformer.h.3.attn.c_attn.{suffix}"], after[f"transformer.h.1.attn.c_attn.{suffix}"]
        assert torch.equal(new[..., :80], old[..., :80] * 0.5)
        assert torch.equal(new[..., 80:], old[..., 80:])


# --- layers: from a text to the cut ---------------------------------------------------------------------------------


def perplexity_of(directory, text):
    """Return the perplexity of the plainly loaded model on TEXT's rows of a text."""
    rows, length = TEXT["samples"], TEXT["sequence_length"]
    ids = AutoTokenizer.from_pretrained(directory)(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: rows * length]).view(rows, length)
    with torch.no_grad():
        logits = toys.load(directory)[0](rows, use_cache=False).logits[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


@pytest.mark.parametrize("score", ["angular", "block-influence", "relative-magnitude", "perplexity", "taylor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_is_scored_and_what_it_chooses_is_cut(name, score, speaking, text, tmp_path):
    surgery = surgeon.prune(speaking(name), score=score, layers=4, protect=(1, 1), data=[text], **TEXT)
    surgery.save(tmp_path / "cut")

    written = read_scores(tmp_path / "cut/scores.json")
    values = written.layers[score]
    assert surgery.choice == choose_layers(score, 2, 6, values=values, protect=(1, 1))
    assert {"angular", "block-influence", "relative-magnitude", score} == set(written.layers)
    assert written.data["sources"][0]["data"] == text
    assert written.data["rows"] == TEXT["samples"]
    assert written.tokens == 42
    assert_bypasses(name, speaking(name), tmp_path / "cut", surgery.choice.dropped)
    assert AutoTokenizer.from_pretrained(tmp_path / "cut")("w5 w7")["input_ids"] == [5, 7]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_perplexity_before_and_after_is_that_of_the_plain_models_on_the_text(name, speaking, text, tmp_path):
    surgery = surgeon.prune(speaking(name), layers=4, data=[text], **TEXT)
    surgery.save(tmp_path / "cut")

    before, after = surgery.evaluate(tmp_path / "cut")

    # Sums of float32 losses in another order: 1e-6 relative, measured 3e-7.
    assert before == pytest.approx(perplexity_of(speaking(name), text), rel=1e-5)
    assert after == pytest.approx(perplexity_of(tmp_path / "cut", text), rel=1e-5)
    assert abs(before / after - 1) > 1e-3
    curve = surgery.curve(2)
    assert curve == pytest.approx([before, surgery.curve()[1], after], rel=1e-5)


def test_recorded_scores_and_another_text_compare_on_that_text(speaking, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(words(60, seed=1))
    surgeon.prune(speaking("llama"), layers=5, data=[text], **TEXT).save(tmp_path / "one")

    surgery = surgeon.prune(speaking("llama"), layers=4, data=[str(other)], scores_from=tmp_path / "one", **TEXT)
    surgery.save(tmp_path / "two")

    before, after = surgery.evaluate(tmp_path / "two")
    assert before == pytest.approx(perplexity_of(speaking("llama"), other), rel=1e-5)  # as above
    assert after == pytest.approx(perplexity_of(tmp_path / "two", other), rel=1e-5)
    assert surgery.scores == read_scores(tmp_path / "one/scores.json")


def test_a_greedy_removal_cuts_what_its_order_says(speaking, text, tmp_path):
    surgery = surgeon.prune(speaking("llama"), score="perplexity", greedy=True, layers=4, data=[text], **TEXT)
    surgery.save(tmp_path / "cut")

    order = surgery.scores.greedy["order"]
    assert surgery.choice.dropped == tuple(sorted(order))
    assert len(order) == 2
    assert_bypasses("llama", speaking("llama"), tmp_path / "cut", order)
    assert surgery.evaluate(tmp_path / "cut")[1] == pytest.approx(surgery.scores.greedy["perplexity"][-1], rel=1e-5)
    again = surgeon.prune(speaking("llama"), score="perplexity", greedy=True, layers=5, scores_from=tmp_path / "cut")
    assert again.choice.dropped == (order[0],)
    with pytest.raises(PlanError, match="the greedy order goes 2 layers deep, not 3"):
        surgeon.prune(speaking("llama"), score="perplexity", greedy=True, layers=3, scores_from=tmp_path / "cut")


def test_a_greedy_order_spares_what_is_protected_or_is_refused(toy, tmp_path):
    greedy = {"order": [1, 4, 2], "perplexity": [20.0, 30.0, 40.0], "protect": [1, 1]}
    scores = record(toy("llama"), tmp_path / "scores.json", greedy=greedy)
    options = {"score": "perplexity", "greedy": True, "layers": 5, "scores_from": scores}

    assert surgeon.prune(toy("llama"), **options).choice.dropped == (1,)
    with pytest.raises(PlanError):
        surgeon.prune(toy("llama"), protect=(2, 1), **options)


def test_a_greedy_order_serves_a_budget_that_fewer_layers_fit(toy, tmp_path):
    greedy = {"order": [1, 4], "perplexity": [20.0, 30.0], "protect": [1, 1]}
    scores = record(toy("llama"), tmp_path / "scores.json", greedy=greedy)
    five = surgeon.prune(toy("llama"), score="last", layers=5).spec.num_parameters

    surgery = surgeon.prune(toy("llama"), score="perplexity", greedy=True, target_parameters=five, scores_from=scores)

    assert surgery.choice.dropped == (1,)


def test_all_tokens_and_the_last_are_different_distances(speaking, text):
    last, every = (
        surgeon.prune(speaking("llama"), layers=4, data=[text], all_tokens=all_tokens, **TEXT).scores
        for all_tokens in (False, True)
    )

    assert (last.options["tokens"], every.options["tokens"]) == ("last", "all")
    assert last.layers["angular"] != every.layers["angular"]
    assert last.layers["block-influence"] == every.layers["block-influence"]


def test_a_text_shorter_than_a_row_is_one_shorter_row(speaking, tmp_path):
    (tmp_path / "short.txt").write_text(words(5))

    surgery = surgeon.prune(speaking("llama"), layers=4, data=[str(tmp_path / "short.txt")], **TEXT)

    assert surgery.text.tokens.shape == (1, 5)
    assert surgery.scores.tokens == 5


def test_a_model_without_a_tokenizer_cannot_read_a_text(toy, text):
    with pytest.raises(DataError, match="tokenizer"):
        surgeon.prune(toy("llama"), layers=4, data=[text])


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_without_data_the_model_writes_its_own_text_from_the_seed(name, toy):
    one, same, other = (surgeon.prune(toy(name), layers=5, seed=seed, **TEXT) for seed in (3, 3, 4))

    assert any("written by the model itself" in note for note in one.plan.notes)
    assert one.scores.data["sources"] == []
    assert one.text.tokens.shape == (3, 14)
    assert one.scores == same.scores
    assert one.scores.data["sha256"] != other.scores.data["sha256"]
    assert one.scores.layers != other.scores.layers
    assert "sampled from the model itself" in str(one.text)


def test_a_seed_that_torch_was_given_is_left_alone(toy):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)

    surgeon.prune(toy("llama"), layers=5, **TEXT)

    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("score", ["angular", "random", "magnitude"])
def test_the_same_seed_writes_the_same_bytes(score, speaking, text, tmp_path):
    options = {"score": score, "layers": 4, "protect": (1, 0), "intermediate_size": 40, "seed": 5}
    data = {"data": [text], **TEXT} if score == "angular" else {}
    for out in ("one", "two"):
        surgeon.prune(speaking("llama"), **options, **data).save(tmp_path / out)

    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert ("scores.json" in names) == (score != "random")
    for name in names:
        if name != "README.md":  # it has the name of its directory
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_another_seed_draws_other_layers_and_other_neurons(toy):
    def layers(seed):
        return surgeon.prune(toy("llama"), score="random", layers=3, seed=seed).choice.dropped

    def tensors(seed):
        return surgeon.prune(toy("llama"), score="random", intermediate_size=40, seed=seed).plan.tensors

    assert layers(0) == layers(0) != layers(1)
    assert tensors(0) == tensors(0) != tensors(1)


# --- scores.json ----------------------------------------------------------------------------------------------------


def test_scores_lie_beside_the_result_and_say_what_was_scored(toy, tmp_path):
    surgery = surgeon.prune(toy("llama"), layers=4, **TEXT)
    surgery.save(tmp_path / "cut")

    written = read_scores(tmp_path / "cut/scores.json")
    assert written == surgery.scores
    assert written.model == open_source(toy("llama")).provenance()
    assert written.depth == 6
    matrix = json.loads((tmp_path / "cut/scores.json").read_text())["scores"]["angular"]
    assert [[entry is None for entry in row] for row in matrix] == [[e <= s for e in range(7)] for s in range(6)]
    step = json.loads((tmp_path / "cut/surgeon.json").read_text())["steps"][0]["prune"]
    assert step["dropped"] == list(surgery.choice.dropped)
    assert (step["score"], step["value"]) == ("angular", surgery.choice.score)
    assert step["data"]["sha256"] == written.data["sha256"]


def test_pruned_again_it_has_the_scores_of_the_second_time(toy, tmp_path):
    surgeon.prune(toy("llama"), layers=5, **TEXT).save(tmp_path / "five")
    surgeon.prune(tmp_path / "five", layers=4, **TEXT).save(tmp_path / "four")
    surgeon.prune(tmp_path / "four", score="random", layers=3).save(tmp_path / "three")
    surgeon.truncate(tmp_path / "five", layers=3).save(tmp_path / "truncated")
    surgeon.grow(tmp_path / "five", layers=6).save(tmp_path / "grown")

    five, four = (read_scores(tmp_path / out / "scores.json") for out in ("five", "four"))
    assert (five.depth, four.depth) == (6, 5)
    assert four.model == open_source(tmp_path / "five").provenance()
    for out in ("three", "truncated", "grown"):
        assert not (tmp_path / out / "scores.json").exists(), out


def test_recorded_scores_cut_again_for_another_number_without_running_the_model(toy, tmp_path):
    first = surgeon.prune(toy("llama"), layers=5, **TEXT)
    first.save(tmp_path / "five")

    for score in ("angular", "block-influence", "relative-magnitude"):
        again = surgeon.prune(toy("llama"), score=score, layers=3, scores_from=tmp_path / "five")
        assert again.text is None
        assert again.choice == choose_layers(score, 3, 6, values=first.scores.layers[score])
    again.save(tmp_path / "three")
    assert (tmp_path / "three/scores.json").read_bytes() == (tmp_path / "five/scores.json").read_bytes()


def test_scores_of_another_model_are_refused(toy, tmp_path):
    scores = record(toy("mistral"), tmp_path / "scores.json")

    with pytest.raises(MeasureError, match="the scores are of other weights than those of") as caught:
        surgeon.prune(toy("llama"), layers=4, scores_from=scores)
    assert "--scores-from" in caught.value.hint


def test_scores_that_are_not_in_the_record_are_refused(toy, tmp_path):
    scores = record(toy("llama"), tmp_path / "scores.json")

    with pytest.raises(PlanError, match=r"no perplexity scores \(there are: angular, block-influence\)"):
        surgeon.prune(toy("llama"), score="perplexity", layers=4, scores_from=scores)
    with pytest.raises(PlanError, match="hold no greedy order"):
        surgeon.prune(toy("llama"), score="perplexity", greedy=True, layers=4, scores_from=scores)
    with pytest.raises(PlanError, match="no contribution scores of ffn"):
        surgeon.prune(toy("llama"), layers=4, intermediate_size=40, scores_from=scores)
    with pytest.raises(MeasureError, match="cannot read"):
        surgeon.prune(toy("llama"), layers=4, scores_from=tmp_path / "none")


@pytest.mark.parametrize(
    "asked", [{"protect": (2, 0)}, {"protect": (0, 2)}, {"protect": (1, 1), "score": "block-influence"}]
)
def test_protected_layers_stay_whatever_the_scores(asked, toy, tmp_path):
    scores = record(toy("llama"), tmp_path / "scores.json", layers=BY_HAND | {"block-influence": [0.1] * 5 + [0.05]})

    surgery = surgeon.prune(toy("llama"), layers=4, scores_from=scores, **asked)

    first, last = asked["protect"]
    assert set(surgery.choice.dropped).isdisjoint([*range(first), *range(6 - last, 6)])


def test_one_block_or_any_layers_go_as_asked(toy, tmp_path):
    scores = record(toy("llama"), tmp_path / "scores.json")

    block = surgeon.prune(toy("llama"), score="block-influence", layers=4, contiguous=True, scores_from=scores)
    free = surgeon.prune(toy("llama"), score="angular", layers=4, contiguous=False, scores_from=scores)

    assert block.choice.dropped == (1, 2)  # 0.1 + 0.5 is less than 0.6 + 0.2
    assert free.choice.dropped == (0, 1)  # all layers alone are as far: the first ones


# --- layers by name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [{"drop": [4, 1, 2]}, {"drop": range(1, 3)}, {"keep": [0, 3, 5]}])
def test_named_layers_are_bypassed_and_no_text_is_read(named, toy, tmp_path):
    dropped = [*named["drop"]] if "drop" in named else [1, 2, 4]
    summary = surgeon.prune(toy("llama"), **named).save(tmp_path / "cut")

    model, _ = toys.load(tmp_path / "cut")
    reference, _ = toys.load(toy("llama"))
    assert summary.layer_map == tuple(layer for layer in range(6) if layer not in dropped)
    assert not (tmp_path / "cut/scores.json").exists()
    with toys.bypass(reference, dropped):
        assert torch.equal(toys.logits(model), toys.logits(reference))


def test_a_list_of_layers_is_typed_as_llama_cpp_does_and_the_json_says_what_went(toy, tmp_path, run):
    result = run("prune", toy("llama"), "--drop", "1,3-4", "-o", tmp_path / "cut", "--json")

    told = json.loads(result.out)
    assert (told["dropped"], told["score"], told["layer_map"]) == ([1, 3, 4], None, [0, 2, 5])


def test_named_layers_go_and_scores_decide_the_width_alone(speaking, text, tmp_path):
    model = speaking("llama")
    by_score = surgeon.prune(model, layers=6, intermediate_size=10, data=(text,), **TEXT)
    named = surgeon.prune(model, drop=[2], intermediate_size=10, data=(text,), **TEXT)

    assert named.choice.dropped == (2,)
    assert named.score == "angular"
    named.save(tmp_path / "named")
    surgeon.prune(by_score.save(tmp_path / "narrow").output, drop=[2]).save(tmp_path / "two-steps")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("named", "two-steps"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--drop", "6"), r"layers \[6\] do not exist"),
        (("--drop", "0-5"), "every layer would go"),
        (("--keep", "0-5"), "no layer would go"),
        (("--keep", "3,1"), "must be in order"),
        (("--drop", "1,0-2"), "names layer 1 twice"),
        (("--drop", "3-1"), "runs backwards; write 1-3"),
        (("--drop", "1;2"), "is not a list of layers"),
        (("--drop", "1", "--keep", "2"), "asked for more than once"),
        (("--drop", "1", "--layers", "4"), "asked for more than once"),
        (("--drop", "1", "--target-memory", "1MB"), "a search chooses what goes"),
        (("--drop", "1", "--protect", "1,1"), "chooses layers, and --drop names them"),
        (("--keep", "1", "--free"), "chooses layers, and --keep names them"),
        (("--drop", "1", "--keep-pattern"), "chooses layers, and --drop names them"),
        (("--drop", "1", "--score", "perplexity", "--greedy"), "chooses layers, and --drop names them"),
        (("--drop", "1", "--curve"), "they are named"),
    ],
)
def test_a_list_of_layers_that_makes_no_sense_is_refused(words, message, toy, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = run("prune", toy("llama"), *words)

    assert result.code in (1, 2)
    assert re.search(message, result.err), result.err
    assert not list(tmp_path.iterdir())


def test_a_receipt_with_named_layers_is_replayed(toy, tmp_path):
    surgeon.prune(toy("llama"), drop=[1]).save(tmp_path / "cut")

    result = subprocess.run(
        [sys.executable, "-m", "surgeon", "run", str(tmp_path / "cut/surgeon.json"), "-o", str(tmp_path / "again")],
        capture_output=True,
        text=True,
    )

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()


# --- width ----------------------------------------------------------------------------------------------------------


def width_scores(anatomy, seed=0):
    """Return made-up importances of every axis, other ones in each layer."""
    draw, sizes, depth = random.Random(seed), anatomy.sizes, anatomy.depth
    return {
        "hidden": [draw.random() for _ in range(sizes["hidden"])],
        "ffn": [[draw.random() for _ in range(sizes["ffn"])] for _ in range(depth)],
        "heads": [
            [[draw.random() for _ in range(sizes["group"])] for _ in range(sizes["kv_heads"])] for _ in range(depth)
        ],
        "kv_heads": [[draw.random() for _ in range(sizes["kv_heads"])] for _ in range(depth)],
        "experts": [[draw.random() for _ in range(sizes.get("experts", 1))] for _ in range(depth)],
    }


# The option that asks for each axis, and what is asked for of a toy: hidden is heads x 10 where a family derives it.
OPTIONS = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "attention_heads",
    "kv_heads": "key_value_heads",
    "experts": "experts",
}
NARROW = {"hidden": 40, "ffn": 40, "heads": 4, "kv_heads": 2, "experts": 5}


def sizes_for(name):
    sizes = NARROW | ({"kv_heads": 4} if name in DERIVED else {})
    if name not in MIXTURES:
        del sizes["experts"]
    elif name != "qwen3_moe-sparse-step":
        del sizes["ffn"]  # all its layers have experts, whose size has no scores
    return sizes


def options_for(sizes):
    return {OPTIONS[axis]: size for axis, size in sizes.items()}


@pytest.mark.parametrize("criterion", WIDTHS)
@pytest.mark.parametrize("name", toys.TABLED)
def test_a_cut_in_width_and_depth_loads_whole_with_the_sizes_asked_for(name, criterion, toy, tmp_path):
    sizes = sizes_for(name)
    options = {"score": criterion if criterion in METHODS else "block-influence", "protect": (0, 0)}
    if WIDTHS[criterion].input == "text":
        options["width_score"] = criterion
        widths = {criterion: width_scores(open_model(toy(name)).anatomy)}
        options["scores_from"] = record(toy(name), tmp_path / "scores.json", widths=widths)

    surgery = surgeon.prune(toy(name), layers=5, **options_for(sizes), **options)
    surgery.save(tmp_path / "cut")

    model, found = loaded(tmp_path / "cut"), open_model(tmp_path / "cut").anatomy
    assert {axis: found.sizes[axis] for axis in sizes} == sizes
    assert found.depth == 5
    assert found.sizes["head_dim"] == 10
    assert toys.logits(model).isfinite().all()
    assert surgery.plan.steps[0]["prune"]["width_criterion"] == criterion


def best(values, count):
    """Return the places of the largest values, ascending."""
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def rows_of_heads(kept):
    """Return the rows of a toy's query projection that hold `kept[k]` of the four heads of key-value head k."""
    return [(4 * kv + head) * 10 + dim for kv, heads in kept.items() for head in heads for dim in range(10)]


def test_what_adds_most_stays_in_each_layer_in_each_group_and_once_for_the_residual_stream(toy, tmp_path):
    """With layers 1 and 2 gone, layer 1 of the result keeps what the scores of layer 3 say."""
    scores = width_scores(open_model(toy("llama")).anatomy)
    path = record(toy("llama"), tmp_path / "scores.json", widths={"contribution": scores})

    surgeon.prune(
        toy("llama"), layers=4, hidden_size=40, intermediate_size=37, attention_heads=4, scores_from=path
    ).save(tmp_path / "cut")

    before, after = weights(toy("llama")), weights(tmp_path / "cut")
    hidden = best(scores["hidden"], 40)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, hidden])
    for new, old in enumerate([0, 3, 4, 5]):
        layer = {name.split(f"layers.{old}.")[1]: value for name, value in before.items() if f"layers.{old}." in name}
        neurons = best(scores["ffn"][old], 37)
        queries = rows_of_heads({kv: best(scores["heads"][old][kv], 2) for kv in range(2)})
        for name, rows, columns in [
            ("mlp.up_proj", neurons, hidden),
            ("mlp.gate_proj", neurons, hidden),
            ("mlp.down_proj", hidden, neurons),
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("self_attn.v_proj", range(20), hidden),
        ]:
            kept = layer[f"{name}.weight"][list(rows)][:, list(columns)]
            assert torch.equal(after[f"model.layers.{new}.{name}.weight"], kept), (new, name)


def test_whole_groups_go_with_their_key_value_heads(toy, tmp_path):
    scores = width_scores(open_model(toy("llama")).anatomy)
    path = record(toy("llama"), tmp_path / "scores.json", widths={"contribution": scores})

    surgeon.prune(toy("llama"), layers=4, key_value_heads=1, scores_from=path).save(tmp_path / "cut")

    before, after = weights(toy("llama")), weights(tmp_path / "cut")
    stay = [best(scores["kv_heads"][old], 1)[0] for old in (0, 3, 4, 5)]
    assert set(stay) == {0, 1}  # not the same everywhere
    for new, (old, kv) in enumerate(zip((0, 3, 4, 5), stay, strict=True)):
        keys, queries = range(10 * kv, 10 * kv + 10), range(40 * kv, 40 * kv + 40)
        for name, rows in (("k_proj", keys), ("v_proj", keys), ("q_proj", queries)):
            tensor = before[f"model.layers.{old}.self_attn.{name}.weight"]
            assert torch.equal(after[f"model.layers.{new}.self_attn.{name}.weight"], tensor[list(rows)])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-sparse-step", "gpt_oss"])
def test_the_experts_that_add_most_stay_with_their_rows_of_the_router(name, toy, tmp_path):
    scores = width_scores(open_model(toy(name)).anatomy)
    path = record(toy(name), tmp_path / "scores.json", widths={"contribution": scores})

    surgeon.prune(toy(name), layers=4, experts=5, scores_from=path).save(tmp_path / "cut")

    before, after = weights(toy(name)), weights(tmp_path / "cut")
    router, expert = {
        "mixtral": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.{}.w2.weight"),
        "qwen3_moe-sparse-step": ("mlp.gate.weight", "mlp.experts.{}.down_proj.weight"),
        "gpt_oss": ("mlp.router.weight", "mlp.experts.down_proj"),
    }[name]
    seen = 0
    for new, old in enumerate([0, 3, 4, 5]):
        if f"model.layers.{old}.{router}" not in before:
            continue
        seen += 1
        stay = best(scores["experts"][old], 5)
        assert torch.equal(after[f"model.layers.{new}.{router}"], before[f"model.layers.{old}.{router}"][stay])
        if "{}" not in expert:
            kept = before[f"model.layers.{old}.{expert}"][stay]
            assert torch.equal(after[f"model.layers.{new}.{expert}"], kept)
            continue
        for place, number in enumerate(stay):
            old_name, new_name = f"model.layers.{old}.{expert.format(number)}", f"model.layers.{new}.{expert}"
            assert torch.equal(after[new_name.format(place)], before[old_name])
    assert seen == {"qwen3_moe-sparse-step": 1}.get(name, 4)
    loaded(tmp_path / "cut")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("ranking", [None, "activation"])
def test_what_adds_most_or_is_most_active_on_a_text_decides_the_width(ranking, name, speaking, text, tmp_path):
    sizes = sizes_for(name) | {"hidden": 80 if name == "gpt2" else 40}
    sizes |= {"heads": 8, "kv_heads": 8} if name == "gpt2" else {}

    options = {"width_score": ranking, **options_for(sizes)}
    surgery = surgeon.prune(speaking(name), layers=5, data=[text], **TEXT, **options)
    surgery.save(tmp_path / "cut")

    widths = read_scores(tmp_path / "cut/scores.json").widths
    found = widths[ranking or "contribution"]
    assert len(widths) == 1
    anatomy = open_model(tmp_path / "cut").anatomy
    assert {axis: anatomy.sizes[axis] for axis in sizes} == sizes
    again = surgeon.prune(speaking(name), layers=5, scores_from=tmp_path / "cut", **options)
    again.save(tmp_path / "again")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert ("experts" in found) == (name == "qwen3_moe")
    loaded(tmp_path / "cut")


def test_a_width_alone_leaves_all_layers(toy, tmp_path):
    surgery = surgeon.prune(toy("llama"), score="magnitude", intermediate_size=40)
    surgery.save(tmp_path / "cut")

    assert surgery.choice.dropped == ()
    assert surgery.text is None
    assert surgery.plan.layer_map == tuple(range(6))
    before, after = weights(toy("llama")), weights(tmp_path / "cut")
    for layer in range(6):
        parts = [before[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("up", "gate", "down")]
        total = parts[0].abs().sum(1) + parts[1].abs().sum(1) + parts[2].abs().sum(0)
        kept = best(total.tolist(), 40)
        assert torch.equal(after[f"model.layers.{layer}.mlp.up_proj.weight"], parts[0][kept])


def test_uniform_keeps_the_first_layers_and_every_nth_position(toy):
    surgery = surgeon.prune(toy("llama"), score="uniform", layers=3, hidden_size=24, intermediate_size=26)

    assert surgery.plan.layer_map == (0, 1, 2)
    assert surgery.plan.axes["hidden"] == tuple(range(0, 48, 2))
    assert surgery.scores is None


# --- like another model ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """Return a Llama of other sizes than the toy's."""
    sizes = {"hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 4}
    return toys.build("llama", tmp_path / "small", **sizes)


def test_like_another_model_it_has_that_models_shapes_whole_heads_and_one_set_of_channels(small, toy, tmp_path):
    surgeon.prune(toy("llama"), score="uniform", like=small).save(tmp_path / "cut")

    before, after, shapes = weights(toy("llama")), weights(tmp_path / "cut"), weights(small)
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in shapes.items()}
    config, wanted = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "cut", small))
    assert config | {"rms_norm_eps": None} == wanted | {"rms_norm_eps": None}
    loaded(tmp_path / "cut")
    hidden, neurons = list(uniform(48, 36)), list(uniform(52, 40))
    heads = rows_of_heads(dict.fromkeys(range(2), uniform(4, 2)))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, hidden])
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"][:, hidden])
    for layer in range(4):
        for name, rows in (("mlp.up_proj", neurons), ("self_attn.q_proj", heads)):
            tensor = before[f"model.layers.{layer}.{name}.weight"]
            assert torch.equal(after[f"model.layers.{layer}.{name}.weight"], tensor[rows][:, hidden])


def test_like_another_model_heads_may_shrink_by_whole_factors(tmp_path, small):
    toys.build("llama", tmp_path / "big", head_dim=20)

    surgery = surgeon.prune(tmp_path / "big", score="uniform", like=small)
    surgery.save(tmp_path / "cut")

    assert surgery.anatomy.sizes["head_dim"] == 10
    loaded(tmp_path / "cut")
    with pytest.raises(PlanError, match="heads keep their size of 20") as caught:
        surgeon.prune(tmp_path / "big", score="random", like=small)
    assert "--score uniform" in caught.value.hint


def test_like_another_model_says_what_it_does_not_take_over(small, toy):
    tied = surgeon.prune(toy("llama-tied"), score="uniform", like=small)

    assert any(note.startswith("tie_word_embeddings stays true, though") for note in tied.plan.notes)
    assert "lm_head.weight" not in tied.plan.tensors
    untied = surgeon.prune(toy("llama"), score="uniform", like=small)
    assert not any("tie_word_embeddings" in note for note in untied.plan.notes)


def test_like_a_model_that_is_larger_or_speaks_another_vocabulary_is_refused(small, toy, tmp_path):
    toys.build("llama", tmp_path / "wordy", vocab_size=140)

    with pytest.raises(PlanError, match="has a vocabulary of 140, the model of 131"):
        surgeon.prune(toy("llama"), score="uniform", like=tmp_path / "wordy")
    with pytest.raises(PlanError, match="cannot prune hidden from 36 to 48"):
        surgeon.prune(small, score="uniform", like=toy("llama"))
    with pytest.raises(PlanError, match="sizes are given beside a model"):
        surgeon.prune(toy("llama"), score="uniform", like=small, hidden_size=40)
    with pytest.raises(PlanError, match="has no table"):
        surgeon.prune(toys.unheard_of("llama", tmp_path / "unheard"), score="uniform", like=small)


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe-sparse-step", "bloom"])
@pytest.mark.parametrize("target", ["target_parameters", "target_memory"])
def test_the_fewest_layers_go_that_fit_a_budget(target, name, toy):
    """Layers of one model may differ in size: with experts and without."""

    def size(**options):
        spec = surgeon.prune(toy(name), score="last", **options).spec
        return spec.num_parameters if target == "target_parameters" else spec.nbytes

    of_depth = {layers: size(layers=layers) for layers in range(1, 7)}
    for layers in range(1, 7):
        assert size(**{target: of_depth[layers]}) == of_depth[layers]
        if layers < 6:
            assert size(**{target: of_depth[layers + 1] - 1}) == of_depth[layers]


def test_a_budget_that_holds_the_whole_model_removes_nothing(toy):
    surgery = surgeon.prune(toy("llama"), score="last", target_memory="1GB")

    assert surgery.plan.layer_map == tuple(range(6))
    assert surgery.choice.dropped == ()


@pytest.mark.parametrize("budget", [{"target_parameters": 1000}, {"target_memory": 1000}, {"target_parameters": 0}])
def test_a_budget_that_no_layer_fits_is_refused_with_what_is_the_least(budget, toy):
    least = surgeon.prune(toy("llama"), score="last", layers=1).spec.num_parameters

    with pytest.raises(PlanError, match=f"without 5 layers {least:,} parameters .* more than the budget"):
        surgeon.prune(toy("llama"), score="last", **budget)


@pytest.mark.parametrize("target", [math.inf, math.nan])
def test_a_budget_that_is_no_number_is_refused(target, toy):
    with pytest.raises(PlanError):
        surgeon.prune(toy("llama"), score="last", target_parameters=target)


def test_protected_layers_bound_a_budget(toy):
    with pytest.raises(PlanError, match="without 2 layers"):
        surgeon.prune(toy("llama"), score="random", protect=(2, 2), target_parameters=1000)


# --- what is known without weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    """Return a checkpoint of Llama-3.1-8B's headers; its 16 GB of weights are a hole in the file."""
    layer = {
        "input_layernorm.weight": (4096,),
        "self_attn.q_proj.weight": (4096, 4096),
        "self_attn.k_proj.weight": (1024, 4096),
        "self_attn.v_proj.weight": (1024, 4096),
        "self_attn.o_proj.weight": (4096, 4096),
        "post_attention_layernorm.weight": (4096,),
        "mlp.gate_proj.weight": (14336, 4096),
        "mlp.up_proj.weight": (14336, 4096),
        "mlp.down_proj.weight": (4096, 14336),
    }
    shapes = {"model.embed_tokens.weight": (128256, 4096)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}
    tensors = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}
    directory = checkpoint(tmp_path_factory.mktemp("huge") / "llama-8b", torch_dtype="bfloat16", **sizes)
    header = format_header(tensors)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in tensors.values()))
    return directory


def bytes_read():
    """Return how many bytes this process has read from files and pipes."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads by /proc")
@pytest.mark.parametrize("options", [{"layers": 26}, {"score": "random", "layers": 26}, {"target_parameters": 6.73e9}])
def test_llama_8b_without_six_layers_has_6_722_billion_parameters_and_no_weight_is_read(options, llama_8b):
    """8.030 billion less six layers of 218,112,000 (arXiv:2410.09982 has 6.72)."""
    before = bytes_read()
    surgery = surgeon.prune(llama_8b, measure=False, **options)
    summary = surgery.summary()
    read = bytes_read() - before

    assert summary.parameters == (8_030_261_248, 8_030_261_248 - 6 * 218_112_000)
    assert round(summary.parameters[1] / 1e9, 3) == 6.722
    assert summary.layers == (32, 26)
    assert summary.bytes_written == 2 * summary.parameters[1]
    assert read < 1_000_000  # the header is 30 kB; one layer's norm has 8 kB, its smallest matrix 8 MB
    assert surgery.scores is None


def test_a_plan_without_scores_says_so_and_chooses_nothing(toy):
    surgery = surgeon.prune(toy("llama"), layers=4, intermediate_size=40, measure=False)

    assert surgery.choice is None
    assert surgery.text is None
    assert any("No scores yet" in note for note in surgery.plan.notes)
    assert (
        surgery.spec.num_parameters
        == surgeon.prune(toy("llama"), score="random", layers=4, intermediate_size=40).spec.num_parameters
    )
    assert not any("No scores yet" in note for note in surgeon.prune(toy("llama"), score="last", layers=4).plan.notes)


def test_what_cannot_be_is_refused_without_reading_a_weight(toy, tmp_path):
    """The text does not exist: it would be an error of its own, were it looked for."""
    for options, message in [
        ({"layers": 8}, "cannot prune 6 layers to 8"),
        ({"layers": 0}, "a model needs at least one layer"),
        ({"layers": "six"}, "cannot read 'six' as a number of layers"),
        ({"layers": 3, "protect": (2, 2)}, "cannot remove 3 of 6 layers when the first 2 and the last 2 stay"),
        ({"layers": 3, "protect": (-1, 2)}, "cannot protect -1 layers"),
        ({"layers": 3, "score": "taylor"}, "cannot remove 3 of 6 layers when the first 4 and the last 2 stay"),
        ({}, "nothing to prune"),
        ({"layers": 3, "target_memory": "1GB"}, "asked for more than once"),
        ({"target_memory": "1GB", "target_parameters": 5}, "more than the target"),
        ({"target_memory": "lots"}, "cannot read 'lots' as a size"),
        ({"target_memory": "1GB", "hidden_size": 40}, "a budget decides the depth, not the width"),
        ({"layers": 3, "score": "bi"}, "unknown --score 'bi'"),
        ({"layers": 3, "greedy": True}, "angular has no greedy form"),
        ({"layers": 3, "score": "perplexity", "greedy": True, "contiguous": True}, "not as a block"),
        ({"hidden_size": 96}, "cannot prune hidden from 48 to 96"),
        ({"intermediate_size": 0}, "--intermediate-size is 0; the least is 1"),
        ({"attention_heads": 7}, "7 attention heads cannot share 2 key-value heads"),
        ({"attention_heads": 1}, "1 attention heads cannot share 2 key-value heads"),
        ({"attention_heads": 6, "key_value_heads": 1}, "6 heads on 1 key-value heads are 6 a group, more than 4"),
        ({"experts": 2}, "this llama has no experts"),
    ]:
        with pytest.raises(PlanError) as caught:
            surgeon.prune(toy("llama"), data=[str(tmp_path / "none.txt")], **options)
        assert message in str(caught.value), options
        assert caught.value.hint, options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen3_moe", {"experts": 2}, "a token takes 3 experts, and 2 would be left"),
        ("qwen3_moe", {"intermediate_size": 20}, "no layer of this qwen3_moe has MLP neurons"),
        ("lfm2", {"intermediate_size": 20}, "model type 'lfm2' has no table"),
        ("gpt2", {"attention_heads": 4}, "gpt2 derives a head's size from hidden / heads"),
        ("gpt2", {"attention_heads": 4, "key_value_heads": 2, "hidden_size": 40}, "are 2 a group, more than 1"),
    ],
)
def test_what_a_family_cannot_express_is_refused_without_reading_a_weight(name, options, message, toy, tmp_path):
    with pytest.raises(PlanError) as caught:
        surgeon.prune(toy(name), data=[str(tmp_path / "none.txt")], **options)
    assert message in str(caught.value)


def test_what_a_criterion_cannot_choose_is_refused_before_a_text_is_looked_for(small, toy, tmp_path):
    nowhere = [str(tmp_path / "none.txt")]
    toys.build("llama", tmp_path / "big", head_dim=20)

    with pytest.raises(PlanError, match="heads keep their size of 20"):
        surgeon.prune(tmp_path / "big", like=small, data=nowhere)
    with pytest.raises(PlanError, match="the neurons of experts are not ranked by contribution") as caught:
        surgeon.prune(toy("mixtral"), intermediate_size=40, data=nowhere)
    assert "--width-score magnitude" in caught.value.hint
    assert surgeon.prune(toy("mixtral"), width_score="magnitude", intermediate_size=40).anatomy.sizes["ffn"] == 40


@pytest.mark.parametrize(("layers", "heavy"), [(6, False), (5, False), (4, True), (2, True)])
def test_more_than_a_quarter_of_the_layers_is_worth_a_note(layers, heavy, toy):
    notes = surgeon.prune(toy("llama"), score="last", layers=layers).plan.notes

    assert any("more than a quarter" in note for note in notes) == heavy


# --- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"score": "random", "layers": 3}, {"score": "random", "layers": 3, "intermediate_size": 40, "hidden_size": 40}],
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_chain_without_scores_is_one_pass_with_the_bytes_of_its_steps(name, options, toy, tmp_path):
    surgeon.prune(surgeon.truncate(toy(name), layers=5), **options).save(tmp_path / "fused", dtype="bfloat16")

    surgeon.truncate(toy(name), layers=5).save(tmp_path / "five")
    surgeon.prune(tmp_path / "five", **options).save(tmp_path / "steps", dtype="bfloat16")

    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "steps" / file).read_bytes(), file


def test_a_pruning_can_be_continued_and_keeps_its_scores(toy, tmp_path):
    scores = record(toy("llama"), tmp_path / "scores.json")
    pruned = surgeon.prune(toy("llama"), layers=4, scores_from=scores)

    surgeon.truncate(pruned, layers=2).save(tmp_path / "cut")

    assert (tmp_path / "cut/scores.json").read_bytes() == pruned.attachments["scores.json"]
    assert json.loads((tmp_path / "cut/surgeon.json").read_text())["layer_map"] == [0, 3]
    assert_bypasses("llama", toy("llama"), tmp_path / "cut", (1, 2, 4, 5))


def test_pruned_at_random_after_a_scored_cut_it_keeps_the_scores_that_decided(toy, tmp_path):
    scores = record(toy("llama"), tmp_path / "scores.json")
    pruned = surgeon.prune(toy("llama"), layers=4, scores_from=scores)

    again = surgeon.prune(pruned, score="random", layers=3)

    assert again.attachments == pruned.attachments


def test_what_is_not_on_the_disk_yet_is_not_scored(toy, tmp_path):
    begun = surgeon.truncate(toy("llama"), layers=4)

    with pytest.raises(PlanError, match=r"still to be made \(truncate\)") as caught:
        surgeon.prune(begun, layers=3, **TEXT)
    assert "Save it" in caught.value.hint


def test_recorded_scores_are_not_taken_for_a_model_that_is_not_on_the_disk_yet(toy, tmp_path):
    """They are of the source: its layer 3 may be layer 1 by now."""
    scores = record(toy("llama"), tmp_path / "scores.json")
    begun = surgeon.prune(toy("llama"), score="random", layers=4)

    with pytest.raises(PlanError, match="still to be made"):
        surgeon.prune(begun, layers=3, scores_from=scores)


def test_the_default_name_says_what_was_done(toy):
    assert surgeon.prune(toy("llama"), score="last", layers=4).name == "llama-prune-4L"
