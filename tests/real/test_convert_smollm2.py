"""A trained model out of a GGUF file: it loads plainly, knows its own tokenizer, and answers."""

from pathlib import Path

import pytest
from later import LATER

if LATER:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]


def test_the_model_loads_with_nothing_missing(smollm2: Path):
    model, report = AutoModelForCausalLM.from_pretrained(smollm2, output_loading_info=True)

    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008


def test_the_answer_is_sensible(smollm2: Path):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]

    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)

    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_tokenizer_is_the_models_own(smollm2: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    assert len(tokenizer) == 49_152
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token) == (2, "<|endoftext|>")
    assert tokenizer.tokenize("<|im_start|>user") == ["<|im_start|>", "user"]
    assert tokenizer.tokenize("x = [\n    12]") == ["x", "Ġ=", "Ġ[", "ĊĠĠĠĠ", "1", "2", "]"]
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", ["Naïve café, 日本語 🤖\n\tтест  42", " leading and trailing ", "\r\n\n", "e\u0301"])
def test_text_survives_encoding_and_decoding(text: str, smollm2: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_is_the_models_own(smollm2: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )

    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
