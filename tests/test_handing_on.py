"""Models whose layers hand on more than the hidden states: computed as transformers does, or refused by name."""

import gc
import threading

import pytest
import toys
from later import LATER
from talkers import TEXT, tokenizer_of, written

from surgeon.errors import MeasureError

if LATER:
    import torch
    from streamed import mean_loss, plain, stream, tokens
    from transformers import AutoConfig, AutoModelForCausalLM

    from surgeon.evals.perplexity import WindowBatch, row_losses
    from surgeon.measure.scoring import losses_without
    from surgeon.measure.taylor import taylor

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = toys.TOKENS | {
    "num_hidden_layers": 6,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
OWN_HEADS = BASE | {"num_key_value_heads": 2, "head_dim": 6}
LATENT = BASE | {
    "num_key_value_heads": 8,
    "q_lora_rank": 26,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "intermediate_size": 52,
}
HANDED_ON = {  # model type, its config, and what a layer takes from earlier ones
    "the router's states": ("zaya", OWN_HEADS | {"num_experts": 4, "num_experts_per_tok": 1}, "prev_router_hidden"),
    "states of earlier blocks": (
        "inkling2_text",
        OWN_HEADS | {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 28, "sliding_window": 5},
        "depend on more than its last layer's states|'block_states'",
    ),
    "keys and values": (
        "gemma4_text",
        toys.OWN_HEAD_DIM
        | {
            "global_head_dim": 10,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 131,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
        "'shared_kv_states'",
    ),
    "chosen tokens": ("glm_moe_dsa", LATENT | {"first_k_dense_replace": 1}, "'prev_topk_indices'"),
    "several streams": ("hy_v4", LATENT, "not one per token"),
    "a recurrent state": ("rwkv", toys.TOKENS | {"num_hidden_layers": 6, "hidden_size": 48}, "do not run alone"),
    "two streams": (
        "reformer",
        toys.TOKENS
        | {
            "hidden_size": 48,
            "axial_pos_embds_dim": [16, 32],
            "axial_pos_shape": [4, 16],
            "attn_layers": ["local", "lsh"] * 3,
            "is_decoder": True,
            "feed_forward_size": 52,
            "num_attention_heads": 8,
            "attention_head_size": 6,
            "num_buckets": 2,
            "lsh_attn_chunk_length": 8,
            "local_attn_chunk_length": 8,
            "max_position_embeddings": 64,
        },
        "do not run alone",
    ),
}


@pytest.fixture(params=HANDED_ON)
def handing_on(request, tmp_path):
    """Return a model whose layers hand something on, and what the refusal says of it."""
    model_type, changes, reason = HANDED_ON[request.param]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    toys._randomise(model)
    model.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy", reason


def test_the_streamed_loss_is_the_one_of_transformers(handing_on):
    directory, _ = handing_on
    ids = tokens(3, 16)

    (sums,) = row_losses(stream(directory), [WindowBatch(ids, torch.ones(3, dtype=torch.long), torch.full((3,), 16))])

    with torch.no_grad():
        expected = mean_loss(plain(directory)(input_ids=ids, use_cache=False).logits, ids)
    # float32: the head multiplies rows of another shape
    assert float(sums.sum()) / 45 == pytest.approx(float(expected), abs=2e-6)


def test_several_batches_do_not_take_what_another_one_was_handed(handing_on, monkeypatch):
    directory, _ = handing_on
    ids = tokens(3, 16)
    monkeypatch.setattr("surgeon.models.streaming.BATCH_TOKENS", 16)

    (sums,) = row_losses(stream(directory), [WindowBatch(ids, torch.ones(3, dtype=torch.long), torch.full((3,), 16))])

    model = plain(directory)
    with torch.no_grad():
        expected = [15 * mean_loss(model(input_ids=row[None], use_cache=False).logits, row[None]) for row in ids]
    assert sums.tolist() == pytest.approx([float(loss) for loss in expected], abs=3e-5)  # as above, of 15 tokens


def test_a_removal_is_refused_with_what_is_handed_on(handing_on):
    directory, reason = handing_on

    with pytest.raises(MeasureError, match=reason) as caught:
        losses_without(stream(directory), tokens(), [frozenset({1})])
    assert caught.value.hint


def test_a_gradient_is_refused_too(handing_on):
    directory, reason = handing_on

    with pytest.raises(MeasureError, match=reason):
        taylor(stream(directory), tokens())


def test_a_pass_that_nobody_ends_leaves_no_thread(toy):
    gc.collect()
    before = set(threading.enumerate())
    batches = stream(toy("llama")).start(tokens())
    (thread,) = [thread for thread in threading.enumerate() if thread not in before and thread.name == "passage"]

    del batches
    gc.collect()

    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_curve_of_layers_that_do_not_run_alone_is_refused_before_anything_is_written(tmp_path, run):
    directory = tmp_path / "toy"
    config = AutoConfig.for_model("rwkv", **HANDED_ON["a recurrent state"][1] | {"vocab_size": 300})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer_of(TEXT).save_pretrained(directory)
    text = written(tmp_path / "a.txt", TEXT)
    command = ["prune", directory, "--layers", 5, "--data", text, "--samples", 2, "--sequence-length", 16]

    result = run(*command, "--score", "block-influence", "--curve", "-o", tmp_path / "cut")

    assert result.code == 1
    assert "do not run alone" in result.err
    assert not (tmp_path / "cut").exists()
