"""Candidates that lack half layers are measured as the model with hooks that zero these halves."""

import math

import pytest
import toys
from later import LATER

from surgeon.anatomy.halves import ATTENTION, HALVES, MLP, Pairing
from surgeon.errors import MeasureError, PlanError

if LATER:
    import torch
    from streamed import mean_loss, padded, plain, stream, tokens
    from torch.nn import functional

    from surgeon.measure import kept
    from surgeon.measure.candidates import Reference
    from surgeon.measure.scoring import losses_without
    from surgeon.models.streaming import StreamedModel
    from surgeon.plan.planned import PlannedSource
    from surgeon.surgery import open_source
    from surgeon.verbs.prune import prune

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1e-5  # losses of order 5 from float32 logits
PARTS = {  # the modules of the halves, where they are not Llama's
    "gpt2": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn", "ffn"),
}
SEQUENTIAL = [
    *("llama", "mistral", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "olmo2", "exaone4", "granite"),
    *("smollm3", "gpt_oss", "phi3", "gpt2", "opt", "bloom", "glm4", "deepseek_v3"),
]
PARALLEL = ["gpt_neox", "falcon", "cohere", "phi", "gptj", "codegen", "stablelm-parallel", "opt-post-norm"]


def without(*gone, depth=6):
    """Return the pairing of all halves but these."""
    return Pairing.of_halves([(i, half) for i in range(depth) for half in HALVES if (i, half) not in gone])


def zeroed(model, name, gone):
    """Zero what these halves of a plainly loaded model add."""
    layers = toys.stacks(model)[0]
    for layer, half in gone:
        paths = PARTS.get(name, ("self_attn", "mlp"))
        part = layers[layer].get_submodule(paths[half == MLP])

        def hook(_, args, output):
            return torch.zeros_like(output) if torch.is_tensor(output) else (torch.zeros_like(output[0]), *output[1:])

        part.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_candidate_without_half_layers_loses_what_hooks_say(name, tmp_path):
    gone = ((2, MLP), (3, ATTENTION))
    directory = toys.build(name, tmp_path / "model")
    ids = tokens()

    outcome = Reference(stream(directory), ids).measure([without(*gone)])[0]

    with torch.no_grad():
        whole = plain(directory)(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        logits = zeroed(plain(directory), name, gone)(ids, use_cache=False).logits
    guess = logits[:, :-1].log_softmax(-1)
    assert outcome.mean("loss") == pytest.approx(float(mean_loss(logits, ids)), abs=CLOSE)
    assert outcome.mean("kl") == pytest.approx(float((whole.exp() * (whole - guess)).sum(-1).mean()), abs=CLOSE)
    assert outcome.acceptance == pytest.approx(float(torch.minimum(whole.exp(), guess.exp()).sum(-1).mean()), abs=CLOSE)
    assert outcome.agreement == float((whole.argmax(-1) == guess.argmax(-1)).double().mean())


@pytest.mark.parametrize("name", PARALLEL)
def test_layers_whose_halves_do_not_follow_each_other_are_refused(name, tmp_path):
    directory = toys.build(name, tmp_path / "model")
    with pytest.raises(MeasureError, match="is no attention followed by an MLP"):
        Reference(stream(directory), tokens())


def test_of_any_model_whole_layers_can_be_left_out(tmp_path):
    directory = toys.build("gpt_neox", tmp_path / "model")
    reference = Reference(stream(directory), tokens(), halves=False)

    outcome = reference.measure([Pairing.of_layers([0, 1, 4, 5])])[0]

    assert outcome.mean("loss") == losses_without(stream(directory), tokens(), [frozenset({2, 3})])[0]
    with pytest.raises(MeasureError, match="half layer"):
        reference.measure([without((2, MLP), (3, ATTENTION))])


def test_candidates_together_get_what_each_gets_alone_and_share_what_they_share(tmp_path):
    directory = toys.build("llama", tmp_path / "model")
    chosen = [
        Pairing.of_layers([0, 1, 2, 3, 4]),
        Pairing.of_layers([0, 1, 4, 5]),
        without((1, MLP), (2, ATTENTION), (4, MLP), (5, ATTENTION)),
        without((1, MLP), (2, ATTENTION)),
        Pairing.of_layers(range(6)),
    ]
    reference = Reference(stream(directory), tokens())

    together = reference.measure(chosen)

    for candidate, outcome in zip(chosen, together, strict=True):
        alone = Reference(stream(directory), tokens()).measure([candidate])[0]
        assert outcome.loss == alone.loss
        assert outcome.kl == alone.kl
    assert together[-1].mean("kl") == 0.0
    assert together[-1].acceptance == 1.0
    # All layers once; then layers 4 and 5 behind the gap; and the two that lack M1 A2 run M2 A3 M3 A4 together.
    shares = Reference(stream(directory), tokens())._halves.shares[0]
    both = 2 * shares[MLP] + 2 * shares[ATTENTION]
    alone = shares[MLP] + shares[MLP] + shares[ATTENTION] + shares[MLP]
    assert reference.effort.passes == pytest.approx(1 + (2 + both + alone) / 6)


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left, tmp_path):
    directory = toys.build("llama", tmp_path / "model")
    ids, real = padded(tokens(), [12, 7], left=left)
    candidate = without((2, MLP), (3, ATTENTION))

    outcome = Reference(stream(directory), ids, real=real).measure([candidate])[0]

    rows = [row[keep] for row, keep in zip(ids, real, strict=True)]
    alone = [Reference(stream(directory), row[None]).measure([candidate])[0] for row in rows]
    assert list(outcome.tokens) == [len(row) - 1 for row in rows]
    assert outcome.loss == pytest.approx([each.loss[0] for each in alone], abs=1e-4)


def test_states_that_are_many_are_kept_in_a_file(tmp_path, monkeypatch):
    directory = toys.build("llama", tmp_path / "model")
    in_memory = Reference(stream(directory), tokens()).measure([without((2, MLP), (3, ATTENTION))])[0]
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    in_file = Reference(stream(directory), tokens()).measure([without((2, MLP), (3, ATTENTION))])[0]
    assert in_memory.loss == in_file.loss


def test_a_difference_has_the_error_of_paired_rows(tmp_path):
    directory = toys.build("llama", tmp_path / "model")
    reference = Reference(stream(directory), tokens(rows=5))
    outcome = reference.measure([Pairing.of_layers([0, 1, 4, 5])])[0]

    mean, error = outcome.over(reference.whole, "loss")

    each = zip(outcome.loss, reference.whole.loss, outcome.tokens, strict=True)
    rows = torch.tensor([(own - whole) / count for own, whole, count in each], dtype=torch.float64)
    assert mean == pytest.approx(float(rows.mean()))
    assert error == pytest.approx(float(rows.std()) / math.sqrt(5))
    assert outcome.over(outcome, "loss") == (0.0, 0.0)


def test_a_narrower_model_is_streamed_without_being_written(tmp_path):
    directory = toys.build("llama", tmp_path / "model")
    surgery = prune(str(directory), intermediate_size=20, attention_heads=4, hidden_size=40, score="magnitude")
    surgery.save(tmp_path / "narrow")

    planned = StreamedModel(PlannedSource(open_source(str(directory)), surgery.plan))

    outcome = Reference(planned, tokens()).whole
    with torch.no_grad():
        logits = plain(tmp_path / "narrow")(tokens(), use_cache=False).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert outcome.mean("loss") == pytest.approx(float(expected), abs=CLOSE)


def test_halves_that_do_not_come_in_turns_are_no_layers():
    for gone, said in (
        (((2, MLP),), "6 attentions and 5 MLPs"),
        (((2, MLP), (2, ATTENTION)), None),
        (((2, ATTENTION), (3, MLP)), "MLPs of layers 1 and 2 would follow"),
        (((2, MLP), (4, ATTENTION)), "attentions of layers 2 and 3 would follow"),
    ):
        if said is None:
            without(*gone).check(6)
        else:
            with pytest.raises(PlanError, match=said):
                without(*gone).check(6)
    with pytest.raises(PlanError, match=r"layers \[6\] do not exist"):
        Pairing.of_layers([0, 6]).check(6)
