"""A streamed forward pass computes what the plainly loaded model computes, with one layer's weights in memory."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import toys
from later import LATER
from toys import DECODERS

from surgeon.errors import CheckpointError, MeasureError

if LATER:
    import torch
    from safetensors.torch import load_file, save_file
    from streamed import padded, plain, plain_states, real_parameters, stream, streamed_states, tokens
    from transformers import AutoConfig, AutoModelForCausalLM

    from surgeon.models import streaming


pytestmark = pytest.mark.usefixtures("one_thread")

# How a family knows where a token is. Rotary: angles of position ids. Absolute: rows of a table, by position ids (OPT
# counts the mask itself). Alibi: Bloom and Falcon count the mask; MPT takes distances between columns.
POSITIONS = {
    "rotary": ("llama", "gpt_neox", "gptj", "gemma3_text", "cohere2", "mistral", "phi", "glm", "deepseek_v3"),
    "absolute": ("gpt2", "opt", "gpt_neo"),
    "alibi": ("bloom", "falcon-alibi", "mpt"),
    "convolution": ("lfm2",),
}
GEMMA4 = toys.OWN_HEAD_DIM | {
    "global_head_dim": 10,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 131,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
HEADLESS = ("llama", "llama-tied", "gpt2", "opt", "bloom", "gpt_neox", "mixtral")
TIED = ("llama-tied", "gpt2", "opt", "bloom")  # their head is the embedding, which a headless checkpoint has


def logits_of(model, states):
    with model.head() as head, torch.no_grad():
        return head(states)


def without(directory, *names):
    """Return `directory`, its checkpoint now lacking tensors."""
    weights = load_file(directory / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def with_config(directory, **changes):
    """Return `directory`, its config changed."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize("name", DECODERS)
def test_every_state_and_the_logits_are_the_plain_models(name, toy):
    model, streamed, ids = plain(toy(name)), stream(toy(name)), tokens()
    expected = plain_states(model, ids)

    states = streamed_states(streamed, ids)

    assert len(states) == len(expected) == streamed.depth + 1 == 7
    assert [torch.equal(*pair) for pair in zip(states, expected, strict=True)] == [True] * 7
    assert torch.equal(logits_of(streamed, states[-1]), toys.logits(model))


def test_rows_that_go_through_in_several_batches_compute_the_same(toy, monkeypatch):
    ids = tokens(5)
    expected = plain_states(plain(toy("llama")), ids)
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 2 * ids.shape[1])
    streamed = stream(toy("llama"))

    states = streamed_states(streamed, ids)

    with torch.no_grad():
        assert [len(batch.tokens) for batch in streamed.embed(ids)] == [2, 2, 1]
    for state, other in zip(states, expected, strict=True):
        # float32: a product over other shapes sums in another order
        torch.testing.assert_close(state, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_later_text_of_the_same_shape_is_not_taken_for_the_first(name, toy):
    streamed, model = stream(toy(name)), plain(toy(name))
    streamed_states(streamed, tokens(seed=1))

    states = streamed_states(streamed, tokens(seed=2))

    expected = plain_states(model, tokens(seed=2))
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))


def gemma4(directory, **changes):
    """Return `directory`, now holding a Gemma 4, whose layers are handed something made from the tokens."""
    config = AutoConfig.for_model("gemma4_text", **GEMMA4 | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


def test_what_a_layer_is_handed_of_the_tokens_is_that_of_its_own_batch(tmp_path, monkeypatch):
    directory, ids = gemma4(tmp_path / "toy", num_kv_shared_layers=0), tokens(4)
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 2 * ids.shape[1])
    streamed = stream(directory)

    states = streamed_states(streamed, ids)

    for part in (slice(0, 2), slice(2, 4)):
        expected = plain_states(plain(directory), ids[part])
        assert all(torch.equal(state[part], other) for state, other in zip(states, expected, strict=True))


def test_batches_of_one_shape_share_their_masks(toy, monkeypatch):
    ids = tokens(4)
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 2 * ids.shape[1])
    with torch.no_grad():
        one, other = stream(toy("gemma3_text")).embed(ids)

    masks = [[call.kwargs["attention_mask"] for call in batch.calls] for batch in (one, other)]
    assert sum(mask is not None for mask in masks[0]) == 4  # the sliding layers; full attention needs none
    assert all(mask is same for mask, same in zip(*masks, strict=True))


def test_a_bfloat16_checkpoint_computes_in_float32_as_the_plain_model_does(tmp_path):
    directory = toys.build("llama", tmp_path / "toy", dtype="bfloat16")

    states = streamed_states(stream(directory), tokens())

    assert states[-1].dtype == torch.float32
    expected = plain_states(plain(directory), tokens())
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))


def test_a_checkpoint_computes_in_bfloat16_when_asked(toy):
    states = streamed_states(stream(toy("llama"), dtype=torch.bfloat16), tokens())

    assert {state.dtype for state in states} == {torch.bfloat16}
    expected = plain_states(plain(toy("llama"), dtype=torch.bfloat16), tokens())
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_sharded_checkpoint_streams_like_a_whole_one(name, toy, tmp_path):
    plain(toy(name)).save_pretrained(tmp_path / "shards", max_shard_size="50KB")

    states = streamed_states(stream(tmp_path / "shards"), tokens())

    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    expected = streamed_states(stream(toy(name)), tokens())
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt_oss", "deepseek_v3"])
def test_the_weights_in_memory_are_those_of_one_layer(name, toy):
    streamed, ids = stream(toy(name)), tokens()
    whole = streamed.module(0)
    model = streamed._model.module
    layers = [streamed.module(index) for index in range(streamed.depth)]

    assert real_parameters(model) == []
    with torch.no_grad():
        (batch,) = streamed.embed(ids)
        assert real_parameters(model) == []
        state = batch.hidden
        for index, layer in enumerate(layers):
            with streamed.layer(index) as apply:
                state = apply(batch, state)
                assert len(real_parameters(model)) == len(real_parameters(layer)) == len(list(layer.parameters())) > 0
            assert real_parameters(model) == []
        with streamed.head():
            assert real_parameters(model)
            assert [real_parameters(layer) for layer in layers] == [[]] * len(layers)
    assert real_parameters(model) == []
    assert streamed.module(0) is whole


def test_weights_that_were_let_go_of_leave_memory(toy):
    # Parameters that look empty while something still holds their numbers would make a stream in name only.
    streamed, ids = stream(toy("llama")), tokens()
    held = []
    with torch.no_grad():
        (batch,) = streamed.embed(ids)
        for index in range(streamed.depth):
            with streamed.layer(index) as apply:
                batch.hidden = apply(batch, batch.hidden)
                held += [weakref.ref(parameter) for parameter in streamed.module(index).parameters()]
        with streamed.head() as head:
            head(batch.hidden)
            held += [weakref.ref(parameter) for parameter in streamed._model.module.lm_head.parameters()]

    gc.collect()

    assert len(held) == 6 * 9 + 1
    assert [parameter for parameter in held if parameter() is not None] == []


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_layers_that_are_read_ahead_compute_the_same(name, toy):
    results = []
    for reads_ahead in (False, True):
        model = stream(toy(name), reads_ahead=reads_ahead)
        batches = model.start(tokens())
        with torch.no_grad():
            model.run(batches)
            with model.finish(batches) as head:
                results.append(head(batches[0].hidden))
        assert not any(name for name, parameter in model.module(0).named_parameters() if not parameter.is_meta)
    assert torch.equal(*results)


def test_one_layer_is_read_ahead_while_another_computes(toy):
    model = stream(toy("llama"), reads_ahead=True)
    batch = model.start(tokens())[0]
    with model.layer(0) as apply, torch.no_grad():
        ready = model.weights.ready()
        apply(batch, batch.hidden)
    assert {name.split(".")[2] for name in ready} == {"1"}
    with model.layer(1):
        assert {name.split(".")[2] for name in model.weights.ready()} == {"2"}


def test_a_file_that_ends_while_it_is_read_ahead_is_told_of_where_the_layer_is_needed(toy, tmp_path):
    shutil.copytree(toy("llama"), tmp_path / "short")
    model = stream(tmp_path / "short", reads_ahead=True)
    batch = model.start(tokens())[0]
    os.truncate(tmp_path / "short" / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="model.safetensors"), torch.no_grad():
        model.run([batch])


def test_weights_stay_in_memory_when_the_model_is_resident(toy):
    streamed, ids = stream(toy("llama"), resident=True), tokens()

    first = streamed_states(streamed, ids)
    kept = [real_parameters(streamed.module(index)) for index in range(streamed.depth)]
    parameter = streamed.module(0).mlp.up_proj.weight
    second = streamed_states(streamed, ids)

    assert all(len(names) == 9 for names in kept)
    assert streamed.module(0).mlp.up_proj.weight is parameter  # not read again
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_layer_that_fails_lets_go_of_its_weights(toy):
    streamed = stream(toy("llama"))

    def fail():
        with streamed.layer(2):
            assert real_parameters(streamed.module(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert real_parameters(streamed.module(2)) == []
    states, expected = streamed_states(streamed, tokens()), plain_states(plain(toy("llama")), tokens())
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))


# --- checkpoints that lack something --------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADLESS)
def test_a_checkpoint_saved_without_its_head_streams_but_has_logits_only_when_tied(name, toy, tmp_path):
    model = plain(toy(name))
    model.base_model.save_pretrained(tmp_path / "base")
    streamed = stream(tmp_path / "base")

    states = streamed_states(streamed, tokens())

    assert all(torch.equal(*pair) for pair in zip(states, plain_states(model, tokens()), strict=True))
    if name in TIED:
        assert torch.equal(logits_of(streamed, states[-1]), toys.logits(model))
    else:
        with pytest.raises(MeasureError, match=r"no weights for 'lm_head\.weight'|no weights for 'embed_out"):
            logits_of(streamed, states[-1])
    assert real_parameters(streamed._model.module) == []


def test_a_tensor_that_a_layer_of_a_known_family_lacks_is_refused_by_name(tmp_path):
    directory = without(toys.build("llama", tmp_path / "toy"), "model.layers.4.mlp.down_proj.weight")

    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.4\.mlp\.down_proj\.weight'"):
        stream(directory)


def test_a_tensor_that_a_layer_of_another_family_lacks_is_refused_by_name(tmp_path):
    directory = without(toys.build("bloom", tmp_path / "toy"), "transformer.h.4.mlp.dense_h_to_4h.weight")

    with pytest.raises((CheckpointError, MeasureError), match=r"no .*mlp\.dense_h_to_4h\.weight'") as caught:
        streamed_states(stream(directory), tokens())
    assert caught.value.hint


@pytest.mark.parametrize("name", ["word_embeddings.weight", "word_embeddings_layernorm.bias", "ln_f.weight"])
def test_a_tensor_that_is_lacking_around_the_layers_is_refused_by_name(name, tmp_path):
    directory = without(toys.build("bloom", tmp_path / "toy"), f"transformer.{name}")

    with pytest.raises((CheckpointError, MeasureError), match=f"no .*{name}'"):
        stream(directory).embed(tokens())


# --- what cannot run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(name, toy):
    with pytest.raises(MeasureError, match="has an encoder and a decoder") as caught:
        stream(toy(name))
    assert "--score random" in caught.value.hint


def test_a_quantized_checkpoint_is_refused(tmp_path):
    directory = with_config(toys.build("llama", tmp_path / "toy"), quantization_config={"quant_method": "gptq"})

    with pytest.raises(MeasureError, match="is quantized") as caught:
        stream(directory)
    assert "unquantized checkpoint" in caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bloomier", "no model type 'bloomier' of its own"),
        ("clip_vision_model", "attention heads"),
    ],
)
def test_a_model_type_without_a_language_model_is_refused(model_type, message, tmp_path):
    directory = with_config(toys.build("bloom", tmp_path / "toy"), model_type=model_type)

    with pytest.raises(MeasureError, match=message) as caught:
        stream(directory)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


# --- padding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for names in POSITIONS.values() for name in names])
def test_padding_on_either_side_leaves_the_states_of_real_tokens_as_they_are(name, side, toy):
    ids, lengths, streamed = tokens(3, 14), [14, 9, 5], stream(toy(name))
    alone = [streamed_states(streamed, ids[row : row + 1, :length]) for row, length in enumerate(lengths)]
    rows, real = padded(ids, lengths, left=side == "left")

    states = streamed_states(streamed, rows, real)

    for place, state in enumerate(states):
        for row in range(3):
            expected = alone[row][place][0]
            # float32 rounding: a masked sum runs over more summands, in another order. 1e-6 of the largest state was
            # seen; positions off by one in any family leave 1e-1.
            torch.testing.assert_close(state[row][real[row]], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_right_padding_gives_what_the_plain_model_gives(name, toy):
    rows, real = padded(tokens(3, 14), [14, 9, 5], left=False)

    states = streamed_states(stream(toy(name)), rows, real)

    expected = plain_states(plain(toy(name)), rows, real)
    assert all(torch.equal(state[real], other[real]) for state, other in zip(states, expected, strict=True))


def test_a_mask_without_padding_changes_nothing(toy):
    streamed = stream(toy("llama"))

    states = streamed_states(streamed, tokens(), torch.ones(2, 12, dtype=torch.bool))

    assert all(torch.equal(*pair) for pair in zip(states, streamed_states(streamed, tokens()), strict=True))


@pytest.mark.parametrize(
    ("dtype", "moved", "sees"), [("float32", 2e-3, True), ("bfloat16", 2e-2, False), ("bfloat16", 0.2, True)]
)
def test_a_token_that_moves_others_by_more_than_rounding_is_seen(dtype, moved, sees):
    states = torch.ones(2, 4, 8)
    states[1, :-1] += moved
    states = states.to(getattr(torch, dtype))
    if not sees:
        streaming.check_causal(states, "toy")
        return
    with pytest.raises(MeasureError, match="a token sees those after it"):
        streaming.check_causal(states, "toy")


# A thread computes for a second while the process ends. Without `await_at_exit` Python ends it inside of torch, and the
# C++ runtime aborts the process.
ENDING = """
import sys, threading, time, torch
from surgeon.models.passage import {imported}

def work():
    started.set()
    matrix, end = torch.rand(600, 600), time.monotonic() + 1
    while time.monotonic() < end and not told:
        matrix = (matrix @ matrix).softmax(-1)
    time.sleep(0.2)
    print("the end", flush=True)

started, told = threading.Event(), []
{start}
started.wait()
sys.exit(130)
"""
PASS = "threading.Thread(target=lambda: Passage(work), daemon=True).start()"
THREAD = """
def awaited():
    await_at_exit(lambda: told.append(True))
    work()

threading.Thread(target=awaited, daemon=True).start()"""


@pytest.mark.parametrize(("imported", "start"), [("Passage", PASS), ("await_at_exit", THREAD)])
def test_a_process_ends_when_no_thread_is_inside_of_torch(imported, start):
    program = ENDING.format(imported=imported, start=start)

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout, done.stderr) == (130, "the end\n", "")


def test_another_ctrl_c_ends_the_process_at_once():
    program = """
import os, signal, sys, threading, time
from surgeon.models.passage import await_at_exit

def told():
    print("waits", flush=True)
    os.kill(os.getpid(), signal.SIGINT)

def work():
    await_at_exit(told)
    started.set()
    time.sleep(60)

started = threading.Event()
threading.Thread(target=work, daemon=True).start()
started.wait()
sys.exit(3)
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)

    assert (done.returncode, done.stdout, done.stderr) == (130, "waits\n", "")


def test_a_thread_that_comes_to_torch_while_the_process_ends_stays_out():
    program = """
import atexit, threading, time

def late():
    ending.wait()
    await_at_exit(lambda: None)
    print("inside")

def end():
    ending.set()
    thread.join(10)
    print("over" if not thread.is_alive() else "alive")

ending = threading.Event()
atexit.register(end)  # runs after what is registered later
from surgeon.models.passage import await_at_exit
thread = threading.Thread(target=late, daemon=True)
thread.start()
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
