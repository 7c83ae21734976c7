"""Truncation of a trained model: SmolLM2-135M-Instruct, 30 layers to 20."""

import pytest
import toys
from later import LATER

import surgeon

if LATER:
    import torch
    from transformers import AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]
KEPT = 20


@pytest.fixture(scope="module")
def cut(smollm2, tmp_path_factory):
    """Return the model cut to its first 20 layers."""
    out = tmp_path_factory.mktemp("truncated") / "cut"
    surgeon.truncate(smollm2, layers=KEPT).save(out)
    return out


def test_the_cut_model_is_the_original_with_ten_layers_bypassed(smollm2, cut):
    model, report = toys.load(cut, dtype=torch.float32)
    reference, _ = toys.load(smollm2, dtype=torch.float32)

    assert not any(report.values())
    assert model.num_parameters() == 99_114_048
    with toys.bypass(reference, range(KEPT, 30)):
        expected = toys.logits(reference)
    assert torch.equal(toys.logits(model), expected)


def test_the_cut_model_generates_the_same_with_and_without_cache(cut):
    model, _ = toys.load(cut, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(cut)
    prompt = tokenizer("Once upon a time, there was a", return_tensors="pt")

    cached, uncached = (
        model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )

    assert torch.equal(cached, uncached)


def test_tokenizer_and_chat_template_came_along(smollm2, cut):
    before, after = (AutoTokenizer.from_pretrained(path) for path in (smollm2, cut))
    chat = [{"role": "user", "content": "Was kostet das? ¿Qué? 猫 🐈"}]

    assert after.chat_template
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert after.decode(after(chat[0]["content"])["input_ids"]) == chat[0]["content"]


def test_transformers_saves_the_cut_model_again(cut, tmp_path):
    model, _ = toys.load(cut, dtype="auto")
    model.save_pretrained(tmp_path / "again")

    difference = surgeon.inspect(tmp_path / "again", against=cut).difference
    assert difference is not None
    assert (difference.changed, difference.added, difference.removed) == ((), (), ())
