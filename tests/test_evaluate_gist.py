"""`surgeon evaluate --gist`: one model, the same records with the whole prompt, with its gist, and without either."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import talkers
from later import LATER

import surgeon
from surgeon.errors import DataError, MeasureError, PlanError
from surgeon.evals.gist import GistEvaluation
from surgeon.evals.metrics import rouge_l
from surgeon.gist.tokens import GistTokens, read_gist
from surgeon.models.loading import load_tokenizer
from surgeon.verbs.evaluate import evaluate_gist

if LATER:
    import torch

    from surgeon.evals.generation import load_whole
    from surgeon.evals.gist_answers import answer_losses, answers
    from surgeon.gist.masks import cross_mask, encoder_mask, gist_masks, gist_phases
    from surgeon.gist.records import FORMS, FULL, GIST, NONE, Record, read_forms
    from surgeon.gist.states import encoder_states

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDS: list[dict[str, Any]] = [
    {"instruction": "The cat sat on the mat", "input": "and the rat", "output": "sat on the cat"},
    {"instruction": "The rat", "output": "that was that"},
    {"prompt": "The mat, and the rat sat on the cat", "completion": "é🌿"},
    {"question": "The cat?", "answer": "sat on the mat, and the rat"},
    {"instruction": "Sat on the cat; é🌿", "input": "the mat sat on the rat, that was that", "output": "cat"},
]
KINDS = ["llama", "gpt2", "qwen3", "gemma3_text", "mpt"]  # rotated, learned, sliding, mixed, and no positions at all


@pytest.fixture(scope="module")
def gisted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a toy's name to a checkpoint of it with two gist tokens."""
    place = tmp_path_factory.mktemp("gisted")

    def make(name: str) -> Path:
        if not (place / name).exists():
            talkers.talker(place / f"{name}-plain", name)
            surgeon.add_gist(place / f"{name}-plain", tokens=2).save(place / name)
        return place / name

    return make


@pytest.fixture
def data(tmp_path: Path) -> str:
    return talkers.jsonl(tmp_path / "data.jsonl", *RECORDS)


def ready(path: Path, data: str) -> tuple[Any, Any, list[Record], GistTokens]:
    tokenizer = load_tokenizer(str(path))
    gist = read_gist(json.loads((path / "config.json").read_text()))
    assert gist is not None
    model = load_whole(surgeon.open_model(path).source, "cpu")
    model.generation_config.suppress_tokens = list(gist.ids)
    encoder = model.config.is_encoder_decoder
    return model, tokenizer, read_forms([data], tokenizer, gist, num_tokens=2, samples=None, encoder=encoder), gist


def masked_logits(model: Any, ids: list[int], gist: GistTokens) -> torch.Tensor:
    """Return the logits of one row behind a gist mask, (T, V), in one pass without a cache."""
    row = torch.tensor([ids])
    masks = gist_masks(model.config, gist_phases(row, gist.ids))
    takes = {} if model.config.model_type == "mpt" else {"position_ids": torch.arange(len(ids))[None]}
    with torch.no_grad():
        logits: torch.Tensor = model(row, attention_mask=masks, use_cache=False, **takes).logits[0]
    return logits


# --- the forms --------------------------------------------------------------------------------------------------------


def test_forms_have_the_same_tokens_but_for_those_they_leave_out(gisted, data):
    _, tokenizer, records, gist = ready(gisted("llama"), data)
    for record, given in zip(records, RECORDS, strict=True):
        *fields, answer = given.values()
        text = "".join(f"\n{field}" for field in fields[1:]) + "\n"
        assert tokenizer.decode(list(record.asked(FULL))) == f"<s>{fields[0]}{text}"
        assert tokenizer.decode(list(record.asked(GIST))) == f"<s>{fields[0]}<GIST><GIST>{text}"
        assert tokenizer.decode(list(record.asked(NONE))) == f"<s>{text}"
        assert tokenizer.decode(list(record.answer)) == f"{answer}<end>"
        assert record.reference == answer
        assert tuple(token for token in record.asked(GIST) if token not in gist.ids) == record.asked(FULL)


def test_of_a_conversation_the_last_answer_is_asked_for(gisted, tmp_path):
    roles = ["system", "user", "assistant", "user", "assistant"]
    chat = [{"role": role, "content": f"cat {index}"} for index, role in enumerate(roles)]
    _, tokenizer, (record,), _ = ready(gisted("llama"), talkers.jsonl(tmp_path / "chat.jsonl", {"messages": chat}))
    assert record.reference == "cat 4"
    assert tokenizer.decode(list(record.answer)).startswith("cat 4")
    assert tokenizer.decode(list(record.asked(NONE))) == "<user>cat 1<assistant>cat 2<user>cat 3<assistant>"
    assert tokenizer.decode(list(record.asked(GIST))).startswith("<system>cat 0<GIST><GIST><user>")


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_each_record_alone(gisted, data, name):
    model, _, records, gist = ready(gisted(name), data)
    for form in FORMS:
        found = answer_losses(model, records, form, batch_size=3)
        for record, loss in zip(records, found, strict=True):
            ids = [*record.asked(form), *record.answer]
            with torch.no_grad():
                logits = masked_logits(model, ids, gist) if form == GIST else model(torch.tensor([ids])).logits[0]
            count = len(record.answer)
            expected = torch.nn.functional.cross_entropy(logits[-count - 1 : -1], torch.tensor(record.answer))
            assert loss == pytest.approx(float(expected) * count, rel=1e-5)  # float32, padded


@pytest.mark.parametrize("name", KINDS)
def test_answers_behind_a_cached_gist_are_those_behind_its_mask(gisted, data, name):
    """Written from a cache that holds no prompt, in a batch; compared with one pass over everything for each token."""
    model, tokenizer, records, gist = ready(gisted(name), data)
    found = answers(model, tokenizer, records, GIST, max_new_tokens=6, batch_size=3)
    for record, written in zip(records, found, strict=True):
        ids, new = list(record.asked(GIST)), []
        while len(new) < 6:
            logits = masked_logits(model, ids + new, gist)[-1]
            logits[list(gist.ids)] = -math.inf
            new.append(int(logits.argmax()))
            if new[-1] == tokenizer.eos_token_id:
                new.pop()
                break
        assert written == tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(found)) > 1


def test_the_whole_prompt_is_answered_as_evaluate_answers_it(gisted, data):
    model, tokenizer, records, _ = ready(gisted("llama"), data)
    whole, none = (answers(model, tokenizer, records, form, max_new_tokens=6, batch_size=2) for form in (FULL, NONE))
    for record, written in zip(records, whole, strict=True):
        alone = model.generate(torch.tensor([record.asked(FULL)]), max_new_tokens=6)[0, len(record.asked(FULL)) :]
        assert written == tokenizer.decode(alone, skip_special_tokens=True)
    assert whole != none


# --- an encoder-decoder -----------------------------------------------------------------------------------------------


def decoded(model: Any, record: Record, gist: GistTokens, form: str, written: list[int]) -> torch.Tensor:
    """Return the logits of what a decoder has written, (1 + T, V), the record in one masked encoder pass."""
    row = torch.tensor([record.asked(form)])
    phases = gist_phases(row, gist.ids)
    states = encoder_states(model, row, mask=encoder_mask(model.config, phases))
    begun = torch.tensor([[model.config.decoder_start_token_id, *written]])
    with torch.no_grad():
        logits: torch.Tensor = model(
            encoder_outputs=(states,), attention_mask=cross_mask(phases), decoder_input_ids=begun
        ).logits[0]
    return logits


def test_forms_of_an_encoder_end_with_the_end_of_text(gisted, data):
    _, tokenizer, records, _ = ready(gisted("t5"), data)
    assert tokenizer.decode(list(records[0].asked(FULL))) == "The cat sat on the mat\nand the rat\n<end>"
    assert tokenizer.decode(list(records[0].asked(NONE))) == "\nand the rat\n<end>"
    assert tokenizer.decode(list(records[0].answer)) == "sat on the cat<end>"


@pytest.mark.parametrize("form", ["full", "gist", "none"])
def test_an_encoder_decoder_is_scored_and_writes_as_behind_its_masks(gisted, data, form):
    model, tokenizer, records, gist = ready(gisted("t5"), data)
    losses = answer_losses(model, records, form, batch_size=3)
    found = answers(model, tokenizer, records, form, max_new_tokens=6, batch_size=3)
    for record, loss, said in zip(records, losses, found, strict=True):
        *told, _ = record.answer
        logits = decoded(model, record, gist, form, told)
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(record.answer), reduction="sum")
        assert loss == pytest.approx(float(expected), rel=1e-5)  # float32, padded
        new: list[int] = []
        while len(new) < 6:
            logits = decoded(model, record, gist, form, new)[-1]
            logits[list(gist.ids)] = -math.inf
            new.append(int(logits.argmax()))
            if new[-1] == tokenizer.eos_token_id:
                new.pop()
                break
        assert said == tokenizer.decode(new, skip_special_tokens=True)


def test_an_encoder_decoder_is_evaluated(gisted, data):
    found = evaluate_gist(gisted("t5"), data=[data], max_new_tokens=4)
    assert len(found.predictions) == len(RECORDS)
    assert (
        found.figure("loss", "gist").value != found.figure("loss", "full").value != found.figure("loss", "none").value
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def made(full: list[float], gist: list[float], none: list[float]) -> GistEvaluation:
    forms = {"full": tuple(full), "gist": tuple(gist), "none": tuple(none)}
    setup = {"data": ["d.jsonl"], "dtype": "float32"}
    outcomes = {"loss": forms, "rouge_l": forms}
    return GistEvaluation("model", outcomes, (1, 2, 1, 4), 2, 10.0, setup, (), 1.0)


def test_recovery_is_the_share_of_the_gap_that_the_gist_closes():
    full, none = [4.0, 3.0, 5.0, 8.0], [2.0, 1.0, 1.0, 4.0]
    assert made(full, none, none).recovery("rouge_l").value == 0
    assert made(full, full, none).recovery("rouge_l").value == 100
    half = made(full, [3.0, 2.0, 3.0, 6.0], none).recovery("rouge_l")
    assert (half.value, half.error) == (50, 0)
    assert made(none, none, full).recovery("loss").value == 100  # of a loss less is better
    assert made(none, full, full).recovery("loss").value == 0


def test_a_prompt_that_is_worse_than_none_has_no_recovery_and_says_so():
    """Both differences are negative, and their ratio alone would look like a gist that beats its prompt: 119.9 %."""
    full, none = [4.0, 3.0, 5.0, 8.0], [2.0, 1.0, 1.0, 4.0]
    found = made(full, [4.4, 3.4, 5.8, 8.8], none)
    share = found.recovery("loss")
    assert (share.value, share.error) == (None, None)
    assert share.refused.startswith("the whole prompt is worse than none, by ")
    told = found.to_dict()
    assert told["recovery"]["loss"] is None
    assert told["recovery_refused"] == {"loss": share.refused}
    assert told["recovery"]["rouge_l"]["value"] > 100
    line = next(line for line in found.to_text().splitlines() if line.split()[:1] == ["loss"])
    assert line.split()[-1] == "none"
    assert f"no recovery  loss: {share.refused}" in found.to_text()
    assert f"No recovery: loss: {share.refused}." in found.to_markdown()


def test_a_gap_within_two_errors_of_zero_has_no_recovery():
    full, none = [4.0, 1.0, 5.0, 2.0], [2.0, 3.0, 1.0, 4.0]
    for measure, pair in (("rouge_l", (full, none)), ("loss", (none, full))):
        share = made(pair[0], full, pair[1]).recovery(measure)
        assert share.value is None
        assert "is not two errors above 0" in share.refused
    assert "better than none by 0 ± 0, which" in made(none, full, none).recovery("rouge_l").refused


def test_one_record_has_no_recovery():
    forms = {"full": (2.0,), "gist": (1.5,), "none": (1.0,)}
    found = GistEvaluation("m", {"rouge_l": forms}, (3,), 2, 10.0, {"data": ["d"], "dtype": "float32"}, (), 1.0)
    assert "one record has no error" in found.recovery("rouge_l").refused


def test_the_error_of_a_recovery_is_that_of_a_ratio_of_means():
    """By the jackknife, which knows nothing of the formula; the two agree to second order in 1/n."""
    random = torch.Generator().manual_seed(0)
    none = torch.randn(400, generator=random)
    full = none + 2 + 0.3 * torch.randn(400, generator=random)
    gist = none + 1.4 + 0.5 * torch.randn(400, generator=random)

    def recovery(chosen: torch.Tensor) -> float:
        return float(100 * (gist - none)[chosen].sum() / (full - none)[chosen].sum())

    everyone = torch.arange(400)
    left_out = torch.tensor([recovery(everyone[everyone != index]) for index in range(400)], dtype=torch.float64)
    expected = math.sqrt(399 / 400 * float(((left_out - left_out.mean()) ** 2).sum()))
    for sign in (1, -1):  # of a loss less is better
        forms = {name: tuple((sign * each).tolist()) for name, each in (("full", full), ("gist", gist), ("none", none))}
        measure = "rouge_l" if sign > 0 else "loss"
        found = GistEvaluation("m", {measure: forms}, (1,) * 400, 2, 1.0, {}, (), 0.0).recovery(measure)
        assert found.value == pytest.approx(recovery(everyone), rel=1e-4)  # float32 sums here
        assert found.error == pytest.approx(expected, rel=0.02)


def test_the_figures_of_a_run_are_those_of_its_answers(gisted, data, tmp_path):
    path = gisted("llama")
    target = tmp_path / "predictions.jsonl"
    found = evaluate_gist(path, data=[data], max_new_tokens=6, batch_size=3, predictions=target)
    kept = [json.loads(line) for line in target.read_text().splitlines()]
    for form in FORMS:
        scores = [rouge_l(entry[form], entry["reference"]) for entry in kept]
        assert found.figure("rouge_l", form).value == pytest.approx(sum(scores) / len(scores))
        losses = found.outcomes["loss"][form]
        assert found.figure("loss", form).value == pytest.approx(sum(losses) / sum(found.sizes))
    told = found.to_dict()
    assert told["records"] == len(RECORDS)
    assert told["gist_tokens"] == 2
    assert told["gist"]["loss"] == found.figure("loss", "gist").value
    difference = found.difference("loss", "gist", "none")
    assert told["differences"]["gist_none"]["loss"]["value"] == difference.value
    assert difference.value == pytest.approx(told["gist"]["loss"] - told["none"]["loss"])
    longer = evaluate_gist(path, data=[data], tokens=4, max_new_tokens=6)
    assert longer.to_dict()["gist"]["loss"] != told["gist"]["loss"]
    assert longer.to_dict()["none"]["loss"] == pytest.approx(told["none"]["loss"], rel=1e-6)  # float32, other batches


def test_a_trained_gist_recovers_what_an_untrained_one_does_not(gisted, tmp_path):
    """Each instruction names its answer, so that without it nobody knows; the model learns to read it from the gist."""
    words = ["cat", "rat", "mat", "sat"]
    records = [{"instruction": word, "input": "that", "output": word * 2} for word in words]
    data = talkers.jsonl(tmp_path / "words.jsonl", *records)
    options: dict[str, Any] = {
        "max_steps": 40,
        "batch_size": 4,
        "sequence_length": 32,
        "lr": "3e-3",
        "eval_fraction": 0,
    }
    surgeon.finetune(gisted("llama"), data=[data], output=tmp_path / "out", gist=True, packing="off", **options)
    before, after = (evaluate_gist(path, data=[data], max_new_tokens=6) for path in (gisted("llama"), tmp_path / "out"))
    assert before.figure("exact_match", "gist").value == 0
    assert after.figure("exact_match", "gist").value == 1
    assert after.figure("exact_match", "none").value <= 0.25
    assert after.figure("loss", "gist").value < 0.2 < after.figure("loss", "none").value


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_one_json_object(gisted, data, run):
    path = gisted("llama")
    table = run("evaluate", path, "--data", data, "--gist", "--max-new-tokens", 4, "--device", "cpu")
    assert table.code == 0
    assert all(word in table.out for word in ("full prompt", "no prompt", "recovery", "rouge l", "exact match", "loss"))
    found = run("evaluate", path, "--data", data, "--gist", "--gist-tokens", 1, "--max-new-tokens", 4, "--json")
    told = json.loads(found.out)
    assert told["gist_tokens"] == 1
    assert set(told["recovery"]) == {"loss", "rouge_l", "exact_match"}
    markdown = run("evaluate", path, "--data", data, "--gist", "--max-new-tokens", 4, "--markdown")
    assert markdown.out.startswith("|  | full prompt | gist | no prompt |")


@pytest.mark.parametrize(
    "options",
    [("--metric", "rouge-l", "--gist"), ("--baseline", "x", "--gist"), ("--chat", "--gist"), ("--gist-tokens", 2)],
)
def test_options_that_do_not_go_with_gists_are_refused(gisted, data, run, options):
    assert run("evaluate", gisted("llama"), "--data", data, *options).code == 2


def test_a_model_without_gist_tokens_is_refused(data, tmp_path):
    with pytest.raises(PlanError, match="has no gist tokens"):
        evaluate_gist(talkers.talker(tmp_path / "plain"), data=[data])


def test_records_without_a_prompt_or_an_answer_are_refused(gisted, tmp_path):
    text = talkers.jsonl(tmp_path / "text.jsonl", {"text": "The cat"})
    with pytest.raises(DataError, match="no prompt to compress"):
        evaluate_gist(gisted("llama"), data=[text])
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    unanswered = talkers.jsonl(tmp_path / "chat.jsonl", {"messages": chat})
    with pytest.raises(DataError, match="nothing to answer"):
        evaluate_gist(gisted("llama"), data=[unanswered])


def test_a_record_longer_than_the_model_sees_is_named(gisted, data):
    with pytest.raises(MeasureError, match=r"data\.jsonl:1.*more than the 64 positions"):
        evaluate_gist(gisted("llama"), data=[data], max_new_tokens=60)
