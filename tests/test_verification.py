"""What a result is said to compute beside its source, and whether what was added to it can learn."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
from handmade import snapshot
from hub_server import HubServer
from later import LATER
from test_rings import command, modules_after

import surgeon
from surgeon.errors import CheckpointError, VerificationError
from surgeon.verbs.verify import SLACK, TOLERANCE, Verification

if LATER:
    from safetensors.torch import load_file, save_file


def grown(source: Path, out: Path, *, dtype: str = "keep", **sizes: Any) -> Verification:
    """Return what a verification says of `source` grown to `sizes`."""
    surgeon.grow(source, **sizes).save(out, dtype=dtype, overwrite=True)
    return surgeon.verify(source, out)


def damage(directory: Path, name: str) -> None:
    """Put the rows of a stored tensor into another order."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def counts(found: Verification, axis: str) -> tuple[int, int, int]:
    health = found.trainability.axes[axis]
    return health.added, health.dead, health.symmetric


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("llama", 48, 96),
        ("gpt2", 80, 160),
        ("gemma", 48, 96),
        ("gpt_neox", 80, 160),
        ("mixtral", 48, 96),
        ("qwen3", 48, 72),
        ("gpt2", 80, 120),
        ("gemma", 48, 72),
        ("gpt_oss", 48, 72),
    ],
)
def test_a_wider_model_is_exact_and_all_of_it_can_learn(toy, tmp_path, name, old, new):
    found = grown(toy(name), tmp_path / "out", hidden_size=new)

    assert found.verdict == "exact"
    assert 0 < found.difference <= TOLERANCE * found.largest == found.allowed
    assert found.trainability.is_sound
    assert counts(found, "hidden") == (new if new == 2 * old else new - old, 0, 0)  # clones, or new ones


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_identity_blocks_are_exact_to_the_last_bit_and_wake(toy, tmp_path, name):
    found = grown(toy(name), tmp_path / "out", layers=9)

    assert (found.verdict, found.difference) == ("exact", 0.0)
    assert found.trainability.is_sound
    assert not found.trainability.loud_layers


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("opt", {"intermediate_size": "2x"}),  # relu: some units are silent on any few tokens, and not dead
        ("qwen3", {"head_dim": "2x"}),
        ("gpt2", {"hidden_size": 120, "head_dim": 15, "attention_heads": 8}),
        ("llama", {"attention_heads": 12, "key_value_heads": 3, "hidden_size": 72}),
        ("phi3", {"intermediate_size": 80, "attention_heads": 16}),
    ],
)
def test_other_axes_are_judged_too(toy, tmp_path, name, sizes):
    found = grown(toy(name), tmp_path / "out", **sizes)

    assert found.verdict == "exact"
    assert found.trainability.is_sound
    assert all(axis.added for axis in found.trainability.axes.values())


@pytest.mark.parametrize(
    ("name", "source_dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("gemma", "bfloat16")]
)
def test_a_factor_that_16_bits_cannot_hold_is_rounded_by_bfloat16(tmp_path, name, source_dtype):
    source = toys.build(name, tmp_path / "source", dtype=source_dtype)

    found = grown(source, tmp_path / "out", hidden_size=120 if name == "gpt2" else 72, dtype="bfloat16")

    assert (found.verdict, found.rounded_by) == ("rounded", "bfloat16")
    assert TOLERANCE * found.largest < found.difference < found.allowed
    assert found.difference > found.allowed / SLACK / 10  # what is allowed is no blank cheque


def test_powers_of_two_are_exact_in_bfloat16_and_float32_holds_the_rest(tmp_path):
    source = toys.build("llama", tmp_path / "source", dtype="bfloat16")

    assert grown(source, tmp_path / "out", hidden_size="2x", noise=0).verdict == "exact"
    assert grown(source, tmp_path / "out", hidden_size=72, dtype="float32").verdict == "exact"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"layers": 9, "depth_method": "stack"}, "new layers change"),
        ({"hidden_size": 72, "width_method": "zero-pad"}, "another mean square"),
        ({"intermediate_size": 80, "width_method": "advanced"}, "from the next layer"),
    ],
)
def test_an_approximate_method_says_what_makes_it_so(toy, tmp_path, sizes, reason):
    found = grown(toy("llama"), tmp_path / "out", **sizes)

    assert found.verdict == "approximate"
    assert found.allowed is None
    assert reason in str(found.reason)
    assert found.difference > TOLERANCE * found.largest


def test_the_base_of_a_donor_is_what_it_is_compared_with(toy, tmp_path, run):
    donor = toys.build("llama", tmp_path / "donor", num_hidden_layers=8)

    outcome = run("grow", toy("llama"), "--layers", 8, "--donor", donor, "-o", tmp_path / "out", "--json")

    assert json.loads(outcome.out)["verification"]["verdict"] == "approximate"


@pytest.mark.parametrize("hidden", [120, 160])
def test_the_hidden_states_of_a_model_without_a_head_are_compared(toy, tmp_path, hidden):
    model, _ = toys.load(toy("gpt2"))
    model.transformer.save_pretrained(tmp_path / "source")

    found = grown(tmp_path / "source", tmp_path / "out", hidden_size=hidden)

    assert found.verdict == "exact"
    assert found.trainability.is_sound


def test_an_encoder_and_its_decoder_are_run_together(toy, tmp_path):
    found = grown(toy("bart"), tmp_path / "out", layers=8, depth_method="stack")

    assert found.verdict == "approximate"
    assert found.trainability.is_sound


# --- what is wrong is found -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_damaged_result_is_refused_and_not_removed(toy, tmp_path, dtype):
    surgeon.grow(toy("llama"), hidden_size=72).save(tmp_path / "out", dtype=dtype)
    damage(tmp_path / "out", "model.layers.3.self_attn.v_proj.weight")

    with pytest.raises(VerificationError, match="does not compute what its source computes") as caught:
        surgeon.verify(toy("llama"), tmp_path / "out")

    assert "Do not use it." in str(caught.value.hint)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_result_that_fails_its_verification_takes_nobodys_place(overwrite, toy, tmp_path, run):
    out = tmp_path / "out"
    if overwrite:
        surgeon.truncate(toy("llama"), layers=2).save(out)
    before = snapshot(tmp_path)

    # torch has no product of experts whose rows are no multiple of 16 bytes: transformers cannot run this model
    options = ["--overwrite"] if overwrite else []
    outcome = run("grow", toy("mixtral"), "--intermediate-size", 65, "-o", out, *options)

    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {out} cannot be compared with its source: strides should be multiple of 16")
    assert snapshot(tmp_path) == before


def test_a_result_that_does_not_load_whole_is_refused(toy, tmp_path):
    surgeon.grow(toy("llama-biases"), layers=8).save(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.7.mlp.third_proj.weight"] = tensors.pop("model.layers.7.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(VerificationError, match=r"does not load whole: missing keys .*layers\.7\.mlp\.up_proj"):
        surgeon.verify(toy("llama-biases"), tmp_path / "out")


def test_numbers_that_are_not_finite_are_refused(toy, tmp_path):
    surgeon.grow(toy("llama"), layers=8, depth_method="stack").save(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(VerificationError):
        surgeon.verify(toy("llama"), tmp_path / "out")


def test_what_surgeon_did_not_write_cannot_be_verified(toy):
    with pytest.raises(CheckpointError, match="no receipt"):
        surgeon.verify(toy("llama"), toy("llama-tied"))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_padding_without_noise_is_dead_and_counted(toy, tmp_path, name):
    found = grown(toy(name), tmp_path / "out", hidden_size=72, noise=0)

    assert found.verdict == "exact"
    assert counts(found, "hidden") == (24, 24, 0)
    assert not found.trainability.is_sound


def test_clones_without_noise_are_symmetric_and_counted_layer_by_layer(toy, tmp_path):
    found = grown(toy("mixtral"), tmp_path / "out", hidden_size="2x", intermediate_size="2x", noise=0)

    assert counts(found, "hidden") == (96, 0, 48)
    assert counts(found, "ffn") == (6 * 104, 0, 6 * 52)


def test_one_clone_that_is_symmetric_in_one_layer_is_found(toy, tmp_path):
    surgeon.grow(toy("llama"), intermediate_size="2x").save(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    down = tensors["model.layers.4.mlp.down_proj.weight"]
    down[:, 7] = down[:, 52 + 7] = (down[:, 7] + down[:, 52 + 7]) / 2
    save_file(tensors, file, metadata={"format": "pt"})

    found = surgeon.verify(toy("llama"), tmp_path / "out")

    assert found.verdict == "exact"
    assert counts(found, "ffn") == (6 * 104, 0, 1)


def test_a_new_layer_that_nothing_can_wake_and_one_that_shouts_are_found(toy, tmp_path):
    surgeon.grow(toy("llama"), layers=7).save(tmp_path / "dead")
    surgeon.grow(toy("gemma2"), layers=7).save(tmp_path / "loud")
    for directory, wrong in [("dead", ("q_proj", "v_proj", "gate_proj", "norm")), ("loud", ("o_proj", "down_proj"))]:
        file = tmp_path / directory / "model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.startswith("model.layers.6.") and any(part in name for part in wrong):
                tensor.zero_()
            if directory == "loud" and name.startswith("model.layers.6.post_"):
                tensor.fill_(1.0)
        save_file(tensors, file, metadata={"format": "pt"})

    dead = surgeon.verify(toy("llama"), tmp_path / "dead").trainability
    loud = surgeon.verify(toy("gemma2"), tmp_path / "loud").trainability

    assert (dead.dead_layers, dead.is_sound) == ((6,), False)
    assert loud.loud_layers[6] > 100


# --- what it costs, before it is paid ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": "2x", "noise": 0}, None),
        ({"layers": 9}, None),
        ({"intermediate_size": 80}, None),  # what is added lies beside the old, not on it
        ({"layers": 9, "depth_method": "stack"}, None),
        ({"hidden_size": 72, "width_method": "zero-pad"}, None),  # approximate: there is nothing to lose
        ({"hidden_size": "2x"}, "sums with noise round"),
        ({"hidden_size": 64}, "factors such as 1.1547 round"),
    ],
)
def test_what_bfloat16_will_round_is_known_from_the_plan_and_true(tmp_path, sizes, said):
    source = toys.build("llama", tmp_path / "source", dtype="bfloat16")

    notes = [note for note in surgeon.grow(source, **sizes).summary().notes if note.startswith("stored as")]

    if said is None:
        assert notes == []
        assert grown(source, tmp_path / "out", **sizes).verdict in ("exact", "approximate")
    else:
        assert len(notes) == 1
        assert notes[0].startswith(f"stored as bfloat16: {said}")
        assert "--dtype float32 keeps it exact" in notes[0]
        assert grown(source, tmp_path / "out", **sizes).verdict == "rounded"


def test_a_wider_source_rounds_and_float32_costs_nothing(toy):
    surgery = surgeon.grow(toy("llama"), layers=9)

    assert "weights in float32 round" in surgery.summary(dtype="float16").notes[-1]
    assert not any("stored as" in note for note in surgery.summary(dtype="float32").notes)


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_what_it_found(toy, tmp_path, run):
    sound = run("grow", toy("llama"), "--hidden-size", "2x", "-o", tmp_path / "a")
    dead = run("grow", toy("llama"), "--hidden-size", "72", "--noise", "0", "-o", tmp_path / "b")

    assert sound.code == dead.code == 0
    assert "  verified " in sound.out
    assert "exact: max |Δlogits| " in sound.out
    assert "no dead weights, no symmetric copies" in sound.out
    assert "hidden: 24 of 24 new positions are dead" in dead.out
    assert "--noise 0.5" in dead.out


def test_json_holds_the_verification(toy, tmp_path, run):
    outcome = run("grow", toy("llama"), "--hidden-size", "2x", "--noise", "0", "-o", tmp_path / "a", "--json")

    verification = json.loads(outcome.out)["verification"]
    assert verification["verdict"] == "exact"
    assert 0 < verification["max_abs_logit_difference"] <= verification["allowed"]
    assert verification["trainability"]["axes"]["hidden"] == {"added": 96, "dead": 0, "symmetric": 48}


def test_what_the_dtype_costs_is_said_before_it_is_paid(toy, tmp_path, run):
    words = ["grow", toy("llama"), "--hidden-size", "72", "--dtype", "bfloat16", "-o", tmp_path / "a"]

    preview, outcome = run(*words, "--dry-run"), run(*words)

    assert "expect a change of about 1 %" in preview.out
    assert "expect a change of about 1 %" in outcome.err
    assert "rounded by bfloat16: max |Δlogits| " in outcome.out


def test_what_cannot_be_compared_is_an_error_and_leaves_no_output(tmp_path, run):
    source = toys.build("llama", tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(float("inf"))
    save_file(tensors, file, metadata={"format": "pt"})

    outcome = run("grow", source, "--layers", 8, "-o", tmp_path / "out")

    assert (outcome.code, outcome.out) == (1, "")
    assert "not finite" in outcome.err
    assert "hint: " in outcome.err
    assert list(tmp_path.iterdir()) == [source]


def test_without_it_and_in_a_dry_run_nothing_is_loaded(toy, tmp_path):
    stack = ["grow", toy("llama"), "--layers", 12, "--depth-method", "stack"]

    assert modules_after(command(*stack, "--no-verify", "-o", tmp_path / "out")) == {"yaml"}
    assert modules_after(command(*stack, "--hidden-size", "2x", "--verify", "--dry-run")) == set()
    assert modules_after(command("grow", "--help")) == set()


def test_a_large_model_is_verified_on_request(toy, tmp_path, run, monkeypatch):
    monkeypatch.setattr("surgeon.cli.command.VERIFIED_BELOW", 10_000)
    words = ["grow", toy("llama"), "--layers", 8]

    assert "  verified  " not in run(*words, "-o", tmp_path / "a").out
    assert "  verified  " in run(*words, "-o", tmp_path / "b", "--verify").out


def test_a_source_on_the_hub_is_loaded_at_its_commit(toy, tmp_path):
    with HubServer() as server:
        files = {path.name: path.read_bytes() for path in toy("llama").iterdir()}
        server.commit("someone/toy", files)
        environment = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        grow = ["grow", "someone/toy", "--hidden-size", "2x", "-o", tmp_path / "out", "--json"]
        outcome = subprocess.run(
            [sys.executable, "-m", "surgeon", *map(str, grow)],
            env=os.environ | environment | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )

    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["verification"]["verdict"] == "exact"


def test_copies_in_a_silent_layer_are_set_apart_too(toy, tmp_path):
    """Its projections are zero, and so is their spread: noise relative to them alone would be none."""
    surgeon.grow(toy("llama"), layers=8, intermediate_size="2x", hidden_size="2x").save(tmp_path / "grown")

    found = surgeon.verify(toy("llama"), tmp_path / "grown")

    assert found.verdict == "exact"
    assert (counts(found, "ffn")[1:], counts(found, "hidden")[1:]) == ((0, 0), (0, 0))
