"""Gist tokens on the trained SmolLM2-135M-Instruct."""

import pytest
from later import LATER

import surgeon

if LATER:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from surgeon.gist.support import check_checkpoint

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]


@pytest.fixture(scope="module")
def gisted(smollm2, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gist") / "SmolLM2-gist"
    surgeon.add_gist(smollm2, tokens=4).save(directory)
    return directory


def test_the_tokenizer_knows_the_token_and_reads_all_else_as_before(gisted, smollm2, tmp_path):
    old, new = AutoTokenizer.from_pretrained(smollm2), AutoTokenizer.from_pretrained(gisted)
    chat = [{"role": "user", "content": "Name three colours, née 🎨."}]

    assert new("<GIST>" * 4)["input_ids"] == [49152] * 4
    assert new.decode(new("red<GIST><GIST> blue")["input_ids"], skip_special_tokens=True) == "red blue"
    assert new.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    for text in (chat[0]["content"], "  spaces\n\ttabs", "<GIS T>"):
        assert new(text)["input_ids"] == old(text)["input_ids"]
    new.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("<GIST>")["input_ids"] == [49152]


def test_the_model_loads_whole_and_generates_as_before(gisted, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model, report = AutoModelForCausalLM.from_pretrained(gisted, dtype="float32", output_loading_info=True)
    before = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    text = tokenizer("The capital of France is", return_tensors="pt")

    assert not any(report.values())
    assert model.generation_config.suppress_tokens == [49152]
    one, other = (m.generate(**text, max_new_tokens=12, do_sample=False) for m in (model, before))
    assert one.tolist() == other.tolist()


def test_a_trained_model_leaks_nothing(smollm2):
    found = check_checkpoint(str(smollm2))

    assert found.supported
    assert found.leak == 0.0
    assert found.control > 0.1
    # float32 rounding over 30 layers, of the largest logit: measured 2.5e-6 and 3.3e-6.
    assert max(found.cache_difference, found.rebased_difference) <= 1e-5
