"""Teachers that run beside the student, and those whose likeliest tokens are kept on disk."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import toys
from later import LATER
from talkers import TEXT, VOCABULARY, jsonl, talker, tokenizer_of
from test_train_objective import assert_close, batch, exact64, gradients, load64, plain_logits, plain_loss  # noqa: F401

from surgeon.errors import DataError, OutputError, PlanError

if LATER:
    import numpy as np
    import torch
    from torch import Tensor

    from surgeon.models.split import SplitModel
    from surgeon.train import teacher as module
    from surgeon.train.data import Collator, RowDataset
    from surgeon.train.losses import hidden_loss, kl
    from surgeon.train.objective import Objective, attach_loss
    from surgeon.train.packing import pack
    from surgeon.train.store import TokenStore
    from surgeon.train.teacher import CachedTeacher, OnlineTeacher, cache_top_k
    from surgeon.train.tokenise import prepare

pytestmark = pytest.mark.usefixtures("one_thread", "exact64")

# A model beside the student


@pytest.mark.parametrize("teacher", ["llama", "gemma2", "granite", "gpt2", "qwen3_moe", "bloom"])
@pytest.mark.parametrize("student", ["llama-tied", "cohere"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distilling_gives_the_loss_and_gradients_of_whole_logits(toy, student, teacher, direction):
    model, master, rows = load64(toy(student)), load64(toy(teacher)), batch()
    chosen = rows["labels"].flatten() != -100
    logits, target = plain_logits(model, rows)[chosen], plain_logits(master, rows, teacher)[chosen]
    divergence = kl(logits, target.detach(), temperature=2.0, direction=direction)
    entropy = plain_loss(model, rows)
    expected = 0.25 * entropy + 0.75 * divergence / 16
    expected.backward()
    before = gradients(model)
    attach_loss(model, Objective(kd_weight=0.75, temperature=2.0, direction=direction), OnlineTeacher(master))
    found = model(**rows)
    found["loss"].backward()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-12)  # sums of float64 in another order
    assert found["kl"].item() == pytest.approx(divergence.item(), rel=1e-12)
    assert found["cross_entropy"].item() == pytest.approx(entropy.item() * 16, rel=1e-12)
    assert_close(before, gradients(model), 1e-11)  # the same
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in master.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(toy):
    model, rows = load64(toy("gemma2")), batch()
    attach_loss(model, Objective(kd_weight=1.0, hidden_weight=1.0), OnlineTeacher(load64(toy("gemma2"))))
    found = model(**rows)
    assert abs(found["kl"].item()) < 1e-12  # rounding of float64, 16 tokens
    assert found["hidden"].item() == 0
    found["loss"].backward()
    assert max(float(grad.abs().max()) for grad in gradients(model).values()) < 1e-12  # the same


def states_behind(model, rows: dict[str, Tensor], layer: int) -> Tensor:
    seen: list[Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(lambda *args: seen.append(args[2]))
    plain_logits(model, rows)
    hook.remove()
    return seen[0][rows["labels"] != -100]


def test_states_are_compared_behind_the_layers_that_the_map_names(toy, tmp_path):
    model, master, rows = (
        load64(toys.build("llama", tmp_path / "student", num_hidden_layers=3)),
        load64(toy("llama")),
        batch(),
    )
    pairs = [(0, 1), (2, 5)]
    errors = [hidden_loss(states_behind(model, rows, i), states_behind(master, rows, j).detach()) for i, j in pairs]
    expected = plain_loss(model, rows) + 0.5 * sum(errors) / 2 / 16
    expected.backward()
    before = gradients(model)
    attach_loss(model, Objective(hidden_weight=0.5, layer_map=(1, None, 5)), OnlineTeacher(master))
    found = model(**rows)
    found["loss"].backward()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-12)  # sums of float64 in another order
    assert found["hidden"].item() == pytest.approx(sum(errors).item() / 2, rel=1e-12)
    assert_close(before, gradients(model), 1e-11)  # the same


def test_a_teacher_is_never_trained_and_drops_nothing(toy):
    model = toys.load(toy("llama"))[0].train()
    OnlineTeacher(model)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def refusal(model, objective: Objective, teacher) -> str:
    with pytest.raises(PlanError) as caught:
        attach_loss(model, objective, teacher)
    assert "_surgeon_loss" not in model.__dict__
    return str(caught.value)


def test_a_teacher_that_does_not_fit_is_refused_with_the_numbers(toy, tmp_path):
    model, small = toys.load(toy("llama"))[0], OnlineTeacher(toys.load(toy("gpt2"))[0])
    other = OnlineTeacher(toys.load(toys.build("llama", tmp_path / "other", vocab_size=140, num_hidden_layers=4))[0])
    kd, states = Objective(kd_weight=0.5), Objective(hidden_weight=0.5)
    assert refusal(model, kd, None) == "there is no teacher to learn from"
    assert refusal(model, kd, other) == "the teacher gives logits of 140 tokens, the model of 131"
    assert refusal(model, states, small).endswith("the model has 48, its teacher states of width 80")
    assert refusal(model, states, other).endswith("for each of 6 layers, and there is none")
    short = Objective(hidden_weight=0.5, layer_map=(0, 1))
    assert refusal(model, short, other).endswith("for each of 6 layers, and it has 2 entries")
    deep = Objective(hidden_weight=0.5, layer_map=(0, 1, 2, 3, 4, 5))
    assert refusal(model, deep, other) == "the layer map names layers [4, 5] of a teacher with 4"
    none = Objective(hidden_weight=0.5, layer_map=(None,) * 6)
    assert refusal(model, none, other) == "the layer map leads to no layer of the teacher"


@pytest.mark.parametrize(
    "wrong",
    [{"kd_weight": 1.5}, {"kd_weight": -0.1}, {"kd_weight": float("nan")}, {"temperature": 0.0},
     {"hidden_weight": -1.0}, {"direction": "sideways"}],
)  # fmt: skip
def test_an_objective_out_of_range_is_refused(wrong):
    with pytest.raises(PlanError):
        Objective(**wrong)


# Answers on disk


@pytest.fixture
def store(tmp_path) -> TokenStore:
    """Return a store of texts and of a prompt with its answer, so that some tokens are not trained."""
    records = [{"text": TEXT[:at]} for at in (30, 90, 61, 200, 12)]
    spec = jsonl(tmp_path / "data.jsonl", *records)
    answers = jsonl(tmp_path / "answers.jsonl", {"prompt": "The cat", "completion": " sat on the mat"})
    return prepare([spec, answers], tokenizer_of(), directory=tmp_path / "store", sequence_length=24)


@pytest.fixture
def pair(tmp_path):
    """Return a student and a teacher in float64, of the store's vocabulary."""
    names = {"student": "llama", "teacher": "gemma2"}
    return [load64(talker(tmp_path / key, name)) for key, name in names.items()]


def packed(store: TokenStore) -> list[dict[str, Tensor]]:
    rows = RowDataset(store, pack(store.lengths, 24, seed=0))
    collate = Collator(pad_id=0, with_index=True)
    return [collate([rows[i] for i in range(at, min(at + 3, len(rows)))]) for at in range(0, len(rows), 3)]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_answers_for_the_whole_vocabulary_train_as_the_teacher_itself(store, pair, tmp_path, direction, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 60)
    model, master = pair
    online = OnlineTeacher(master)
    cache_top_k(online, store, tmp_path / "cache", VOCABULARY, temperature=2.0)
    objective = Objective(kd_weight=0.75, temperature=2.0, direction=direction)
    batches = packed(store)
    assert len(batches) > 1
    for rows in batches:
        attach_loss(model, objective, online)
        expected = model(**rows)
        expected["loss"].backward()
        before = gradients(model)
        attach_loss(model, objective, CachedTeacher(tmp_path / "cache"))
        found = model(**rows)
        found["loss"].backward()
        # Log-probabilities of up to 30 are kept in float32, whose unit there is 2e-6.
        assert found["kl"].item() == pytest.approx(expected["kl"].item(), rel=1e-6)
        assert_close(before, gradients(model), 2e-6)  # the same


def test_a_few_answers_are_the_likeliest_and_come_close(store, pair, tmp_path):
    model, master = pair
    with torch.no_grad():
        master.model.embed_tokens.weight.mul_(6)  # a teacher that knows what it wants
    found = {}
    for k in (1, 4, 16, VOCABULARY):
        cache_top_k(OnlineTeacher(master), store, tmp_path / "cache", k)
        cached = CachedTeacher(tmp_path / "cache")
        assert (cached.k, cached.temperature, cached.vocab, cached.store) == (k, 1.0, VOCABULARY, store.digest)
        attach_loss(model, Objective(kd_weight=1.0), cached)
        found[k] = sum(model(**rows)["kl"].item() for rows in packed(store))
    assert found[1] < found[4] < found[16] < found[VOCABULARY]


@pytest.mark.parametrize(("name", "runs"), [("llama", 0), ("gpt2", 0), ("gemma2", 3)])
def test_a_head_that_is_a_matrix_answers_without_the_model_around_it(toy, name, runs):
    """gemma2 caps its logits."""
    model = toys.load(toy(name))[0]
    teacher, split = OnlineTeacher(model), SplitModel(model)
    states = torch.randn(7, split.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = split.logits(states)
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))

    assert all(torch.equal(teacher.logits(states), expected) for _ in range(3))
    assert len(calls) == runs


def test_a_token_has_the_answer_of_its_document_alone(store, pair, tmp_path):
    master = pair[1]
    cache_top_k(OnlineTeacher(master), store, tmp_path / "cache", 3)
    cached = CachedTeacher(tmp_path / "cache")
    for number in range(store.num_pieces):
        ids, labels, start = store.piece(number)
        chosen = torch.from_numpy(labels != -100)
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            values, expected = master(input_ids=tokens[None], use_cache=False).logits[0][chosen].log_softmax(-1).topk(3)
        index, trained = torch.arange(start, start + len(ids))[None], torch.where(chosen)[0]
        (found, log_probs), states = cached.see(tokens[None], None, index, trained, layers=())
        assert torch.equal(found, expected)
        torch.testing.assert_close(log_probs.double(), values, rtol=1e-6, atol=1e-6)  # kept in float32
        assert states == {}


def test_a_token_without_an_answer_is_an_error(store, pair, tmp_path):
    cache_top_k(OnlineTeacher(pair[1]), store, tmp_path / "cache", 3)
    cached = CachedTeacher(tmp_path / "cache")
    untrained = int(np.flatnonzero(np.fromfile(tmp_path / "cache" / module.PLACES, np.int64) < 0)[0])
    for index in (untrained, store.num_tokens, -1):
        with pytest.raises(DataError, match=f"holds no answer for token {index} of the data"):
            cached.see(torch.zeros(1, 1), None, torch.tensor([[index]]), torch.tensor([0]), layers=())


def test_answers_serve_their_temperature_and_no_states(store, pair, tmp_path):
    model, master = pair
    cache_top_k(OnlineTeacher(master), store, tmp_path / "cache", 3, temperature=2.0)
    cached = CachedTeacher(tmp_path / "cache")
    assert refusal(model, Objective(kd_weight=0.5), cached).endswith("answers at temperature 2, not 1")
    wanted = Objective(kd_weight=0.5, temperature=2.0, hidden_weight=1.0)
    assert refusal(model, wanted, cached).endswith("the model has 48, its teacher none")


@pytest.mark.parametrize("name", ["HEADER", "IDS", "LOG_PROBS", "PLACES"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_answers_that_are_not_complete_are_not_used(store, pair, tmp_path, name, damage):
    cache_top_k(OnlineTeacher(pair[1]), store, tmp_path / "cache", 3)
    path = tmp_path / "cache" / getattr(module, name)
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-4])
    with pytest.raises(DataError):
        CachedTeacher(tmp_path / "cache")


def test_what_is_interrupted_leaves_the_older_answers(store, pair, tmp_path):
    online, directory = OnlineTeacher(pair[1]), tmp_path / "cache"
    cache_top_k(online, store, directory, 3)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_top_k(online, store, directory, 5, progress=interrupt)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if "cache" in path.name] == ["cache"]
    told: list[int] = []
    cache_top_k(online, store, directory, 5, progress=told.append)
    assert sum(told) == store.num_tokens
    assert json.loads((directory / module.HEADER).read_text())["k"] == 5


def test_a_disk_without_room_is_an_error_before_the_teacher_is_asked(store, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(total=0, used=0, free=0))
    with pytest.raises(OutputError, match="0 B free"):
        cache_top_k(OnlineTeacher(pair[1]), store, tmp_path / "cache", 3)
    assert not (tmp_path / "cache").exists()


def test_no_answers_cannot_be_kept(store, pair, tmp_path):
    with pytest.raises(PlanError):
        cache_top_k(OnlineTeacher(pair[1]), store, tmp_path / "cache", 0)
