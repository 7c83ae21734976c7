"""A model as the draft of another: its acceptance by hand, exact sampling that changes nothing, and the arithmetic."""

import pytest
import talkers
from later import LATER

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.cost.drafting import acceptance_of, draft_speed, time_share, tokens_a_round
from surgeon.errors import MeasureError
from surgeon.options import OptionError
from surgeon.surgery import open_source

if LATER:
    import torch
    from transformers import AutoModelForCausalLM

    from surgeon.evals import drafts
    from surgeon.models.loading import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a target and its first layers, which are the draft."""
    target = talkers.talker(tmp_path_factory.mktemp("models") / "target")
    draft = tmp_path_factory.mktemp("models") / "draft"
    depth = read_anatomy(spec_of(open_source(str(target)))).depth
    surgeon.truncate(str(target), layers=depth - 1).save(draft)
    return str(target), str(draft)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return talkers.written(tmp_path_factory.mktemp("text") / "text.txt", talkers.TEXT * 4)


def test_acceptance_is_the_probability_that_both_share(pair, text):
    target, draft = pair

    found = surgeon.evaluate(draft, data=[text], baseline=target, metric="acceptance", samples=3, sequence_length=16)

    ids = load_tokenizer(target)(talkers.TEXT * 4, add_special_tokens=False)["input_ids"][:48]
    rows = torch.tensor(ids).view(3, 16)
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(rows).logits[:, :-1].softmax(-1)
            for each in pair
        )
    figures = found.scored.figures
    assert figures["acceptance"].value == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), abs=1e-5)
    assert figures["agreement"].value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert figures["kl"].value == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-5)
    assert found.recovered is None
    assert "acceptance" in found.to_text()
    assert found.to_dict()["drafting"]["target"] == target


def test_of_a_model_that_drafts_for_itself_every_token_is_accepted(pair, text):
    target, _ = pair
    shape = {"samples": 2, "sequence_length": 16, "max_new_tokens": 24, "draft_tokens": 3}

    found = surgeon.evaluate(target, data=[text], baseline=target, metric="acceptance", **shape)

    measured = found.setup["drafting"]["measured"]
    assert found.scored.figures["acceptance"].value == pytest.approx(1.0, abs=1e-6)
    assert measured["tokens"] == 48
    assert measured["rounds"] == 12  # of 3 drafted tokens and the target's own
    assert measured["acceptance"] == pytest.approx(1.0, abs=1e-6)


def test_what_is_sampled_is_accepted_as_the_distributions_say(pair, text):
    """Of some 250 rounds the share of accepted tokens has an error of 0.03."""
    target, draft = pair
    shape = {"samples": 8, "sequence_length": 12, "max_new_tokens": 48, "draft_tokens": 1}
    found = surgeon.evaluate(draft, data=[text], baseline=target, metric="acceptance", **shape)
    measured = found.setup["drafting"]["measured"]
    assert measured["tokens"] == 384
    assert measured["acceptance"] == pytest.approx(measured["expected_acceptance"], abs=0.08)


def test_a_draft_proposes_a_fixed_number_of_tokens_and_gets_its_own_rule_back(pair):
    draft = AutoModelForCausalLM.from_pretrained(pair[1])
    config = draft.generation_config
    before = (config.num_assistant_tokens, config.num_assistant_tokens_schedule, config.assistant_confidence_threshold)
    with drafts.fixed(draft, 3):
        assert config.num_assistant_tokens == 3
        assert config.num_assistant_tokens_schedule == "constant"
        assert config.assistant_confidence_threshold == 0.0
    after = (config.num_assistant_tokens, config.num_assistant_tokens_schedule, config.assistant_confidence_threshold)
    assert after == before


def test_a_target_that_writes_another_text_with_its_draft_is_refused(pair, monkeypatch):
    target, draft = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in pair)
    prompt = torch.tensor([[5, 6, 7, 8]])
    drafts.check_greedy(target, draft, prompt, 3, 12)

    monkeypatch.setattr(drafts, "speculated", _broken(drafts.speculated))
    with pytest.raises(MeasureError, match="writes another text from token 2 on"):
        drafts.check_greedy(target, draft, prompt, 3, 12)


def _broken(speculated):
    def changed(target, *args, **kwargs):
        written, calls = speculated(target, *args, **kwargs)
        with torch.no_grad():
            worst = target(written[:, :6]).logits[0, -1].argmin()
        written[0, 6] = worst
        return written, calls

    return changed


def test_the_arithmetic_of_drafting():
    assert tokens_a_round(0.8, 1) == pytest.approx(1.8)
    assert tokens_a_round(0.5, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))
    assert acceptance_of(tokens_a_round(0.37, 4), 4) == pytest.approx(0.37)
    assert draft_speed(0.8, 0.8).times == pytest.approx(1.0)  # 22 of 30 layers: no gain at an acceptance of 0.8
    assert draft_speed(0.8, 0.8).told.startswith("cannot pay")
    fast = draft_speed(0.8, 0.1)
    assert fast.times == pytest.approx(max(tokens_a_round(0.8, g) / (0.1 * g + 1) for g in range(1, 17)))
    for share in (0.1, 0.5, 0.9):
        assert draft_speed(share + 1e-6, share).times > 1.0 >= draft_speed(share - 1e-6, share).times


def test_the_share_of_time_counts_layers_and_head(pair):
    target, draft = (read_anatomy(spec_of(open_source(each))) for each in pair)
    layer = target.spec.num_parameters - draft.spec.num_parameters
    share = time_share(draft, target)
    assert share == pytest.approx(1 - layer / (layer * target.depth + _head(target)), rel=1e-2)


def _head(anatomy):
    """Return the numbers of a model's head and final norm."""
    inside = sum(t.num_parameters for name, t in anatomy.spec.tensors.items() if anatomy.stacks[0].locate(name))
    table = anatomy.sizes["vocab"] * anatomy.sizes["hidden"]
    has_both = anatomy.spec.num_parameters - inside > 2 * table - 1
    return anatomy.spec.num_parameters - inside - (table if has_both else 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "by the model that the draft writes for"),
        ({"baseline": "x", "draft_tokens": 3}, "no effect where nothing is sampled"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        surgeon.evaluate("x", data=["text.txt"], metric="acceptance", **options)
