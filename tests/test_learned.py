"""Learned growth: what is trained, that the file holds it, and that the better of learned and exact is kept."""

import json
import shutil

import pytest
import toys
from later import LATER
from test_prune import give_tokenizer

import surgeon
from surgeon.checkpoint.header import TensorSpec
from surgeon.errors import CheckpointError, DataError, PlanError
from surgeon.options import OptionError
from surgeon.plan.operators import OPERATOR, PREFIX, OperatorFile, open_operator, with_operator
from surgeon.plan.planned import PlannedSource
from surgeon.plan.solved import SolvedWriter
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.grow import growth
from surgeon.transforms.learned import TRAINED, learned

if LATER:
    import torch
    from exact64 import HIDDEN
    from safetensors.torch import load_file
    from transformers import AutoModelForSeq2SeqLM

    from surgeon.growth.operator import Operator
    from surgeon.models.skeleton import build_skeleton
    from surgeon.train.reporter import Reporter
    from surgeon.verbs.compensating import bytes_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Depth and width together, and each kind of map: of the stream, of heads, of neurons and experts. Fused projections
# (GPT-2, GPT-NeoX, Phi-3), matrices stored the other way (GPT-2), experts that the loader stacks (Mixtral, Qwen3-MoE)
# and experts stored as a stack (gpt-oss), norms after branches (Gemma-2), norms of heads (Qwen3), no norm before (OPT).
BOTH = {"hidden_size": "2x", "layers": 8, "intermediate_size": 72, "width_method": "pad"}
GROWTHS = {
    "llama-tied": BOTH,
    "gpt2": BOTH,
    "gpt_neox": BOTH,
    "phi3": BOTH,
    "gemma2": BOTH,
    "mixtral": {"layers": 7},
    "gpt_oss": {"intermediate_size": 72, "attention_heads": 12},
    "qwen3": {"hidden_size": "2x", "head_dim": "2x", "attention_heads": "2x"},
    "qwen3_moe-sparse-step": {"hidden_size": "2x", "expert_intermediate_size": 40},
    "opt-post-norm": {"hidden_size": "2x", "head_dim": "2x"},
    "deepseek_v3": {"hidden_size": 72, "layers": 7},
    "t5-gated": {"attention_heads": 12, "layers": 7},
}
CLOSE = 1e-5  # of the largest weight: the file is rounded once, the trained weights after each product


def operator_of(directory, options, *, seed=0):
    """Return the operator of a growth of a toy as it begins, and what it is made of."""
    begun = open_model(directory)
    grown = growth(begun.anatomy, seed=seed, **options)
    made = learned(grown, PREFIX)
    planned = PlannedSource(begun.source, grown.plan)
    kind = None
    if begun.source.config.get("is_encoder_decoder"):
        kind = AutoModelForSeq2SeqLM
    build = lambda dtype: build_skeleton(planned, dtype, kind)  # noqa: E731
    return Operator(begun.source, grown.plan, made, PREFIX, build).eval(), begun, grown, made


def written(begun, made, tensors, out):
    """Return `out`, now holding the growth with these learned tensors."""
    writer = SolvedWriter(OperatorFile, "the operator")
    for name, tensor in tensors.items():
        writer.add(name, TensorSpec("F32", tuple(tensor.shape)), bytes_of(tensor))
    file = writer.finish({"steps": 1, "held_out": {}})
    source, plan = with_operator(begun.source, begun.plan, made.plan, file)
    Surgery(source, plan, begun_with=begun.anatomy).save(out)
    return out


def moved(operator):
    """Change all that is learned, each number by its own amount."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in operator.learned.values():
            parameter += 0.03 * torch.randn(parameter.shape, generator=draw)


def stored(operator):
    """Return the tensors of the result that an operator computes, by their names in the file."""
    known = {}
    with torch.no_grad():
        return {name: operator._value(expr, known) for name, expr in operator._tensors.items()}


def dead_of(operator, grown):
    """Return what is learned and has no gradient at the first step, though theory says that it has one.

    Inside of a new layer nothing is seen until what it writes is no longer zero; of a map of low rank one factor begins
    at zero; and of some experts no token of the batch asks.
    """
    new = [i for i, layer in enumerate(grown.deep.layer_map) if layer is None]
    closed = tuple(f"{stack.prefix}{i}{end}" for stack in grown.deeper.stacks for i in new for end in ".:")
    dead = [key.replace("/", ".") for key, value in operator.learned.items() if not value.grad.abs().max() > 0]
    return [each for each in dead if not (each.startswith(closed) or each.endswith(".down") or ".experts." in each)]


def logits(model):
    return model(**toys.inputs(model.model if isinstance(model, Operator) else model), use_cache=False).logits


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """Return a function from a toy's name to its directory, its operator as it begins, and what that is made of."""
    made = {}

    def operator(name):
        if name not in made:
            directory = toys.build(name, tmp_path_factory.mktemp("toys") / name, **HIDDEN.get(name, {}))
            parts = operator_of(directory, GROWTHS[name])
            made[name] = directory, *parts, parts[0].tensors()
        *parts, tensors = made[name]
        parts[1].load_state_dict({f"learned.{key.replace('.', '/')}": value for key, value in tensors.items()})
        return parts

    return operator


# --- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROWTHS)
def test_what_is_learned_begins_at_the_exact_growth_and_the_file_holds_what_it_became(name, begin, tmp_path):
    directory, operator, begun, _, made = begin(name)
    exact = surgeon.grow(directory, **GROWTHS[name]).save(tmp_path / "exact").output

    with torch.no_grad():
        assert torch.equal(logits(operator), logits(operator.model))
    begins = load_file(written(begun, made, operator.tensors(), tmp_path / "begins") / "model.safetensors")
    same = load_file(exact / "model.safetensors")
    assert begins.keys() == same.keys()
    assert all(bytes_of(begins[tensor]) == bytes_of(same[tensor]) for tensor in same)

    moved(operator)
    became = load_file(written(begun, made, operator.tensors(), tmp_path / "became") / "model.safetensors")

    computed = stored(operator)
    assert begins.keys() == became.keys()  # what is tied stays one tensor
    assert not any(torch.equal(begins[name], became[name]) for name in computed)
    for tensor, value in computed.items():
        assert (became[tensor] - value).abs().max() <= CLOSE * value.abs().max(), tensor
    assert json.loads((tmp_path / "became/surgeon.json").read_text())["approximate"][-1] == TRAINED


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "mixtral", "phi3", "t5-gated"])
def test_a_loaded_result_computes_what_was_trained(name, begin, tmp_path):
    _, operator, begun, _, made = begin(name)
    moved(operator)

    model, report = toys.load(written(begun, made, operator.tensors(), tmp_path / "out"))

    assert not any(report.values())
    with torch.no_grad():
        wanted = logits(operator)
        assert (logits(model) - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize("name", GROWTHS)
def test_only_what_a_closed_branch_hides_has_no_gradient_at_the_first_step(name, begin):
    _, operator, begun, grown, _ = begin(name)

    made = logits(operator)
    operator.zero_grad()
    (made * torch.randn(made.shape, generator=torch.Generator().manual_seed(0))).sum().backward()

    assert dead_of(operator, grown) == []
    for key, value in operator.learned.items():
        if key == "hidden/write" and "pad" in GROWTHS[name].values():
            old = begun.anatomy.sizes["hidden"]
            assert (value.grad[old:].abs().amax(1) > 0).all(), "a new channel of the stream would never be written"


def test_the_state_of_the_operator_is_what_is_learned_and_nothing_else(begin):
    directory, operator, *_ = begin("llama-tied")
    other, *_ = operator_of(directory, BOTH)
    moved(operator)

    other.load_state_dict(operator.state_dict())

    assert all(name.startswith("learned.") for name in operator.state_dict())
    with torch.no_grad():
        assert torch.equal(logits(other), logits(operator))
    assert not any(parameter.requires_grad for parameter in operator.model.parameters())


def test_heads_are_mapped_as_wholes_and_neurons_by_a_map_of_low_rank(begin):
    directory, *_ = begin("llama-tied")
    made = learned(growth(open_model(directory).anatomy, **BOTH, attention_heads=12), PREFIX)

    shapes = {name: start.shape for name, start in made.starts.items()}
    assert shapes["hidden.write"] == shapes["hidden.read"] == (192, 96)
    assert shapes["model.layers.0.self_attn:kv_heads.group.q_dim.write"] == (12, 8)
    assert shapes["model.layers.0.self_attn:kv_heads.k_dim.write"] == (3, 2)
    assert shapes["model.layers.0.mlp:ffn.write.up"] == (72, 16)
    assert shapes["model.layers.*.self_attn.q_proj.weight.depth"] == (8, 6)
    assert shapes["model.norm.weight"] == (192,)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a toy with a tokenizer, which knows nothing, and texts of which it can learn which word follows which."""
    place = tmp_path_factory.mktemp("small")
    model = give_tokenizer(toys.build("llama-tied", place / "model", hidden_size=96, num_hidden_layers=2))
    lines = (" ".join(f"w{(first + 7 * i) % 90 + 3}" for i in range(40)) for first in range(80))
    text, held_out = place / "text.txt", place / "held-out.txt"
    text.write_text("\n\n".join(lines))
    held_out.write_text("\n\n".join(" ".join(f"w{(first + 7 * i) % 90 + 3}" for i in range(30)) for first in (5, 50)))
    return model, ["--data", text, "--eval-data", held_out, "--sequence-length", 16, "--device", "cpu"]


SIZES = ["--layers", 3, "--hidden-size", 144, "--attention-heads", 12]
WEIGHTS = "model.safetensors"


def test_the_better_one_is_kept_and_said_and_its_receipt_makes_the_same_bytes_again(small, tmp_path, run):
    model, text = small
    out, again = tmp_path / "out", tmp_path / "again"

    outcome = run("grow", model, *SIZES, "--learn", 8, "--lr", 0.01, *text, "-o", out, "--json")

    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    learning = summary["learning"]
    held = learning["held_out"]
    assert learning["kept"] == "learned"
    assert held["learned"] < held["exact"]
    assert summary["verification"]["verdict"] == "approximate"
    assert learning["parameters"] == sum(value.numel() for value in load_file(out / OPERATOR).values())
    card = (out / "README.md").read_text()
    assert f"learned {learning['parameters']:,} numbers of the growth's maps for 8 steps on text.txt" in card
    assert all(f"{held[name]:.3f}" in card for name in ("learned", "exact"))
    assert run("run", out / "surgeon.json", "-o", again, "-q").code == 0
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    assert (again / OPERATOR).read_bytes() == (out / OPERATOR).read_bytes()
    cut = surgeon.truncate(again, layers=2).save(tmp_path / "cut").output
    assert not (cut / OPERATOR).exists()  # it is of the growth, not of what follows

    (again / OPERATOR).write_bytes((out / OPERATOR).read_bytes()[:-4] + b"abcd")
    spoiled = run("run", again / "surgeon.json", "-o", tmp_path / "never", "-q")
    assert (spoiled.code, "has changed since" in spoiled.err) == (1, True)


def test_where_learning_makes_it_worse_the_exact_growth_is_written_and_said(small, tmp_path, run):
    model, text = small
    run("grow", model, *SIZES, "-o", tmp_path / "exact", "--no-verify", "-q")

    outcome = run("grow", model, *SIZES, "--learn", 2, "--lr", 3, *text, "-o", tmp_path / "out", "--no-verify")

    assert outcome.code == 0, outcome.err
    assert "it is no better, so the exact growth is kept" in outcome.out
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "exact" / WEIGHTS).read_bytes()
    assert not (tmp_path / "out" / OPERATOR).exists()
    assert run("run", tmp_path / "out/surgeon.json", "-o", tmp_path / "again", "-q").code == 0


def test_no_steps_are_the_exact_growth_byte_for_byte(small, tmp_path, run):
    model, _ = small

    run("grow", model, *SIZES, "-o", tmp_path / "exact", "--no-verify", "-q")
    outcome = run("grow", model, *SIZES, "--learn", 0, "-o", tmp_path / "none", "--no-verify", "-q")

    assert outcome.code == 0
    for file in (WEIGHTS, "config.json"):
        assert (tmp_path / "none" / file).read_bytes() == (tmp_path / "exact" / file).read_bytes()


def test_a_dry_run_learns_nothing_and_says_how_much_it_would(small, tmp_path, run):
    model, text = small

    outcome = run("grow", model, *SIZES, "--learn", 8, *text, "-o", tmp_path / "out", "--json", "--dry-run")

    planned = json.loads(outcome.out)
    assert planned["learning"]["steps"] == 8
    assert planned["learning"]["parameters"] > 0
    assert planned["bytes_written"] == surgeon.grow(model, layers=3, hidden_size=144, attention_heads=12).spec.nbytes
    assert list(tmp_path.iterdir()) == []


def test_a_killed_learning_goes_on_to_the_same_bytes(small, tmp_path, run, monkeypatch):
    model, text = small
    command = ["grow", model, *SIZES, "--learn", 6, "--lr", 0.01, *text, "--no-verify", "-q"]
    run(*command, "-o", tmp_path / "whole")
    step = Reporter.step

    def killed(self, logs):
        step(self, logs)
        if logs["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "step", killed)
        assert run(*command, "-o", tmp_path / "out").code == 130
    assert not (tmp_path / "out").exists()
    other = run(*command, "--lr", 0.02, "-o", tmp_path / "out")
    assert (other.code, "began with" in other.err) == (1, True)
    outcome = run(*command, "-o", tmp_path / "out")

    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    inside = run(*command, "-o", tmp_path / "new", "--run-dir", tmp_path / "new/run")
    assert (inside.code, "lie in one another" in inside.err) == (1, True)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_cannot_be_learned_is_refused_before_anything_is_read(toy, small, tmp_path):
    model, _ = small
    text = {"data": ["text.txt"]}

    with pytest.raises(OptionError, match="--learn needs a text to learn on"):
        surgeon.grow(model, layers=3, learn=5)
    with pytest.raises(OptionError, match="--data has no effect without --learn"):
        surgeon.grow(model, layers=3, **text)
    with pytest.raises(OptionError, match="--learn is for depth and width, not for --experts"):
        surgeon.grow(model, experts=4, learn=5, **text)
    with pytest.raises(OptionError, match="--lr is 0; a rate is above 0"):
        surgeon.grow(model, layers=3, learn=5, lr=0.0, **text)
    with pytest.raises(DataError, match=r"text\.txt"):
        surgeon.grow(model, layers=3, learn=5, **text)
    with pytest.raises(PlanError, match="this one is not saved yet"):
        surgeon.grow(surgeon.truncate(model, layers=1), layers=2, learn=5, **text)
    with pytest.raises(PlanError, match="has no table"):
        surgeon.grow(toys.unheard_of("llama", tmp_path / "toy"), layers=8, depth_method="stack", learn=0)


def test_one_text_of_one_row_leaves_none_to_judge_by(small, tmp_path):
    model, _ = small
    (tmp_path / "short.txt").write_text("w3 w4 w5 w6")

    with pytest.raises(DataError, match="no text is held out"):
        surgeon.grow(model, layers=3, learn=5, data=[str(tmp_path / "short.txt")], sequence_length=16, device="cpu")


def test_an_operator_of_another_growth_is_refused(small, tmp_path, run):
    model, text = small
    run("grow", model, "--layers", 3, "--learn", 2, "--lr", 0.01, *text, "-o", tmp_path / "out", "-q", "--no-verify")
    begun = open_model(model)
    wider = learned(growth(begun.anatomy, hidden_size="2x"), PREFIX).plan

    file = open_operator(tmp_path / "out")
    with pytest.raises(PlanError, match="what was learned of another growth"):
        with_operator(begun.source, begun.plan, wider, file)
    deeper = learned(growth(begun.anatomy, layers=4), PREFIX).plan
    with pytest.raises(PlanError, match="learned of another growth|does not fit this growth"):
        with_operator(begun.source, begun.plan, deeper, file)
    shutil.copy(tmp_path / "out" / WEIGHTS, tmp_path / OPERATOR)
    with pytest.raises(CheckpointError, match="holds no operator of a growth"):
        _ = open_operator(tmp_path).record
