"""`surgeon prune` with a target: the cut that is made is the one that was measured, within the target, and resumed."""

import json
import shutil

import pytest
from handmade import checkpoint
from later import LATER
from test_prune import give_tokenizer, words
from test_prune_cli import refused

import surgeon
from surgeon.anatomy.halves import Pairing
from surgeon.search.record import read_search

if LATER:
    import matplotlib.image
    import torch
    import toys
    from streamed import mean_loss, plain, stream

    from surgeon.measure.candidates import Reference
    from surgeon.measure.search_text import search_text
    from surgeon.measure.token_time import DeviceMeter
    from surgeon.plan.planned import PlannedSource
    from surgeon.surgery import open_source

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ("--samples", 8, "--sequence-length", 12)
CLOSE = 1e-4  # KL of order 1, from float32 logits


@pytest.fixture(scope="module")
def place(toy, tmp_path_factory):
    """Return a directory with a Llama of six layers that has a tokenizer, and two texts. Read-only."""
    directory = tmp_path_factory.mktemp("search")
    shutil.copytree(toy("llama"), directory / "llama")
    give_tokenizer(directory / "llama")
    for seed, name in enumerate(("a.txt", "b.txt")):
        (directory / name).write_text(words(400, seed))
    return directory


def command(place, out, *more, target="80k"):
    texts = ("--data", place / "a.txt", "--eval-data", place / "b.txt")
    return ("prune", place / "llama", "--target-parameters", target, *texts, *ROWS, "-o", out, *more)


@pytest.fixture(scope="module")
def found(place, tmp_path_factory):
    """Return the result of a search over everything, and where it is. Read-only."""
    out = tmp_path_factory.mktemp("found") / "cut"
    searched = surgeon.prune(
        place / "llama",
        target_parameters="80k",
        data=[str(place / "a.txt")],
        eval_data=[str(place / "b.txt")],
        samples=8,
        sequence_length=12,
        evaluations=12,
        over="layers,halves,intermediate-size",
    )
    searched.save(out)
    return searched, out


def test_the_result_is_within_the_target_and_its_record_holds_every_cut(found):
    searched, out = found
    record = read_search(out / "search.json")

    parameters = sum(p.numel() for p in toys.load(out)[0].parameters())
    assert parameters == record.chosen.cost.parameters <= 80_000
    assert len(record.points) == 12
    assert record.to_dict() == searched.record.to_dict()
    assert {point.within for point in record.points} == {True, False}  # some on the way to the target
    assert all((point.cost.parameters <= 80_000) == point.within for point in record.points)
    assert set(record.chosen.confirmed) == {str(searched.reads["--data"][0]), str(searched.reads["--eval-data"][0])}


def test_what_was_measured_is_what_the_written_result_computes(place, found):
    searched, out = found
    texts = [str(place / name) for name in ("a.txt", "b.txt")]
    amount = {"samples": 8, "sequence_length": 12, "device": "cpu", "seed": 0}
    rows = search_text(open_source(str(place / "llama")), texts[:1], texts[1:], **amount).search

    with torch.no_grad():
        logits, cut_logits = (plain(at)(rows).logits for at in (place / "llama", out))
    whole, cut = (torch.log_softmax(each[:, :-1], -1) for each in (logits, cut_logits))

    point = searched.record.chosen
    assert point.worth.kl == pytest.approx(float((whole.exp() * (whole - cut)).sum(-1).mean()), abs=CLOSE)
    assert point.worth.acceptance == pytest.approx(
        float(torch.minimum(whole.exp(), cut.exp()).sum(-1).mean()), abs=CLOSE
    )
    assert point.worth.loss == pytest.approx(float(mean_loss(cut_logits, rows)), abs=CLOSE)


def test_any_point_of_a_search_can_be_cut_without_running_the_model(place, found, tmp_path, run):
    record = found[0].record
    other = next(point for point in record.points[1:] if point.widths and point.within)
    again = ("prune", place / "llama", "--scores-from", found[1] / "search.json", "--json")

    made = json.loads(run(*again, "--point", other.number, "-o", tmp_path / "other").out)
    ended = run(*again, "--repairs-from", found[1], "-o", tmp_path / "first")
    assert ended.code == 0, ended.err
    first = json.loads(ended.out)

    assert made["parameters"]["after"] == other.cost.parameters
    assert made["search"]["chosen"]["point"] == other.number
    config = json.loads((tmp_path / "other/config.json").read_text())
    names = {"ffn": "intermediate_size", "hidden": "hidden_size", "kv_heads": "num_key_value_heads"}
    assert {axis: config[names[axis]] for axis in other.widths} == other.widths
    assert first["search"]["chosen"]["point"] == 1
    assert (tmp_path / "first/model.safetensors").read_bytes() == (found[1] / "model.safetensors").read_bytes()


def test_a_receipt_makes_the_cut_again_and_the_record_stays_with_the_result(found, tmp_path, run):
    made = run("run", found[1] / "surgeon.json", "-o", tmp_path / "again")
    further = run("truncate", found[1], "--layers", 2, "-o", tmp_path / "further")

    assert (made.code, further.code) == (0, 0), made.err + further.err
    assert (tmp_path / "again/model.safetensors").read_bytes() == (found[1] / "model.safetensors").read_bytes()
    assert not (tmp_path / "further/search.json").exists()


def test_a_repaired_cut_is_measured_as_it_is_written(place, tmp_path):
    texts = [str(place / name) for name in ("a.txt", "b.txt")]
    amount = {"samples": 24, "sequence_length": 12, "seed": 0}
    searched = surgeon.prune(
        place / "llama",
        score="search",
        layers=4,
        data=texts[:1],
        eval_data=texts[1:],
        evaluations=4,
        compensate=True,
        **amount,
    )
    searched.save(tmp_path / "cut")
    rows = search_text(open_source(str(place / "llama")), texts[:1], texts[1:], device="cpu", **amount)

    with torch.no_grad():
        losses = {
            name: float(mean_loss(plain(tmp_path / "cut")(own).logits, own)) for name, own in rows.confirm.items()
        }
        loss = float(mean_loss(plain(tmp_path / "cut")(rows.search).logits, rows.search))

    point = searched.record.chosen
    assert searched.compensation is not None
    assert any(entry["taken"] for entry in searched.compensation.record["maps"])
    assert point.worth.loss == pytest.approx(loss, abs=CLOSE)
    assert {name: worth.loss for name, worth in point.confirmed.items()} == pytest.approx(losses, abs=CLOSE)


def test_no_row_serves_twice(place):
    texts = [str(place / name) for name in ("a.txt", "b.txt")]
    amount = {"samples": 8, "sequence_length": 12, "device": "cpu", "seed": 0}
    one = search_text(open_source(str(place / "llama")), texts[:1], texts[1:], **amount)
    two = search_text(open_source(str(place / "llama")), texts, (), **amount)

    for text in (one, two):
        parts = [text.search, text.fit, *text.confirm.values(), *([] if text.watch is None else [text.watch])]
        rows = [tuple(row.tolist()) for part in parts for row in part]
        assert len(rows) == len(set(rows))
        assert {tuple(row.tolist()) for row in text.screen} <= {tuple(row.tolist()) for row in text.search}
    assert two.watch is None
    mixed = [place.joinpath(name).read_text().split()[:12] for name in ("a.txt", "b.txt")]
    assert [[f"w{token}" for token in row.tolist()] for row in two.search] == mixed  # one of each


def test_a_narrower_model_is_compared_with_the_one_that_it_comes_from(place):
    model = place / "llama"
    narrow = surgeon.prune(model, score="uniform", intermediate_size=40, hidden_size=40)
    tokens = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    whole = Reference(stream(model), tokens)

    from surgeon.models.streaming import StreamedModel

    planned = StreamedModel(PlannedSource(narrow.source, narrow.plan))
    outcome = Reference(planned, tokens, against=whole).measure(
        [Pairing.of_layers(range(6)), Pairing.of_layers((0, 5))]
    )

    assert outcome[0].mean("kl") > 0.01
    assert outcome[1].mean("kl") != outcome[0].mean("kl")
    alone = Reference(planned, tokens).whole
    assert outcome[0].mean("loss") == pytest.approx(alone.mean("loss"))
    assert alone.mean("kl") == 0


def test_a_search_that_is_asked_again_measures_nothing_and_writes_the_same(place, tmp_path, run):
    more = ("--over", "layers,halves", "--evaluations", 8, "--search-dir", tmp_path / "state", "--json")
    first = json.loads(run(*command(place, tmp_path / "a", *more)).out)
    state = (tmp_path / "state/search.json").read_bytes()

    second = json.loads(run(*command(place, tmp_path / "b", *more)).out)

    assert second["search"]["chosen"] == first["search"]["chosen"]
    assert json.loads((tmp_path / "state/search.json").read_bytes())["measured"] == json.loads(state)["measured"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert second["search"]["effort"]["passes"] < first["search"]["effort"]["passes"]
    assert first["score"] == "search"
    assert first["search"]["objective"] == "kl"
    assert first["layers"]["after"] == len(first["search"]["chosen"]["attention"])


def test_the_summary_names_the_best_few_and_the_state_goes_with_the_result(place, tmp_path, run):
    picture = tmp_path / "search.png"
    more = ("--over", "layers", "--evaluations", 6, "--objective", "loss", "--plot", picture)

    outcome = run(*command(place, tmp_path / "cut", *more))

    assert outcome.code == 0, outcome.err
    lines = {line.split("  ")[1]: line for line in outcome.out.splitlines() if line.startswith("  ")}
    assert "6 cuts measured" in lines["search"]
    assert all(word in lines["point 1"] for word in ("without layers", "KL", "loss on b.txt", "acceptance", "draft"))
    assert "±" in lines["point 2"]
    assert not (tmp_path / "cut.search").exists()
    assert matplotlib.image.imread(picture).shape[0] > 500


def test_a_depth_can_be_searched_and_a_dry_run_needs_no_text(place, run):
    found = json.loads(run("prune", place / "llama", "--score", "search", "--layers", 4, "--dry-run", "--json").out)
    budget = run("prune", place / "llama", "--target-parameters", "80K", "--dry-run")

    assert found["layers"] == {"before": 6, "after": 4}
    assert found["dropped"] is None
    assert "No search yet" in budget.out


def test_a_named_score_keeps_its_meaning_with_a_target(place, run):
    found = json.loads(
        run("prune", place / "llama", "--score", "last", "--target-parameters", "80k", "--dry-run", "--json").out
    )

    assert found["dropped"] == [2, 3, 4]  # the fewest: 64,176 are left
    assert found["score"] == "last"


@pytest.mark.parametrize(
    ("options", "message", "hint", "code"),
    [
        (("--target-parameters", "1k"), "the smallest result that can be searched has", "--over", 1),
        (("--target-parameters", "x"), "cannot read 'x' as a number of parameters", "100M", 2),
        (("--target-parameters", "80k", "--greedy"), "a search chooses what goes, and --greedy does too", "", 2),
        (("--target-parameters", "80k", "--over", "layer"), "unknown --over 'layer'", "layers, halves", 2),
        (("--target-parameters", "80k", "--over", "experts"), "has no other legal experts", "", 1),
        (("--target-parameters", "80k", "--context", 8), "--context counts towards no target", "", 2),
        (("--score", "search"), "how small the result is to be", "--layers", 2),
        (("--layers", 4, "--over", "layers"), "--over is for a search", "--score angular", 2),
        (("--layers", 4, "--point", 2), "--point is for a search", "", 2),
        (("--target-latency", 0), "cannot read 0.0 as a time", "12.5", 2),
        (("--target-parameters", "80k", "--time-limit", "soon"), "cannot read 'soon' as a time", "30m", 2),
        (("--target-parameters", "80k", "--curve"), "a search measures what it needs", "", 2),
        (("--scores-from", "nowhere/search.json"), "search.json", "", 1),
        (("--target-memory", "300kB", "--context", 999, "--data", "{a}"), "longer than the 64 positions", "64", 1),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_measured(
    options, message, hint, code, place, tmp_path, run
):
    options = [str(word).format(a=place / "a.txt") for word in options]

    refused(run("prune", place / "llama", *options, "-o", tmp_path / "cut"), message, hint, code=code)

    assert not (tmp_path / "cut").exists()


def test_a_search_that_is_not_finished_is_refused_as_scores(place, tmp_path, run):
    state = tmp_path / "search.json"
    state.write_text(json.dumps({"format": 1, "request": {}, "measured": []}))

    refused(run("prune", place / "llama", "--scores-from", state), "is not finished", "it goes on")


# --- memory and time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_bytes_of_a_cache_are_those_that_transformers_keeps(name, toy):
    anatomy = surgeon.open_model(toy(name)).anatomy
    meter = DeviceMeter(anatomy, "cpu", torch.float32, context=20)
    pairing = Pairing.of_layers(range(anatomy.depth))

    counted = meter.cache(None, pairing)

    model = plain(toy(name))
    with torch.no_grad():
        cache = model(torch.full((1, 20), 5), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert counted == kept
    halved = meter.cache(None, Pairing.of_layers((0, 1, 2)))
    assert halved == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers[:3])


def test_the_time_of_a_token_is_that_of_its_layers_and_of_what_is_around_them(toy):
    anatomy = surgeon.open_model(toy("llama")).anatomy
    meter = DeviceMeter(anatomy, "cpu", torch.float32, times=True)

    whole = meter.milliseconds(None, Pairing.of_layers(range(6)))
    less = meter.milliseconds(None, Pairing.of_layers(range(4)))

    around, layer = meter.known["around 0 0"], meter.known["layer 0 0"]
    assert whole == pytest.approx(around + 6 * layer)
    assert less == pytest.approx(around + 4 * layer)
    assert layer > 0
    assert meter.cache(None, Pairing.of_layers(range(6))) is None


def test_memory_with_a_cache_is_a_target(place, tmp_path, run):
    whole = surgeon.open_model(place / "llama").anatomy
    cache = 6 * 2 * 2 * 10 * 60 * 4  # layers, keys and values, heads, dims, tokens, bytes
    target = whole.spec.nbytes + cache - 1000
    options = ("--target-memory", target, "--context", 60, "--over", "layers", "--evaluations", 4)

    found = json.loads(
        run("prune", place / "llama", *options, "--data", place / "a.txt", *ROWS, "-o", tmp_path / "cut", "--json").out
    )

    chosen = found["search"]["chosen"]
    assert found["layers"]["after"] == 5
    assert chosen["cache_bytes"] == cache * 5 // 6
    assert chosen["bytes"] + chosen["cache_bytes"] <= target


def test_a_hand_made_record_of_another_model_is_refused(found, tmp_path, run):
    other = checkpoint(tmp_path / "other")

    refused(run("prune", other, "--scores-from", found[1] / "search.json"), "is of other weights than those of")


def test_a_time_is_a_target(place):
    texts = {"data": [str(place / "a.txt")], "samples": 8, "sequence_length": 12}

    met = surgeon.prune(place / "llama", target_latency=1e6, over="layers", **texts)

    assert met.plan.layer_map == tuple(range(6))
    with pytest.raises(surgeon.errors.PlanError, match=r"the smallest result that can be searched has .* ms a token"):
        surgeon.prune(place / "llama", target_latency=1e-6, over="layers", **texts)


def test_a_point_is_compensated_on_a_text_that_is_given_and_else_said_to_be_bare(place, found, tmp_path, run):
    again = ("prune", place / "llama", "--scores-from", found[1] / "search.json", "--point", 2)
    number = found[0].record.point(2).number

    bare = run(*again, "-o", tmp_path / "bare")
    repaired = run(*again, "--data", place / "a.txt", *ROWS, "-o", tmp_path / "repaired")

    assert number == 2
    assert "the search measured this cut compensated, and here it is bare" in bare.out + bare.err
    assert not (tmp_path / "bare/repairs.safetensors").exists()
    assert repaired.code == 0, repaired.err
    assert "here it is bare" not in repaired.out + repaired.err
    assert "solved" in repaired.out
