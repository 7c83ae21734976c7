"""Gist training of encoder-decoders: a row as the encoder and the decoder see it, and what runs of it leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import talkers
import toys
from later import LATER

import surgeon
from surgeon.data.records import form_of
from surgeon.errors import PlanError
from surgeon.gist.layout import TEXT, prompt_tokens, text_tokens
from surgeon.gist.tokens import read_gist
from surgeon.models.loading import load_tokenizer
from surgeon.train.run_dir import read_metrics

if LATER:
    import torch
    from torch import Tensor, nn
    from transformers import AutoModelForSeq2SeqLM, DynamicCache
    from transformers.modeling_outputs import BaseModelOutput

    from surgeon.gist.attention import EncoderDecoder
    from surgeon.gist.compress import compress_ids, encoded_behind
    from surgeon.gist.probes import gist_slice
    from surgeon.gist.records import Gists, gist_examples
    from surgeon.gist.states import encoder_states
    from surgeon.gist.training import WithoutGist
    from surgeon.models.split import SplitModel
    from surgeon.train.losses import kl
    from surgeon.train.objective import Objective, attach_loss, detach_loss

pytestmark = pytest.mark.usefixtures("one_thread")

G, START = 130, 0  # the gist token of toys, and what their decoders begin with
SIZES = [(9, 2, 5, 4), (4, 1, 3, 6), (6, 3, 1, 2)]  # of rows: tokens of prompt, gist, text and answer
T5 = ["t5", "t5-gated"]  # whose states are scaled in front of the head, and are not
RECORDS = [
    {"instruction": "cat " * (1 + i % 4), "input": "rat", "output": "sat on the mat " * (1 + i % 3)} for i in range(24)
]
SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "sequence_length": 48, "lr": "1e-3", "eval_rows": 2}
# T5 computes its norms in float32 whatever its weights are: 1e-7, times a few layers.
ALIKE = 1e-5


def rows(sizes: list[tuple[int, int, int, int]] = SIZES) -> dict[str, Tensor]:
    """Return a row for each size, padded at its right; the answer is trained."""
    random = torch.Generator().manual_seed(0)
    width = max(map(sum, sizes)) + 2
    ids = torch.randint(3, 100, (len(sizes), width), generator=random)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, gist, text, answer) in enumerate(sizes):
        length, begin = prompt + gist + text + answer, prompt + gist + text
        ids[row, prompt : prompt + gist] = G
        positions[row] = torch.cat([torch.arange(length), torch.arange(width - length)])
        labels[row, begin - 1 : length - 1] = ids[row, begin:length]
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def load64(path: Path) -> Any:
    return toys.load(path, dtype=torch.float64)[0]


def loss_of(model: Any, layout: Any, batch: dict[str, Tensor]) -> Tensor:
    attach_loss(model, Objective(), layout=layout)
    found: Tensor = model(**batch)["loss"]
    detach_loss(model)
    return found


def learned(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: Any, condition: str) -> Tensor:
    """Return the loss of the rows, one by one, without a mask and without what a mask would hide.

    The gist is read behind its prompt and then kept alone, with its keys and values, as `surgeon compress` keeps it.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for line, (prompt, gist, text, answer) in zip(rows()["input_ids"], SIZES, strict=True):
        before, behind, written = line[None].split([prompt + gist, text, line.numel() - prompt - gist - text], 1)
        cache = DynamicCache()
        if condition == "positive":
            states = encoder_states(model, torch.cat([before, behind], 1))
        elif condition == "negative":
            states = encoder_states(model, behind)
        else:
            read = encoder_states(model, before, cache=cache)
            after = encoder_states(model, behind, cache=gist_slice(cache, None, gist))
            states = torch.cat([read[:, -gist:], after], 1)
        target = written[:, :answer]
        start = torch.tensor([[START]])
        encoded = BaseModelOutput(last_hidden_state=states)
        logits = model(encoder_outputs=encoded, decoder_input_ids=torch.cat([start, target[:, :-1]], 1)).logits
        total = total + nn.functional.cross_entropy(logits[0].double(), target[0], reduction="sum")
        count += answer
    return total / count


@pytest.mark.parametrize("condition", ["gist", "negative", "positive"])
@pytest.mark.parametrize("name", T5)
def test_a_row_has_the_loss_and_the_gradients_of_its_two_sides(toy, name, condition):
    model = load64(toy(name))
    found, expected = loss_of(model, EncoderDecoder((G,), condition), rows()), by_hand(model, condition)
    assert found.item() == pytest.approx(expected.item(), rel=ALIKE)
    mine, theirs = learned(model, found), learned(model, expected)
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    assert largest > 0
    for key in mine.keys() | theirs.keys():
        one, other = (grads.get(key, torch.zeros(())) for grads in (mine, theirs))
        assert float((one - other).abs().max()) <= ALIKE * largest, key


@pytest.mark.parametrize("name", T5)
def test_a_row_without_a_gist_is_what_transformers_trains(toy, name):
    model = load64(toy(name))
    batch = {key: value[:1, :20] for key, value in rows([(9, 0, 7, 4)]).items()}
    own = model(input_ids=batch["input_ids"][:, :16], labels=batch["input_ids"][:, 16:20]).loss
    assert loss_of(model, EncoderDecoder((G,)), batch).item() == pytest.approx(own.item(), rel=ALIKE)


def test_eager_attention_learns_what_sdpa_learns(toy):
    losses = [
        loss_of(toys.load(toy("t5"), dtype=torch.float64, attn_implementation=name)[0], EncoderDecoder((G,)), rows())
        for name in ("sdpa", "eager")
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=ALIKE)


def other_prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = batch["input_ids"].clone()
    for row, (prompt, *_) in enumerate(SIZES):
        ids[row, :prompt] = (ids[row, :prompt] + 17) % 100 + 3
    return batch | {"input_ids": ids}


def test_the_prompt_is_seen_through_the_gist_alone(toy):
    model = load64(toy("t5"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # else the gist's row is a token's in all logits
    with torch.no_grad():
        losses = {
            condition: [
                loss_of(model, EncoderDecoder((G,), condition), each).item() for each in (rows(), other_prompts(rows()))
            ]
            for condition in ("gist", "negative", "positive")
        }
        assert losses["negative"][0] == losses["negative"][1]
        assert losses["gist"][0] != losses["gist"][1]
        assert losses["positive"][0] != losses["positive"][1]
        before = losses["negative"][0]
        model.get_input_embeddings().weight[G] += 1.0
        assert loss_of(model, EncoderDecoder((G,), "negative"), rows()).item() == before


def test_a_row_that_lost_its_answer_trains_nothing(toy):
    model, batch = load64(toy("t5")), rows()
    whole = {key: value[:2] for key, value in batch.items()}
    batch["labels"][2] = -100
    sums = [loss_of(model, EncoderDecoder((G,)), each).item() for each in (whole, batch)]
    assert sums[0] == pytest.approx(sums[1], rel=ALIKE)


def test_activation_checkpointing_changes_nothing(toy):
    found = []
    for is_checkpointed in (False, True):
        model = toys.load(toy("t5"), dtype=torch.float64, dropout_rate=0.0)[0].train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(learned(model, loss_of(model, EncoderDecoder((G,)), rows())))
    for key, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][key], rtol=ALIKE, atol=1e-12)


def test_distilling_compares_with_the_model_that_sees_the_prompt_and_no_gist(toy):
    model, batch, layout = load64(toy("t5")), rows(), EncoderDecoder((G,))
    attach_loss(model, Objective(kd_weight=1.0), WithoutGist(load64(toy("t5")), (G,), layout=layout), layout=layout)
    divergence = float(model(**batch)["kl"])
    detach_loss(model)

    expected, split = 0.0, SplitModel(model)
    for row, (prompt, gist, text, answer) in enumerate(SIZES):
        line, begin = batch["input_ids"][row, : prompt + gist + text + answer][None], prompt + gist + text
        plain = torch.cat([line[:, :prompt], line[:, prompt + gist : begin]], 1)
        decoder_ids = torch.cat([torch.tensor([[START]]), line[:, begin:-1]], 1)
        chosen = batch["labels"][row, : line.shape[1]][None] != -100
        with torch.no_grad():
            full = model(input_ids=plain, decoder_input_ids=decoder_ids).logits[0]
            states = layout.states(split, line, torch.arange(line.shape[1])[None], torch.where(chosen.flatten())[0])
            student = split.logits(states[chosen])
        expected += float(kl(student, full, temperature=1.0, direction="forward"))
    assert divergence == pytest.approx(expected, rel=ALIKE)
    assert expected > 0


# --- data and runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gisted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with two gist tokens and a tokenizer."""
    place = tmp_path_factory.mktemp("gisted")
    talkers.talker(place / "plain", "t5")
    surgeon.add_gist(place / "plain", tokens=2).save(place / "gist")
    return place / "gist"


def test_a_record_has_the_tokens_that_compressing_and_writing_have(gisted):
    tokenizer, gist = load_tokenizer(str(gisted)), read_gist(json.loads((gisted / "config.json").read_text()))
    record = {"instruction": "The cat", "input": "a rat", "output": "sat"}
    example = gist_examples(
        [form_of(record, "here").document(record, "here")], tokenizer, Gists(gist, (2,), encoder=True)
    )[0]
    asked = [
        *prompt_tokens("The cat", gist, tokenizer, num_tokens=2, layout=TEXT, encoder=True),
        *text_tokens("\na rat\n", gist, tokenizer, layout=TEXT, encoder=True),
    ]
    assert list(example.ids[: len(asked)]) == asked
    assert asked[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.ids[len(asked) :]) == "sat<end>"
    assert list(example.trained) == [0] * len(asked) + [1] * (len(example.ids) - len(asked))


@pytest.mark.parametrize(
    "options", [{}, {"gist_control": "negative"}, {"gist_distill": 0.5}, {"lora": 2}, {"gist_random_tokens": "1,2"}]
)
def test_a_run_learns_and_leaves_a_checkpoint_that_compresses(gisted, tmp_path, options):
    data = talkers.jsonl(tmp_path / "data.jsonl", *RECORDS)
    steps = SHORT | {"max_steps": 24, "lr": "2e-2" if "lora" in options else "5e-3"}
    surgeon.finetune(gisted, data=[data], output=tmp_path / "out", gist=True, **steps, **options)
    found = read_metrics(tmp_path / "out.run")
    losses = [line["loss"] for line in found if "loss" in line]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])

    before, after = (AutoModelForSeq2SeqLM.from_pretrained(place) for place in (gisted, tmp_path / "out"))
    gist = read_gist(json.loads((gisted / "config.json").read_text()))
    moved = [name for name, weight in after.state_dict().items() if not torch.equal(weight, before.state_dict()[name])]
    assert moved
    states, check = compress_ids(after, [5, 6, 7, *gist.ids_of(2)], 2)
    assert check.difference <= check.allowed
    assert encoded_behind(after, states, torch.tensor([[8, 9]])).shape == (1, 4, after.config.d_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gist_impl": "two-pass"}, "behind a mask"),
        ({"gist_reader": "frozen", "lora": 2, "keep_adapter": True}, "behind a mask"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(gisted, tmp_path, options, message):
    data = talkers.jsonl(tmp_path / "data.jsonl", *RECORDS)
    with pytest.raises(PlanError, match=message):
        surgeon.finetune(gisted, data=[data], output=tmp_path / "out", gist=True, **SHORT, **options)
