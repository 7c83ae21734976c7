"""A cut that is compensated: what is solved, on what, and what the result computes."""

import inspect
import json
import shutil

import pytest
import toys
from later import LATER
from test_prune import give_tokenizer, words

import surgeon
from surgeon.anatomy.halves import ATTENTION, HALVES, MLP, Pairing
from surgeon.errors import CheckpointError, MeasureError, PlanError
from surgeon.plan.solved import REPAIRS, RepairsFile
from surgeon.surgery import Surgery, open_model, open_source
from surgeon.transforms.narrow import Kept, narrow
from surgeon.transforms.prune import prune
from surgeon.transforms.seams import find_sites
from surgeon.verbs.cut_options import PruneOptions

if LATER:
    import torch
    from safetensors.torch import load_file, save_file
    from streamed import padded, plain, plain_states, real_parameters, stream, tokens

    from surgeon.anatomy.outputs import output_maps
    from surgeon.measure import kept, refit
    from surgeon.measure.calibration import Calibration
    from surgeon.measure.candidates import Fitting, Reference
    from surgeon.measure.compensation import Rows, compensate
    from surgeon.measure.refit import FIRST, Sums, solve
    from surgeon.measure.repair import held_out, repair
    from surgeon.measure.scoring import perplexity
    from surgeon.models.streaming import StreamedModel
    from surgeon.plan.planned import PlannedSource
    from surgeon.verbs.compensating import Texts, compensated

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENTIAL = ["llama", "gpt2", "granite", "qwen3", "phi3", "gemma", "opt", "gpt_neox-serial", "deepseek_v3"]
PARALLEL = ["falcon", "gpt_neox", "cohere"]
POST_NORMS = ["gemma2", "gemma3_text", "olmo2", "exaone4", "glm4", "opt-post-norm"]
ROWS = ("--samples", 80, "--sequence-length", 14)


def without(*gone, depth=6):
    """Return the pairing of all halves but these."""
    return Pairing.of_halves([(i, half) for i in range(depth) for half in HALVES if (i, half) not in gone])


def repaired(directory, plan, ids, out):
    """Return a compensated cut that is written to `out`, and what was solved, from the first to the last."""
    begun = open_model(directory)
    texts = Texts(Calibration(ids, {"sources": [], "sha256": "of a test"}))
    source, whole, done = compensated(begun.source, begun.plan, plan, begun.anatomy, texts, device="cpu")
    Surgery(source, whole, begun_with=begun.anatomy).save(out)
    return out, done.record["maps"]


def change_weights(directory, change):
    """Replace weights of a checkpoint by what `change` makes of them."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def error_of(states, wanted):
    """Return the relative error of states, shape (R, T, D), as the fit weighs it."""
    weights = 1 / wanted.norm(dim=-1)
    weights[:, 0] *= FIRST
    missing, whole = (weights[..., None] * each.double() for each in (wanted - states, wanted))
    return float(missing.norm() / whole.norm())


# --- what is solved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SEQUENTIAL, *PARALLEL])
def test_the_states_behind_the_seam_are_as_far_from_the_original_as_the_record_says(name, tmp_path):
    directory, ids = toys.build(name, tmp_path / "model"), tokens(rows=24, length=20)
    plan = prune(open_model(directory).anatomy, dropped=(2, 3))

    out, maps = repaired(directory, plan, ids, tmp_path / "out")

    held = ids[held_out(24)]
    wanted = plain_states(plain(directory), held)[4]
    bare = plain_states(plain(directory), held)[2]
    assert len(maps) == 1
    before, after = maps[0]["held_out"]
    assert before == pytest.approx(error_of(bare, wanted), rel=1e-4)
    assert after == pytest.approx(error_of(plain_states(plain(out), held)[2], wanted), rel=1e-4) or not maps[0]["taken"]
    assert maps[0]["taken"] == (after < before)


def test_a_removed_part_that_is_constant_is_recovered_where_there_is_a_bias(tmp_path):
    directory, ids = toys.build("gpt2", tmp_path / "model"), tokens(rows=24, length=20)

    def only_constants(weights):
        for name in list(weights):
            if ".h.2." in name and name.endswith(("attn.c_proj.weight", "mlp.c_proj.weight")):
                weights[name] = torch.zeros_like(weights[name])

    change_weights(directory, only_constants)
    out, maps = repaired(directory, prune(open_model(directory).anatomy, dropped=(2,)), ids, tmp_path / "out")

    assert maps[0]["tensors"] == ["transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"]
    assert maps[0]["held_out"][1] < 1e-5 < maps[0]["held_out"][0]
    ids = tokens(seed=1)
    with torch.no_grad():
        assert (plain(out)(ids).logits - plain(directory)(ids).logits).abs().max() < 1e-4


def test_layers_that_do_nothing_leave_nothing_to_solve(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=16)

    def silent(weights):
        for name in list(weights):
            if ".layers.2." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = torch.zeros_like(weights[name])

    change_weights(directory, silent)
    out, maps = repaired(directory, prune(open_model(directory).anatomy, dropped=(2,)), ids, tmp_path / "out")

    assert [each["taken"] for each in maps] == [False]
    assert not (out / REPAIRS).exists()
    with torch.no_grad():
        assert torch.equal(plain(out)(ids).logits, plain(directory)(ids).logits)


def test_an_infinite_ridge_is_plain_removal(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=16)
    begun = open_model(directory)
    plan = prune(begun.anatomy, dropped=(2, 3))
    result = StreamedModel(PlannedSource(begun.source, plan), resident=True)

    (found,) = compensate(
        stream(directory), result, Rows(ids, held_out(16)), find_sites(begun.anatomy, plan), ridges=(1e6,)
    )

    assert found[1].is_taken
    bare = prune_to(directory, tmp_path / "bare", drop=[2, 3])
    with torch.no_grad(), result.layer(1):
        new = result.module(1).mlp.down_proj.weight.clone()
    old = load_file(bare / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert 0 < float((new - old).abs().max()) < 1e-4


def prune_to(directory, out, **options):
    surgeon.prune(directory, evaluate=False, **options).save(out)
    return out


def test_rounding_comes_before_judging(tmp_path):
    """The states of a checkpoint in bfloat16 are those that the record speaks of."""
    directory = toys.build("llama", tmp_path / "model", dtype="bfloat16")
    ids = tokens(rows=64, length=20)
    out, maps = repaired(directory, prune(open_model(directory).anatomy, dropped=(2, 3)), ids, tmp_path / "out")

    assert load_file(out / REPAIRS)["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16
    held = ids[held_out(64)]
    wanted = plain_states(plain(directory), held)[4]
    assert maps[0]["held_out"][1] == pytest.approx(error_of(plain_states(plain(out), held)[2], wanted), rel=1e-4)


# --- the rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_enter(left, tmp_path):
    directory, lengths = toys.build("llama", tmp_path / "model"), [12, 7, 12, 9] * 6
    ids = tokens(rows=24)
    begun = open_model(directory)
    plan = prune(begun.anatomy, dropped=(2, 3))

    def found(rows):
        models = stream(directory), StreamedModel(PlannedSource(begun.source, plan))
        return next(compensate(*models, rows, find_sites(begun.anatomy, plan)))[1]

    held = held_out(24)
    ids, real = padded(ids, lengths, left=left)
    other, other_real = padded(tokens(rows=24), lengths, left=left, pad=99)
    one, same = found(Rows(ids, held, real)), found(Rows(other, held, other_real))

    fitted = sum(length for length, is_held in zip(lengths, held, strict=True) if not is_held)
    assert one.num_tokens == (fitted, sum(lengths) - fitted)
    assert one.fit == pytest.approx(same.fit, rel=1e-6)
    right, right_real = padded(tokens(rows=24), lengths, left=not left)
    assert found(Rows(right, held, right_real)).held == pytest.approx(one.held, rel=1e-4)


def test_the_first_token_of_every_row_is_in_the_fit_and_weighs_ten_times(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs, states, wanted = (torch.randn(6, size, generator=generator) for size in (3, 4, 4))
    sums, other = (Sums((3, 4), constant=False) for _ in range(2))
    sums.add(inputs, states, wanted, torch.tensor([True] + [False] * 5))
    other.add(inputs, states, wanted, torch.zeros(6, dtype=torch.bool))
    one = (inputs[0] / wanted[0].norm())[:, None] @ (inputs[0] / wanted[0].norm())[None]
    assert torch.allclose(sums.gram - other.gram, (FIRST**2 - 1) * one.double(), rtol=1e-5)

    names = {
        name for name in PruneOptions.__dataclass_fields__ if "first" in name or "sink" in name or "position" in name
    }
    assert not names  # no option takes it out
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=8)
    _, maps = repaired(directory, prune(open_model(directory).anatomy, dropped=(2,)), ids, tmp_path / "out")
    assert maps[0]["tokens"] == [7 * ids.shape[1], ids.shape[1]]


def test_held_out_rows_choose_the_ridge():
    """Where the fit has few rows the largest ridge is best, and what is exactly linear takes none."""
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(400, dtype=torch.bool)
    truth = torch.randn(8, 4, generator=generator)

    def sums(rows, noise):
        inputs, states = (torch.randn(rows, size, generator=generator) for size in (8, 4))
        wanted = states + inputs @ truth + noise * torch.randn(rows, 4, generator=generator)
        made = Sums((8, 4), constant=False)
        made.add(inputs, states, wanted, first[:rows])
        return made

    noisy = solve(sums(10, 20.0), sums(400, 20.0))
    exact = solve(sums(40, 0.0), sums(400, 0.0))
    assert noisy.ridge == max(refit.RIDGES)
    assert exact.ridge == refit.LINEAR_RIDGE
    assert (exact.change - truth).abs().max() < 1e-5


def test_of_texts_in_turns_all_are_held_out_alike():
    for texts in range(1, 9):
        turns = torch.arange(8 * 8 * texts)[held_out(8 * 8 * texts)] % texts
        assert len(turns) == 8 * texts
        assert min(turns.tolist().count(text) for text in range(texts)) >= 2
    assert held_out(8).tolist() == [False] * 7 + [True]
    assert held_out(3).tolist() == [False, False, True]


def test_one_row_is_too_few(tmp_path):
    directory = toys.build("llama", tmp_path / "model")
    with pytest.raises(MeasureError, match="1 row of text"):
        repaired(directory, prune(open_model(directory).anatomy, dropped=(2,)), tokens(rows=1), tmp_path / "out")


def test_one_layer_of_each_model_is_in_memory(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=8)
    begun = open_model(directory)
    plan = prune(begun.anatomy, pairing=without((1, MLP), (2, ATTENTION), (4, ATTENTION), (4, MLP)))
    models = stream(directory), StreamedModel(PlannedSource(begun.source, plan))
    seen = []

    def look(_):
        seen.append([sum(bool(real_parameters(model.module(i))) for i in range(model.depth)) for model in models])

    steps = list(compensate(*models, Rows(ids, held_out(8)), find_sites(begun.anatomy, plan), progress=look))

    assert [site.map.weight for site, _ in steps] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ]
    assert max(map(sum, seen)) <= 2
    assert all(count <= 1 for counts in seen for count in counts)


def test_states_that_are_many_go_through_a_file(tmp_path, monkeypatch):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=24, length=20)
    plan = prune(open_model(directory).anatomy, pairing=without((1, MLP), (2, ATTENTION), (4, ATTENTION), (4, MLP)))
    _, in_memory = repaired(directory, plan, ids, tmp_path / "one")
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    _, in_file = repaired(directory, plan, ids, tmp_path / "two")
    assert in_memory == in_file


# --- width --------------------------------------------------------------------------------------------------------


def test_kept_neurons_absorb_those_that_are_linear_in_them(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=24, length=20)

    def copy_neurons(weights):
        for name in list(weights):
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                weights[name][40:] = weights[name][:12] * (0.3 if "up" in name else 1.0)

    change_weights(directory, copy_neurons)
    anatomy = open_model(directory).anatomy
    plan = narrow(anatomy, Kept(ffn={layer: tuple(range(40)) for layer in range(6)}))
    out, maps = repaired(directory, plan, ids, tmp_path / "out")

    assert [each["reason"] for each in maps] == ["12 inputs fewer"] * 6
    assert max(each["held_out"][1] for each in maps) < 1e-5 < min(each["held_out"][0] for each in maps)
    new = tokens(seed=1)
    with torch.no_grad():
        assert (plain(out)(new).logits - plain(directory)(new).logits).abs().max() < 1e-4


def test_kept_heads_absorb_those_that_are_linear_in_them(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=24, length=20)
    size = 10

    def copy_heads(weights):
        for name in list(weights):
            if name.endswith("q_proj.weight"):  # heads 1 and 3 of each group of 4 are heads 0 and 2
                heads = weights[name].view(2, 4, size, -1)
                heads[:, 1::2] = heads[:, ::2].clone()

    change_weights(directory, copy_heads)
    anatomy = open_model(directory).anatomy
    plan = narrow(anatomy, Kept(heads=dict.fromkeys(range(6), ((0, 2), (0, 2)))))
    out, maps = repaired(directory, plan, ids, tmp_path / "out")

    assert [each["tensors"][0] for each in maps] == [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(6)]
    assert max(each["held_out"][1] for each in maps) < 1e-5
    new = tokens(seed=1)
    with torch.no_grad():
        assert (plain(out)(new).logits - plain(directory)(new).logits).abs().max() < 1e-4


def test_depth_and_all_widths_are_repaired_from_left_to_right(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=24, length=20)
    plan = prune(
        open_model(directory).anatomy,
        dropped=(3,),
        sizes={"hidden": 40, "ffn": 44, "heads": 4, "kv_heads": 2, "head_dim": 10},
        criterion="uniform",
    )

    out, maps = repaired(directory, plan, ids, tmp_path / "out")

    order = [f"model.layers.{i}.{half}.weight" for i in range(5) for half in ("self_attn.o_proj", "mlp.down_proj")]
    assert [each["tensors"][0] for each in maps] == order
    assert maps[5]["reason"] == "in front of layer 3, 8 inputs fewer"
    channels = list(plan.axes["hidden"])
    held = ids[held_out(24)]
    wanted = plain_states(plain(directory), held)[6][..., channels]
    last = error_of(plain_states(plain(out), held)[5], wanted)
    assert last == pytest.approx(maps[-1]["held_out"][1 if maps[-1]["taken"] else 0], rel=1e-4)


# --- half layers, and candidates ----------------------------------------------------------------------------------

CUTS = [
    ((2, ATTENTION), (2, MLP)),
    ((1, MLP), (2, ATTENTION)),
    ((1, MLP), (2, ATTENTION), (2, MLP), (3, ATTENTION)),
    ((5, ATTENTION), (5, MLP)),
    ((0, ATTENTION), (0, MLP), (3, ATTENTION), (3, MLP)),
]


def test_candidates_are_worth_what_their_repaired_checkpoints_are(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=24, length=20)
    candidates = [without(*gone) for gone in CUTS]
    judge = tokens(rows=3, length=20, seed=1)
    whole = stream(directory)
    reference, fitting = (Reference(whole, rows) for rows in (judge, ids))

    outcomes = reference.measure(candidates, repair=(again := Fitting(fitting)))

    for number, candidate in enumerate(candidates):
        plan = prune(open_model(directory).anatomy, pairing=candidate)
        out, maps = repaired(directory, plan, ids, tmp_path / str(number))
        assert outcomes[number].perplexity == pytest.approx(perplexity(open_source(out), judge), rel=1e-6)
        assert maps
    known = reference.measure(candidates, repair=again)  # from the solved maps that it keeps
    assert [each.mean("loss") for each in known] == [each.mean("loss") for each in outcomes]
    bare = reference.measure(candidates)
    assert sum(one.mean("loss") != other.mean("loss") for one, other in zip(outcomes, bare, strict=True)) > 2


def test_an_attention_in_front_of_what_is_missing_is_solved_with_the_mlp_before_it(tmp_path):
    directory, ids = toys.build("llama", tmp_path / "model"), tokens(rows=24, length=20)
    plan = prune(open_model(directory).anatomy, pairing=without((3, MLP), (4, ATTENTION)))

    out, maps = repaired(directory, plan, ids, tmp_path / "out")

    assert [each["tensors"][0].split("layers.")[1] for each in maps] == [
        "2.mlp.down_proj.weight",
        "3.self_attn.o_proj.weight",
    ]
    held = ids[held_out(24)]
    inside = {}
    for name, place, model in (("wanted", 4, plain(directory)), ("found", 3, plain(out))):
        hook = toys.stacks(model)[0][place].post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, name=name: inside.update({name: args[0].clone()})
        )
        plain_states(model, held)
        hook.remove()
    assert maps[1]["held_out"][1] == pytest.approx(error_of(inside["found"], inside["wanted"]), rel=1e-4)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POST_NORMS)
def test_a_norm_behind_the_map_is_refused_before_anything_is_read(name, tmp_path):
    directory = toys.build(name, tmp_path / "model")
    with pytest.raises(PlanError, match="do not add what their output maps put out"):
        surgeon.prune(directory, drop=[2], compensate=True, data=[str(tmp_path / "none.txt")])


def test_a_map_behind_which_something_else_happens_is_found_out_by_its_rows(tmp_path):
    model = stream(toys.build("gemma2", tmp_path / "model"))
    batches = model.embed(tokens(rows=4))
    states = [batch.hidden for batch in batches]
    known = output_maps(model.anatomy)[0, MLP]
    with model.layer(0) as apply, torch.no_grad(), pytest.raises(MeasureError, match="times a constant"):
        repair(model, known, apply, batches, states, states, held_out(4))


@pytest.mark.parametrize(
    ("name", "message"),
    [("mixtral", "no layer of this mixtral"), ("qwen3_moe-sparse-step", "stands in front of layer 2, and has")],
)
def test_experts_in_front_of_what_is_missing_are_refused(name, message, tmp_path):
    directory = toys.build(name, tmp_path / "model")
    with pytest.raises(PlanError, match=message):
        surgeon.prune(directory, drop=[2], compensate=True, measure=False)


def test_a_shared_expert_that_is_added_as_it_is_can_be_solved(tmp_path):
    directory, ids = toys.build("deepseek_v3", tmp_path / "model"), tokens(rows=24, length=20)
    out, maps = repaired(directory, prune(open_model(directory).anatomy, dropped=(4,)), ids, tmp_path / "out")
    assert maps[0]["tensors"] == ["model.layers.3.mlp.shared_experts.down_proj.weight"]
    assert maps[0]["held_out"][1] < maps[0]["held_out"][0]
    held = ids[held_out(24)]
    wanted = plain_states(plain(directory), held)[5]
    assert maps[0]["held_out"][1] == pytest.approx(error_of(plain_states(plain(out), held)[4], wanted), rel=1e-4)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory):
    """Return a Llama with a tokenizer. Read-only."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(toy("llama"), directory)
    return give_tokenizer(directory)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(2000))
    return path


def test_the_receipt_says_what_was_solved_on_which_text_and_makes_the_same_bytes_without_it(model, text, tmp_path, run):
    made = run("prune", model, "--drop", "2,3", "--compensate", "--data", text, *ROWS, "-o", tmp_path / "cut", "--json")
    text.unlink()
    again = run("run", tmp_path / "cut/surgeon.json", "-o", tmp_path / "again")

    assert made.code == again.code == 0, made.err + again.err
    for file in ("model.safetensors", REPAIRS):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    record = json.loads((tmp_path / "cut/surgeon.json").read_text())["steps"][0]["prune"]["compensation"]
    assert record == json.loads(made.out)["compensation"]
    (solved,) = record["maps"]
    assert solved["tensors"] == ["model.layers.1.mlp.down_proj.weight"]
    assert solved["reason"] == "in front of layers 2-3"
    assert solved["tokens"] == [70 * 14, 10 * 14]
    assert record["text"]["sources"][0]["data"] == str(text)
    assert record["held_out"]["rows"] == 10
    card = (tmp_path / "cut/README.md").read_text()
    assert "compensated: model.layers.1.mlp.down_proj.weight was solved anew in front of layers 2-3" in card
    assert str(tmp_path) not in (tmp_path / "cut" / REPAIRS).read_bytes()[:4096].decode("utf-8", "ignore")


def test_repairs_that_have_changed_are_not_replayed(model, text, tmp_path, run):
    run("prune", model, "--drop", "2,3", "--compensate", "--data", text, *ROWS, "-o", tmp_path / "cut")
    change_weights_of = load_file(tmp_path / "cut" / REPAIRS)
    save_file({name: weight + 1 for name, weight in change_weights_of.items()}, tmp_path / "cut" / REPAIRS)
    found = run("run", tmp_path / "cut/surgeon.json", "-o", tmp_path / "again")
    assert found.code == 1
    assert "has changed since" in found.err


def test_repairs_are_taken_from_a_file_for_the_same_cut_alone(model, text, tmp_path, run):
    cut, again = tmp_path / "cut", tmp_path / "again"
    run("prune", model, "--drop", "2,3", "--compensate", "--data", text, *ROWS, "-o", cut)

    taken = run("prune", model, "--drop", "2,3", "--repairs-from", cut / REPAIRS, "--no-evaluate", "-o", again)
    other = run("prune", model, "--drop", "2", "--repairs-from", cut, "--no-evaluate", "-o", tmp_path / "other")
    none = run("prune", model, "--drop", "2", "--repairs-from", model, "--no-evaluate", "-o", tmp_path / "other")

    assert taken.code == 0, taken.err
    assert (cut / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert other.err.startswith(f"error: the repairs in {cut} are of another cut than this one")
    assert none.err.startswith(f"error: there is no file {model / REPAIRS}")


def test_a_file_that_says_nothing_is_no_file_of_repairs(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / REPAIRS)
    with pytest.raises(CheckpointError, match="holds no repairs that this surgeon wrote"):
        _ = RepairsFile(tmp_path, "it", REPAIRS).record


def test_a_text_of_its_own_judges(model, text, tmp_path, run):
    other = tmp_path / "other.txt"
    other.write_text(words(2000)[::-1])
    options = ("--drop", "2,3", "--compensate", "--data", text, "--eval-data", other, *ROWS)

    made = json.loads(run("prune", model, *options, "-o", tmp_path / "cut", "--json").out)

    assert made["compensation"]["maps"][0]["tokens"] == [80 * 14, 80 * 14]
    assert made["compensation"]["held_out"]["sources"][0]["data"] == str(other)
    rows = ("--samples", 80, "--sequence-length", 14)
    judged = [
        json.loads(run("evaluate", each, "--data", other, *rows, "--json").out) for each in (model, tmp_path / "cut")
    ]
    assert list(made["perplexity"].values()) == pytest.approx([each["perplexity"] for each in judged], rel=1e-4)


def test_a_dry_run_says_what_would_be_solved_and_a_cut_at_the_start_that_nothing_can_be(model, tmp_path, run):
    planned = run("prune", model, "--drop", "2,3", "--compensate", "--dry-run")
    at_start = run("prune", model, "--drop", "0,3", "--compensate", "--dry-run")

    assert "model.layers.1.mlp.down_proj.weight  would be solved, in front of layers 2-3" in planned.out
    assert "in front of layer 3" in at_start.out
    assert "nothing stands in front of what is missing at the start" in at_start.out


def test_a_cut_at_the_start_alone_is_written_as_it_is(model, text, tmp_path, run):
    options = ("--drop", "0", "--data", text, *ROWS, "--no-evaluate")
    bare = run("prune", model, *options, "-o", tmp_path / "bare")
    made = run("prune", model, *options, "--compensate", "-o", tmp_path / "cut")

    assert bare.code == made.code == 0, made.err
    assert "nothing stands in front of what is missing at the start" in made.out
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("bare", "cut")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "cut" / REPAIRS).exists()


def test_later_surgeries_leave_the_file_of_repairs_behind(model, text, tmp_path, run):
    run("prune", model, "--drop", "2,3", "--compensate", "--data", text, *ROWS, "-o", tmp_path / "cut")
    run("truncate", tmp_path / "cut", "--layers", 2, "-o", tmp_path / "short")
    assert (tmp_path / "cut" / REPAIRS).exists()
    assert not (tmp_path / "short" / REPAIRS).exists()


def test_the_engine_says_its_signature():
    """The search of a cut calls it so."""
    assert list(inspect.signature(Reference.measure).parameters) == ["self", "candidates", "repair", "progress"]


def test_with_a_text_a_cut_is_compensated_unless_it_is_not_wanted(model, text, tmp_path, run):
    cut = ("prune", model, "--drop", "2,3", "--data", text, *ROWS, "--no-evaluate")

    by_default, bare = run(*cut, "-o", tmp_path / "cut"), run(*cut, "--no-compensate", "-o", tmp_path / "bare")
    unread = run("prune", model, "--drop", "2,3", "-o", tmp_path / "unread")

    assert (by_default.code, bare.code, unread.code) == (0, 0, 0)
    assert (tmp_path / "cut" / REPAIRS).exists()
    assert not (tmp_path / "bare" / REPAIRS).exists()
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("bare", "unread")]
    assert both[0] == both[1]


def test_a_cut_is_left_bare_with_the_reason_where_a_fit_was_not_asked_for_and_cannot_be(
    model, text, tmp_path, run, monkeypatch
):
    cut = ("prune", model, "--drop", "2,3", "--data", text, "--sequence-length", 14, "--no-evaluate")

    one_row = run(*cut, "--samples", 1, "-o", tmp_path / "one")
    monkeypatch.setattr("surgeon.models.device.available_memory", lambda device: 1000)
    no_room = run(*cut, "--samples", 4, "-o", tmp_path / "two")
    insisted = run(*cut, "--samples", 1, "--compensate", "-o", tmp_path / "three")

    assert "not compensated: one row of text leaves none to judge a fit by" in one_row.out
    assert "more than half of what is free; --compensate insists" in no_room.out
    assert insisted.code == 1
    assert "needs one to fit and one to be judged by" in insisted.err
