"""What is asked of vLLM, by a stand-in for its module, for it is not installed; and the loop, with chosen answers."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from later import LATER
from talkers import jsonl, talker

import surgeon
from surgeon.errors import MeasureError
from surgeon.models.loading import load_tokenizer
from surgeon.rewriting.engines import chosen, seed_of

if LATER:
    import torch  # noqa: F401  # toys need it

SOLVED = [{"question": f"{index} and 1?", "answer": f"It is {index + 1}.\n#### {index + 1}"} for index in range(3)]
END = 2


class Vllm(ModuleType):
    """A stand-in for vLLM: `LLM` says what `says` has for a prompt and an attempt, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, says: Any) -> None:
        super().__init__("vllm")
        self.__spec__ = ModuleSpec("vllm", None)
        self.made: list[dict[str, Any]] = []
        self.asked: list[tuple[list[str], list[Any]]] = []
        outer, attempts = self, {}

        class LLM:
            def __init__(self, **options: Any) -> None:
                outer.made.append(options)
                print("INFO: vLLM logs to standard output")

            def generate(self, prompts: list[Any], sampling: list[Any], *, use_tqdm: bool) -> list[Any]:
                assert not use_tqdm
                texts = [tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts]
                outer.asked.append((texts, sampling))
                outputs = []
                for text in texts:
                    attempts[text] = attempts.get(text, 0) + 1
                    answer = says(text, attempts[text])
                    ids = tokenizer(answer.removesuffix("..."), add_special_tokens=False)["input_ids"]
                    is_cut = answer.endswith("...")
                    completion = SimpleNamespace(
                        token_ids=ids if is_cut else [*ids, END], finish_reason="length" if is_cut else "stop"
                    )
                    outputs.append(SimpleNamespace(outputs=[completion]))
                return outputs

        self.LLM = LLM
        self.SamplingParams = SimpleNamespace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "llama", max_position_embeddings=1024)


@pytest.fixture
def standing_in(model, monkeypatch):
    """Return a function that puts a stand-in with these answers into the place of vLLM."""

    def put(says: Any) -> Vllm:
        stand_in = Vllm(load_tokenizer(str(model)), says)
        monkeypatch.setitem(sys.modules, "vllm", stand_in)
        return stand_in

    return put


def distill(model: Path, data: str, output: Path, **options: Any) -> Any:
    return surgeon.distill(str(model), data=[data], output=output, device="cpu", engine="vllm", **options)


def number_in(text: str) -> int:
    return int(text.split(" and 1?")[0][-1])


def test_vllm_gets_the_model_the_prompts_as_tokens_and_how_to_write(model, standing_in, tmp_path):
    vllm = standing_in(lambda text, _: f"{number_in(text)} and one is {number_in(text) + 1}")
    data = jsonl(tmp_path / "a.jsonl", *SOLVED)

    done = distill(model, data, tmp_path / "out.jsonl", temperature=0.5, max_new_tokens=20, seed=3)

    (made,) = vllm.made
    assert (made["model"], made["tokenizer"], made["seed"]) == (str(model), str(model), 3)
    assert made["trust_remote_code"] is False
    assert made["generation_config"] == "vllm", "the checkpoint's own may sample otherwise"
    ((texts, sampling),) = vllm.asked
    assert [number_in(text) for text in texts] == [0, 1, 2]
    assert all(text.endswith("<assistant>Great! Let's think step by step.") for text in texts)
    for row, params in enumerate(sampling):
        assert (params.n, params.temperature, params.max_tokens) == (1, 0.5, 20)
        assert params.stop_token_ids == [END]
        assert params.seed == seed_of(3, row, 1) >> 32
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["0 and one is 1", "1 and one is 2", "2 and one is 3"]
    assert (done.rewritten, done.engine) == (3, "vllm")
    count = len(load_tokenizer(str(model))("0 and one is 1", add_special_tokens=False)["input_ids"])
    assert done.tokens == 3 * (count + 1)


def test_every_reason_is_counted_and_only_what_failed_is_asked_again(model, standing_in, tmp_path):
    answers = {0: ["It is 1", "never"], 1: ["It is 3", "It is 2..."], 2: ["", "my response is 3"]}
    vllm = standing_in(lambda text, attempt: answers[number_in(text)][attempt - 1])
    data = jsonl(tmp_path / "a.jsonl", *SOLVED)

    done = distill(model, data, tmp_path / "out.jsonl", temperature=1.0, samples=2)

    assert [[number_in(text) for text in texts] for texts, _ in vllm.asked] == [[0, 1, 2], [1, 2]]
    assert done.reasons == {"truncated": 1, "leak": 1}
    assert done.to_dict()["acceptance"] == pytest.approx(1 / 3)
    assert done.acceptance_error == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    assert done.prompts == {"gsm8k": {"rows": 3, "rewritten": 1}}


def test_records_of_both_kinds_get_their_prompts_and_checks(model, standing_in, tmp_path):
    standing_in(lambda text, _: "It is 1" if "expert in math" in text else "north, or so it seems")
    told = {"instruction": "Where?", "output": "In the far north."}
    data = jsonl(tmp_path / "a.jsonl", SOLVED[0], told)

    done = distill(model, data, tmp_path / "out.jsonl")

    assert done.unchanged == 0
    assert done.prompts == {"sdft": {"rows": 1, "rewritten": 1}, "gsm8k": {"rows": 1, "rewritten": 1}}
    assert "sdft" in done.to_text()


def test_answers_that_are_the_reference_again_are_counted(model, standing_in, tmp_path):
    standing_in(lambda text, _: "In the far north.")
    data = jsonl(
        tmp_path / "a.jsonl", *({"prompt": "Where?", "completion": f"In the far {way}. "} for way in ("north", "south"))
    )

    done = distill(model, data, tmp_path / "out.jsonl")

    assert (done.rewritten, done.unchanged) == (2, 1)
    assert "1 of them say the reference again" in done.to_text()


def test_an_answer_that_says_nothing_of_the_first_prompt_is_not_in_the_second(model, standing_in, tmp_path):
    """A record may spell the names of the prompt's places."""
    vllm = standing_in(lambda text, _: "north, or so it seems")
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "{reference}?", "completion": "{instruction} of it all."})

    distill(model, data, tmp_path / "out.jsonl")

    assert "### Instruction:\n{reference}?\n### Reference Answer:\n{instruction} of it all.\n" in vllm.asked[0][0][0]


def test_a_model_without_a_chat_template_gets_text(standing_in, tmp_path):
    plain = talker(tmp_path / "plain", max_position_embeddings=1024, template=None)
    vllm = standing_in(lambda text, _: "It is 1")
    data = jsonl(tmp_path / "a.jsonl", SOLVED[0])

    distill(plain, data, tmp_path / "out.jsonl")

    (text,) = vllm.asked[0][0]
    assert text.startswith("<s>You are an expert in math.")
    assert text.endswith("0 and 1?\n\nIt is 1.\n#### 1\n\nGreat! Let's think step by step.")


def test_the_training_prompt_does_not_hold_the_reference(model, standing_in, tmp_path):
    standing_in(lambda text, _: "It is 1 in all")
    data = jsonl(tmp_path / "a.jsonl", SOLVED[0])
    distill(model, data, tmp_path / "out.jsonl")

    found = surgeon.evaluate(
        str(model), data=[str(tmp_path / "out.jsonl")], metric="rouge-l", max_new_tokens=1, device="cpu"
    )

    assert found.predictions[0]["prompt"] == "0 and 1?\n"
    assert found.predictions[0]["reference"] == "It is 1 in all"


def test_fewer_answers_than_prompts_are_an_error(model, standing_in, tmp_path):
    vllm = standing_in(lambda text, _: "It is 1")
    whole = vllm.LLM.generate
    vllm.LLM.generate = lambda *given, **named: whole(*given, **named)[1:]

    with pytest.raises(MeasureError, match="2 answers to 3 prompts"):
        distill(model, jsonl(tmp_path / "a.jsonl", *SOLVED), tmp_path / "out.jsonl")


def test_vllm_that_is_not_installed_is_said(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)

    with pytest.raises(MeasureError, match="vLLM cannot be imported") as caught:
        distill(model, jsonl(tmp_path / "a.jsonl", *SOLVED), tmp_path / "out.jsonl")
    assert 'pip install "surgeon[vllm]"' in str(caught.value.hint)


def test_auto_is_vllm_on_cuda_alone_and_only_where_it_is(standing_in):
    standing_in(lambda text, _: "")

    assert [chosen("auto", device) for device in ("cuda", "cuda:1", "cpu", "mps")] == [
        "vllm",
        "vllm",
        *["transformers"] * 2,
    ]
    assert chosen("transformers", "cuda") == "transformers"


def test_auto_is_transformers_where_there_is_no_vllm(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "path", [])

    assert chosen("auto", "cuda") == "transformers"
