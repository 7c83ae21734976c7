"""Plans: decided from headers, composed, printed, and refused where they contradict themselves."""

import json

import pytest
import toys
from later import LATER

import surgeon
from surgeon.checkpoint.header import CheckpointSpec, FilePart, TensorSpec, read_header
from surgeon.checkpoint.source import ranges_by_file, spec_of, stored
from surgeon.errors import PlanError
from surgeon.options import size_in_bytes
from surgeon.plan.execute import peak_memory
from surgeon.plan.expressions import Add, Affine, Cast, Constant, Gather, Normal, Read, Rounded, Uniform, describe
from surgeon.plan.plan import Plan, changed_keys, identity, infer, reads, substitute
from surgeon.surgery import Surgery, open_model

if LATER:
    import torch
    from safetensors.torch import load_file, save_file

    from surgeon.plan.arithmetic import Arithmetic

SPEC = CheckpointSpec({"model_type": "toy"}, {"a": TensorSpec("BF16", (4, 6)), "ids": TensorSpec("I64", (3,))})


def test_expressions_know_their_dtype_and_shape_without_numbers():
    assert infer(Read("a"), SPEC.tensors) == TensorSpec("BF16", (4, 6))
    taken = Gather(Read("a"), 1, (5, -1, 0), (1.0, 1.0, 0.5))
    assert infer(Cast(taken, "F32"), SPEC.tensors) == TensorSpec("F32", (4, 3))
    assert infer(Uniform((2, 2), taken, 0.5, 0, "x"), SPEC.tensors) == TensorSpec("BF16", (2, 2))
    assert infer(Constant(TensorSpec("F16", (2,)), 1.0), {}) == TensorSpec("F16", (2,))
    assert reads(Add((Affine(Read("a"), 2.0), Read("b"), Rounded(Read("a"))))) == ("a", "b")


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        (Read("b"), "no tensor 'b'"),
        (Gather(Read("a"), 1, (6,), (1.0,)), "cannot gather 1 positions along dim 1"),
        (Gather(Read("a"), 2, (0,), (1.0,)), "cannot gather 1 positions along dim 2"),
        (Add((Read("a"), Gather(Read("a"), 0, (0,), (1.0,)))), r"cannot add BF16 \[1, 6\] and BF16 \[4, 6\]"),
        (Affine(Read("ids"), 2.0), "cannot compute with ids: it is stored as I64"),
        (Cast(Read("ids"), "F32"), "cannot compute with ids"),
    ],
)
def test_what_cannot_be_made_is_refused_by_the_name_of_the_tensor(expr, message):
    with pytest.raises(PlanError, match=f"cannot make 'x': .*{message}"):
        Plan({}, {"x": expr}, (0,)).result(SPEC)


def test_then_puts_the_first_plan_into_the_second():
    first = Plan({"n": 1}, {"x": Affine(Read("a"), 2.0), "z": Read("a")}, (3, 5, 7), ({"one": {}},), ("first",))
    second = Plan({"n": 2}, {"y": Cast(Read("x"), "F32"), "w": Read("z")}, (2, None, 0), ({"two": {}},), ("second",))

    both = first.then(second)

    assert both.tensors == {"y": Cast(Rounded(Affine(Read("a"), 2.0)), "F32"), "w": Read("a")}
    assert (both.config, both.layer_map, both.steps) == ({"n": 2}, (7, None, 3), ({"one": {}}, {"two": {}}))
    assert both.notes == ("first", "second")
    with pytest.raises(PlanError, match="the step before makes no tensor 'a'"):
        first.then(Plan({}, {"y": Read("a")}, (0,)))


def test_casts_that_change_nothing_vanish_and_integers_stay():
    plan = identity(SPEC, depth=1).cast("bfloat16").simplified(SPEC)

    assert plan.tensors == {"a": Read("a"), "ids": Read("ids")}
    assert identity(SPEC, depth=1).cast("float32").simplified(SPEC).tensors["a"] == Cast(Read("a"), "F32")
    assert plan.config["dtype"] == "bfloat16"


def test_fused_arithmetic_rounds_where_its_steps_would(toy, tmp_path):
    """Scale and store in bfloat16, then scale and store in float32: in one pass, and in two."""
    toys.build("gpt2", tmp_path / "source", dtype="bfloat16")
    start = open_model(tmp_path / "source")
    name = "transformer.ln_f.weight"

    def scaled(model: Surgery, by: float) -> Surgery:
        step = identity(model.spec, depth=6)
        tensors = {**step.tensors, name: Gather(Read(name), 0, tuple(range(80)), (by,) * 40 + (1.0,) * 40)}
        return Surgery(model.source, model.plan.then(Plan(step.config, tensors, step.layer_map)))

    scaled(scaled(start, 1.1), 0.7).save(tmp_path / "fused", dtype="float32")
    scaled(start, 1.1).save(tmp_path / "one")
    scaled(open_model(tmp_path / "one"), 0.7).save(tmp_path / "steps", dtype="float32")

    fused, steps = (load_file(tmp_path / out / "model.safetensors") for out in ("fused", "steps"))
    assert all(torch.equal(fused[key], steps[key]) for key in steps)
    assert not torch.equal(fused[name][:40], load_file(tmp_path / "source/model.safetensors")[name][:40].float())


def test_a_plan_prints_as_text_and_as_json(toy):
    surgery = surgeon.truncate(toy("llama-tied"), layers=1, inherit=["attention"])

    printed, parsed = str(surgery.plan), json.loads(surgery.plan.to_json())

    assert "model.layers.0.self_attn.q_proj.weight = model.layers.0.self_attn.q_proj.weight" in printed
    assert "model.norm.weight = constant(1, F32 [48])" in printed
    assert parsed["tensors"]["model.embed_tokens.weight"] == "normal(std 0.02, seed 0, F32 [131, 48])"
    assert parsed["layer_map"] == [0]
    assert parsed["steps"] == [{"truncate": {"layers": 1, "inherit": ["attention"], "seed": 0}}]


def test_substitution_leaves_fresh_tensors_alone():
    fresh = Normal(TensorSpec("F32", (2,)), 0.1, 0, "x")

    assert substitute(fresh, lambda name: Read("other")) == fresh
    taken = Gather(Read("a"), 1, (0, 1, -1, -1, 3, 3), (0.5, 0.5, 1.0, 1.0, 1.0, 1.0))
    assert describe(taken) == "gather(a, dim 1: 0-1, new, 3, 3 times 0.5 x2, 1 x4)"


def test_the_ranges_to_fetch_are_merged_and_hold_only_what_is_read(toy):
    surgery = surgeon.truncate(toy("mistral"), layers=2)
    tensors = surgery.source.tensors

    ranges = ranges_by_file(tensors, surgery.plan.tensors)

    assert list(ranges) == ["model.safetensors"]
    assert sum(end - start for start, end in ranges["model.safetensors"]) == surgery.summary().bytes_read
    assert len(ranges["model.safetensors"]) < len(surgery.plan.tensors) / 4


def test_moving_bytes_needs_the_same_memory_whatever_the_size(toy):
    spec = spec_of(open_model(toy("llama")).source)
    moving, drawing = (surgeon.truncate(toy("llama"), layers=2, inherit=parts).plan for parts in (None, ["mlp"]))

    assert peak_memory(moving, moving.result(spec), spec) < 100_000_000
    assert peak_memory(drawing, drawing.result(spec), spec) > peak_memory(moving, moving.result(spec), spec)


def test_changed_keys_tell_nested_ones_and_absent_ones():
    before = {"a": 1, "t": {"x": [1, 2], "y": 3}, "gone": True}
    after = {"a": 1, "t": {"x": [1], "y": 3}, "new": "n"}

    assert changed_keys(before, after) == {"t.x": ([1, 2], [1]), "gone": (True, None), "new": (None, "n")}


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 GB", 15 * 10**8), ("2GiB", 2**31), (1234, 1234), ("77", 77)],
)
def test_sizes_are_read_as_people_write_them(size, expected):
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "five", "-3GB", "0", "1XB", "nan", "infGB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(PlanError, match="cannot read .* as a size"):
        size_in_bytes(size)


def test_arithmetic_is_what_the_expressions_say(tmp_path):
    """Against the same sums in plain torch, in float64."""
    a = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    save_file({"a": a}, tmp_path / "model.safetensors")
    tensors = {
        name: stored("model.safetensors", entry) for name, entry in read_header(tmp_path / "model.safetensors").items()
    }
    make = Arithmetic(tensors, {"model.safetensors": FilePart(tmp_path / "model.safetensors")}).tensor

    taken = make(Gather(Read("a"), 1, (5, -1, 0, 0), (1.0, 1.0, 0.5, 2.0), fill=3.0, mean=2.0))
    drawn = make(Uniform((500, 40), Read("a"), 0.5, 0, "x"))

    assert torch.equal(taken, torch.stack([a[:, 5], 3 + 2 * a.mean(1), a[:, 0] * 0.5, a[:, 0] * 2], 1))
    assert torch.equal(make(Add((Read("a"), Affine(Read("a"), 2.0, 1.0)))), a + (2 * a + 1))
    assert torch.equal(make(Cast(Rounded(Cast(Read("a"), "BF16")), "F32")), a.bfloat16().float())
    assert drawn.dtype == torch.float64
    assert abs(drawn.std() / (0.5 * a.std(correction=0)) - 1) < 0.02  # 20,000 draws: five standard errors
    assert torch.equal(drawn, make(Uniform((500, 40), Read("a"), 0.5, 0, "x")))
    assert not torch.equal(drawn, make(Uniform((500, 40), Read("a"), 0.5, 1, "x")))


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    """Return the arithmetic on one matrix "a" of 300 x 40 float32 numbers, made anew at each call."""
    directory = tmp_path_factory.mktemp("arithmetic")
    numbers = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    save_file({"a": numbers}, directory / "model.safetensors")
    entries = read_header(directory / "model.safetensors")
    tensors = {name: stored("model.safetensors", entry) for name, entry in entries.items()}
    return lambda: Arithmetic(tensors, {"model.safetensors": FilePart(directory / "model.safetensors")})


SCATTERED = tuple((37 * j) % 300 if j % 5 else -1 for j in range(400))
EXPRESSIONS = {
    "a draw that is uniform": Uniform((250, 90), Read("a"), 0.5, 3, "x"),
    "a draw that is normal": Normal(TensorSpec("F32", (250, 90)), 0.1, 3, "x"),
    "rows in runs": Gather(Read("a"), 0, (*range(300), *range(200), *[-1] * 50), (0.5,) * 550, mean=1.0),
    "rows far apart": Gather(Read("a"), 0, SCATTERED, (1.0,) * 400, mean=2.0),
    "columns": Gather(Read("a"), 1, (*range(40), *range(40), -1), (0.5,) * 81),
    "a sum with noise": Add(
        (
            Gather(Gather(Read("a"), 0, (*range(300),) * 2, (1.0,) * 600), 1, (*range(40),) * 2, (0.5,) * 80),
            Gather(Uniform((600, 40), Read("a"), 0.5, 3, "x"), 1, (*range(40),) * 2, (1.0,) * 40 + (-1.0,) * 40),
        )
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_bytes_do_not_depend_on_how_a_tensor_is_cut_into_parts_and_blocks(name, arithmetic, monkeypatch):
    """Nor on what is kept of the source, and what is read row by row. Draws go over the ends of many blocks."""
    monkeypatch.setattr("surgeon.plan.arithmetic.DRAWN", 1000)
    expected = arithmetic().tensor(EXPRESSIONS[name])

    for part, block, kept in ((3000, 700, 1 << 20), (10_000, 123, 0), (80, 1 << 18, 0)):
        for constant, value in (("PART", part), ("BLOCK", block), ("KEPT", kept)):
            monkeypatch.setattr(f"surgeon.plan.arithmetic.{constant}", value)
        assert torch.equal(arithmetic().tensor(EXPRESSIONS[name]), expected), (part, block, kept)


def test_parts_are_made_alike_in_any_order(arithmetic, monkeypatch):
    monkeypatch.setattr("surgeon.plan.arithmetic.PART", 2000)
    expr = EXPRESSIONS["a sum with noise"]

    forwards = [b"".join(part.make()) for part in arithmetic().parts(expr)]
    backwards = [b"".join(part.make()) for part in reversed(arithmetic().parts(expr))]

    assert len(forwards) == 24  # 600 rows of 80 numbers, 25 to a part
    assert forwards == backwards[::-1]


def test_the_spread_of_a_large_tensor_is_that_of_every_nth_block_of_rows(arithmetic, monkeypatch):
    monkeypatch.setattr("surgeon.plan.arithmetic.SUMMED", 400)
    drawn = Uniform((200, 50), Read("a"), 0.5, 3, "x")
    whole = arithmetic().tensor(drawn)

    monkeypatch.setattr("surgeon.plan.arithmetic.SAMPLE", 3000)
    sampled = arithmetic().tensor(drawn)

    ratio = (sampled / whole).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # rounding of float32
    assert ratio[0] != 1
    assert abs(ratio[0] - 1) < 0.06  # 3,000 draws: five times 1 / sqrt(2 x 3,000)


@pytest.mark.parametrize("zeros", ["every n-th block", "all"])
def test_a_sample_of_zeros_is_no_tensor_of_zeros(zeros, tmp_path, monkeypatch):
    monkeypatch.setattr("surgeon.plan.arithmetic.SUMMED", 16)
    monkeypatch.setattr("surgeon.plan.arithmetic.SAMPLE", 400)
    numbers = torch.zeros(400, 4)
    if zeros != "all":
        numbers[3::4] = 1.0
    save_file({"a": numbers}, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    tensors = {name: stored("model.safetensors", entry) for name, entry in entries.items()}
    make = Arithmetic(tensors, {"model.safetensors": FilePart(tmp_path / "model.safetensors")}).tensor

    largest = make(Uniform((100, 100), Read("a"), 1.0, 0, "x", fallback=0.01)).abs().max()

    std = 0.01 if zeros == "all" else numbers.std(correction=0)
    assert largest == pytest.approx(
        float(std * 3**0.5), rel=0.01
    )  # of 10,000 uniform draws the largest is near the end


def test_a_config_does_not_choose_the_code_that_runs_it(toy, tmp_path):
    toys.build("llama", tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    chosen = {"_attn_implementation": "someone/kernels", "attn_implementation": "eager", "_experts_implementation": "x"}
    (tmp_path / "source/config.json").write_text(json.dumps(config | chosen))

    surgeon.truncate(tmp_path / "source", layers=2).save(tmp_path / "cut")

    assert not chosen.keys() & json.loads((tmp_path / "cut/config.json").read_text()).keys()
    assert "someone/kernels" in json.loads((tmp_path / "cut/surgeon.json").read_text())["notes"][0]
