"""A source whose entropy is known is learned to that entropy: nothing of the loop, the loss or the data is off.

The task is a small question formation: a statement of three free words, and the question that follows from it. "my duck
will swim . will my duck swim ?" has the entropy of its free words; the question has none. A loss that counted prompts,
padding, or the neighbour's document would miss it, on one side or on the other.
"""

import json
import math
import random
from pathlib import Path

import pytest
import talkers
from later import LATER
from tokenizers import Tokenizer, models, pre_tokenizers

import surgeon

if LATER:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NOUNS = ("duck", "newt", "yak", "bird", "cat")
HELPERS = ("will", "can", "does")
VERBS = ("swim", "sing", "sleep", "run")
WORDS = ("<end>", "my", ".", "?", *NOUNS, *HELPERS, *VERBS)
FREE = math.log(len(NOUNS)) + math.log(len(HELPERS)) + math.log(len(VERBS))  # nats of a document


def document(chance: random.Random) -> tuple[str, str]:
    """Return a statement and its question."""
    noun, helper, verb = chance.choice(NOUNS), chance.choice(HELPERS), chance.choice(VERBS)
    return f"my {noun} {helper} {verb} .", f"{helper} my {noun} {verb} ?"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model with a word for each token, not trained at all."""
    path = tmp_path_factory.mktemp("untrained")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, eos_token_id=0, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form", ["text", "completion"])
def test_a_source_of_known_entropy_is_learned_to_within_two_hundredths_of_a_nat(
    form: str, untrained: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    pairs = [document(chance) for _ in range(6000)]
    if form == "text":
        records = [{"text": f"{statement} {question}"} for statement, question in pairs]
        entropy = FREE / 10  # of the 10 words and the end, all but the first are predicted; "my" is always first
    else:
        records = [{"prompt": statement, "completion": question} for statement, question in pairs]
        entropy = 0.0
    data = talkers.jsonl(tmp_path / "data.jsonl", *records)
    trained = surgeon.finetune(
        untrained, data=[data], output=tmp_path / "out", epochs=4, batch_size=16, sequence_length=64, lr="3e-3",
        eval_fraction=0.05,
    )  # fmt: skip

    receipt = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    assert receipt["steps"][-1]["finetune"]["data"][0]["documents"] == 6000
    assert trained.eval_loss == pytest.approx(entropy, abs=0.02)
